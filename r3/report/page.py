"""The page: summary, findings, plots and the drill-down into single tokens, as one HTML text without any script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.errors import ConfigError
from r3.panels import SECTIONS
from r3.report.figures import pictures
from r3.report.read import ENDED, Group, Run
from r3.summary import summarise
from r3.tokens import TokenColumns, TokenReport

# |d| in nats at which the shade of a token is full: its probability is wrong by a factor of 1.5.
_FULL_SHADE = 0.405
# Of each run these steps can be opened: the newest, and those with the largest differences.
_NEWEST, _LARGEST = 2, 2
# k3 above this at the same weight version was reached only by records or weights that do not belong together.
_BROKEN_K3 = 0.05
_SYMBOLS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about a run; `level`: `good`, `note` or `bad`."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One token as the page shows it. `shade` in [0, 1]; `rises`: the trainer gives it more than the engine did."""

    text: str
    id: int
    rollout: float
    train: float
    d: float
    native_d: float | None
    layers: str
    native_layers: str
    shade: float

    @property
    def rises(self) -> bool:
        """Is the difference positive?"""
        return self.d > 0


def render(groups: Sequence[Group], refresh_s: int | None = None) -> str:
    """Return the page; `refresh_s`: seconds after which a browser loads it again, while a run goes on."""
    try:
        import jinja2
    except ImportError:
        raise ConfigError("r3.report needs jinja2: pip install 'rollout-router-replay[plot]'") from None
    runs = [run for group in groups for run in group.runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [(section.name, pictures(section, groups)) for section in SECTIONS]
    return environment.get_template("page.html").render(
        title=", ".join(group.label for group in groups),
        groups=groups,
        refresh=refresh_s if any(run.state not in ENDED for run in runs) else None,
        summary=summary_table(runs),
        findings=[(run.name, list(findings(run))) for run in runs],
        sections=[(name, found) for name, found in sections if found],
        drill=[(run.name, [_step(report) for report in chosen(run.tokens)]) for run in runs if run.tokens],
        runs=runs,
    )


def summary_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the closing summary of every run side by side: `(name, values)`."""
    # Runs of different length measure a different number of steps; their lines belong side by side all the same.
    lines = [
        {re.sub(r"\d+ steps", "the steps", line.name): line.value for line in summarise(run.rows, run.final_eval)}
        for run in runs
    ]
    names = list(dict.fromkeys(name for one in lines for name in one))
    states = [("state", [f"{run.state}, step {run.rows[-1]['step'] if run.rows else 0}" for run in runs])]
    return states + [(name, [one.get(name, "") for one in lines]) for name in names]


def findings(run: Run) -> Iterator[Finding]:
    """Yield what stands out in a run, the worst first; one good sentence when nothing does."""
    bad = list(_bad(run))
    yield from bad
    replays = run.config["replay"]["mode"] != "none"
    if not replays:
        yield Finding("note", "Replay is off (replay.mode: none): the trainer routes as it likes.")
    if run.state == "running":
        yield Finding("note", "The run is not finished.")
    if not bad:
        rows = "every row replayed, " if replays else ""
        yield Finding("good", f"Nothing stands out: no alarm, {rows}k3 in range.")


def _bad(run: Run) -> Iterator[Finding]:
    if run.state in ("failed", "interrupted"):
        yield Finding("bad", f"The run {run.state}: {run.status.get('error', 'no reason given')}")
    alarms = run.alarms()
    if alarms:
        steps = sorted({alarm["step"] for alarm in alarms})
        rules = ", ".join(sorted({str(alarm.get("rule", alarm["event"])) for alarm in alarms}))
        first = next(alarm for alarm in alarms if alarm["step"] == steps[0])
        text = f"{len(alarms)} alarms in {len(steps)} steps, the first in step {steps[0]} ({rules})"
        yield Finding("bad", f"{text}: {first.get('sentence', '')}")
    steps_, values = run.series("mismatch/k3")
    if len(values) and values.max() > _BROKEN_K3:
        where = int(steps_[values.argmax()])
        yield Finding("bad", f"k3 reached {values.max():.3g} nats in step {where}: engine and trainer do not match.")
    for key, expected, text in (
        ("router/coverage", 1.0, "of the rows that need a record were replayed"),
        ("router/mismatched_ids", 0.0, "recorded ids were not used by the router"),
    ):
        steps_, values = run.series(key)
        wrong = values[values != expected]
        if len(wrong):
            worst = wrong[abs(wrong - expected).argmax()]
            yield Finding("bad", f"{key} is {worst:g} in the worst of {len(wrong)} steps: {worst:g} {text}.")


def chosen(reports: Sequence[TokenReport]) -> list[TokenReport]:
    """Return the reports that the page opens: the newest, then those with the largest difference; newest first."""

    def largest(report: TokenReport) -> float:
        tokens = report.worst.tokens
        return max((abs(a - b) for a, b in zip(tokens.train, tokens.rollout, strict=True)), default=0.0)

    newest = list(reports[-_NEWEST:])
    rest = sorted(reports[:-_NEWEST], key=largest, reverse=True)[:_LARGEST]
    return sorted(newest + rest, key=lambda report: report.step, reverse=True)


def _step(report: TokenReport) -> dict[str, Any]:
    worst = report.worst
    tokens = _tokens(worst.tokens)
    sequences = [
        {
            "group": one.group,
            "member": one.member,
            "reward": one.reward,
            "finish": one.finish,
            "prompt": one.prompt,
            "length": one.length,
            "first": one.first,
            "tokens": (found := _tokens(one.tokens)),
            "largest": max((abs(token.d) for token in found), default=0.0),
        }
        for one in report.sequences
    ]
    return {
        "step": report.step,
        "total": report.total,
        "has_native": worst.tokens.native is not None,
        "largest": max((abs(token.d) for token in tokens), default=0.0),
        "worst": [
            {
                "group": worst.groups[i],
                "member": worst.members[i],
                "position": worst.positions[i],
                "before": worst.before[i].translate(_SYMBOLS),
                "after": worst.after[i].translate(_SYMBOLS),
                "token": tokens[i],
            }
            for i in range(len(worst))
        ],
        "sequences": sequences,
    }


def _tokens(columns: TokenColumns) -> list[Token]:
    native, native_layers = columns.native, columns.native_layers
    return [
        Token(
            text=columns.texts[i].translate(_SYMBOLS),
            id=columns.ids[i],
            rollout=columns.rollout[i],
            train=columns.train[i],
            d=columns.train[i] - columns.rollout[i],
            native_d=None if native is None else native[i] - columns.rollout[i],
            layers=", ".join(map(str, columns.layers[i])),
            native_layers="" if native_layers is None else ", ".join(map(str, native_layers[i])),
            shade=min(1.0, abs(columns.train[i] - columns.rollout[i]) / _FULL_SHADE),
        )
        for i in range(len(columns.ids))
    ]
