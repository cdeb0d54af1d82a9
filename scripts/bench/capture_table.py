"""Loads, runs and the rows of the table of `scripts/bench/capture.py`; numpy alone, no engine."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WAYS = ("off", "on", "stock", "ours")
RETURNING = ("stock", "ours")
# Over four rounds every way has every place once, and every other way in front of it once.
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))
_RESAMPLES = 500
# Two-sided 95 % quantile of Student's t by number of pairs.
STUDENT = dict(
    enumerate(
        (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145), start=2
    )
)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are sent at once; `cached`: their prompts are in the radix cache by then. `speed`: output tokens/s
    that an H200 is known to make of it, for the plan alone.
    """

    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    cached: bool = False
    speed: float = 1000.0

    @property
    def tokens(self) -> int:
        return sum(self.outputs)

    @property
    def is_crowd(self) -> bool:
        """Is it more than one request?"""
        return len(self.prompts) > 1

    def short(self) -> Load:
        """The load of a warm-up: a part of the requests, the first passes of each."""
        part = slice(64)
        outputs = tuple(min(n, 8) for n in self.outputs[part])
        return Load(f"{self.name} (warm-up)", self.prompts[part], outputs, self.cached)


@dataclass(slots=True)
class Run:
    """One run of a load in one way. Seconds: `seconds` from the moment when all its requests waited in the scheduler to
    the last answer, then `wait` until the rows of all answers were written, `decode` until they are arrays, `checks`
    (and stamps), `pack` into a batch and its copy; `from_call` is `seconds` with the sending of the requests.

    `prefills`, `decodes`: passes over prompts and passes of decoding. `parts`: what `seconds` is the sum of, until the
    first result, from each result of a pass to the next, and from the last one to the last answer. `gaps`: those parts
    that lie between passes of decoding, weighted by requests; `pinned`: bytes of pinned memory that each rank held at
    most, which tells of this run alone where the rank began without.
    """

    way: str
    seconds: float
    wait: float = 0.0
    decode: float = 0.0
    checks: float = 0.0
    pack: float = 0.0
    from_call: float = 0.0
    prefills: int = 0
    decodes: int = 0
    parts: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    pinned: tuple[int, ...] = ()

    @property
    def ready(self) -> float:
        """From the queued prompts to the batch that Ray takes."""
        return self.seconds + self.wait + self.decode + self.checks + self.pack

    @property
    def p50(self) -> float:
        """Median of a token's wait for its successor, in ms; 0 without a pair of passes."""
        return self._waited(0.5)

    @property
    def p99(self) -> float:
        """99th percentile of the same."""
        return self._waited(0.99)

    def _waited(self, share: float) -> float:
        if not self.gaps:
            return 0.0
        gaps, weights = np.array(self.gaps).T
        order = np.argsort(gaps)
        at = np.searchsorted(np.cumsum(weights[order]), share * weights.sum())
        return 1e3 * float(gaps[order][min(int(at), len(gaps) - 1)])


Round = Mapping[str, Run]
Row = dict[str, Any]


def order_of(number: int, ways: Sequence[str] = WAYS) -> list[str]:
    """Return the order of a round's ways."""
    return [WAYS[i] for i in ORDERS[number % len(ORDERS)] if WAYS[i] in ways]


def interval(ratios: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return the geometric mean of paired ratios and its 95 % interval; none from fewer than two pairs."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), ()
    half = STUDENT.get(len(logs), 2.145) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def row(name: str, value: float, unit: str, baseline: str = "", ratio: float = 1.0, ci95: Sequence[float] = ()) -> Row:
    """Return a row of the table."""
    shown = [round(bound, 6) for bound in ci95]
    return {"name": name, "value": round(value, 6), "unit": unit, "baseline": baseline, "ratio": round(ratio, 6),
            "ci95": shown}  # fmt: skip


def rows_of(load: Load, rounds: Sequence[Round]) -> list[Row]:
    """Return the table's rows of one load; a pair is two runs of one round."""
    rows = []
    for way in WAYS:
        runs = [found[way] for found in rounds if way in found]
        if not runs:
            continue
        name = f"{load.name}, {way}"
        speed = statistics.median(load.tokens / run.seconds for run in runs)
        rows += _against(name, speed, "tokens/s", rounds, way, lambda run: 1 / run.seconds)
        if all(run.gaps for run in runs):
            for key, what in (("p50", "median"), ("p99", "p99")):
                waited = attrgetter(key)
                middle = statistics.median(map(waited, runs))
                rows += _against(f"{name}, {what} between tokens", middle, "ms", rounds, way, waited)
        for key, what in (("prefills", "passes over prompts"), ("decodes", "passes of decoding")):
            rows.append(row(f"{name}, {what}", statistics.median(map(attrgetter(key), runs)), "passes"))
        if way in RETURNING:
            rows += _client_rows(name, rounds, way, runs)
    alike = sum(len(passes_of(found)) == 1 for found in rounds)
    return [
        *rows,
        *_of_median_passes(load, rounds),
        row(f"{load.name}, pairs", min(_pairs(rounds).values(), default=0), "pairs"),
        row(f"{load.name}, pairs in which every way made the same passes", alike, "count"),
    ]


def pinned_rows(load: Load, runs: Sequence[Run]) -> list[Row]:
    """Return the rows of what each rank pinned beside its slot rows in the warm-up of a load."""
    return [
        row(f"{load.name}, {run.way}, pinned beside the slot rows, rank {rank}", size, "bytes")
        for run in runs
        for rank, size in enumerate(run.pinned)
    ]


def passes_of(runs: Round) -> dict[tuple[int, int], list[str]]:
    """Return which ways of a round made how many passes over prompts and of decoding; one entry if all are alike."""
    found: dict[tuple[int, int], list[str]] = {}
    for way, run in runs.items():
        found.setdefault((run.prefills, run.decodes), []).append(way)
    return found


def line_of(load: Load, number: int, runs: Round, longest: float) -> str:
    """Return what is printed of a round; whether its ways made the same passes decides what their ratio means."""
    speeds = ", ".join(f"{way} {load.tokens / run.seconds:.0f}" for way, run in runs.items())
    passes = passes_of(runs)
    counts = [f"{prefills} + {decodes} passes" for prefills, decodes in passes]
    shown = counts[0]
    if len(passes) > 1:
        each = (f"{count} ({', '.join(ways)})" for count, ways in zip(counts, passes.values(), strict=True))
        shown = f"PASSES DIFFER: {'; '.join(each)}"
    return f"{load.name}, pair {number}: {speeds} tokens/s, {shown}, {longest:.0f} s a round"


def _of_median_passes(load: Load, rounds: Sequence[Round]) -> list[Row]:
    """Return the rows of runs in which every pass takes its median over the rounds; none where passes differ.

    What a pass over prompts takes depends on how fast the host launches it, which changes from pass to pass by more
    than the ways differ. The interval draws rounds anew, for all ways the same ones.
    """
    complete = [found for found in rounds if len(found) == len(rounds[0])]
    if len(complete) < 3 or len({len(run.parts) for found in complete for run in found.values()} | {0}) != 2:
        return []
    ways = [way for way in WAYS if way in complete[0]]
    parts = {way: np.array([found[way].parts for found in complete]) for way in ways}
    draws = np.random.default_rng(0).integers(0, len(complete), (_RESAMPLES, len(complete)))
    drawn = {way: np.array([_median_run(parts[way][draw]) for draw in draws]) for way in ways}
    whole = {way: _median_run(parts[way]) for way in ways}
    return [
        row(f"{load.name}, {way}, of median passes", load.tokens / whole[way], "tokens/s", other,
            whole[other] / whole[way], np.percentile(drawn[other] / drawn[way], (2.5, 97.5)))
        for way in ways
        for other in ways
        if other != way
    ]  # fmt: skip


def _median_run(parts: NDArray[np.floating]) -> float:
    """Return the seconds of a run whose parts are the medians of `parts` `[rounds, parts]`."""
    return float(np.median(parts, axis=0).sum())


def _client_rows(name: str, rounds: Sequence[Round], way: str, runs: Sequence[Run]) -> list[Row]:
    middle = statistics.median(run.ready for run in runs)
    rows = _against(f"{name}, prompt to packed batch", middle, "s", rounds, way, lambda run: run.ready, RETURNING)
    names = {"wait": "rows written after the last answer", "decode": "client decode without checks",
             "checks": "client checks and stamps", "pack": "client packs the batch"}  # fmt: skip
    for key, what in names.items():
        spent = [getattr(run, key) for run in runs]
        # A share may be nothing at all, so its mean is not geometric.
        share = [part / run.seconds for part, run in zip(spent, runs, strict=True)]
        mean = statistics.mean(share)
        half = STUDENT.get(len(share), 2.145) * statistics.stdev(share) / math.sqrt(len(share)) if share[1:] else 0.0
        bounds = (mean - half, mean + half) if share[1:] else ()
        rows.append(row(f"{name}, {what}", statistics.median(spent), "s", "its generation", mean, bounds))
    return rows


def _against(
    name: str, value: float, unit: str, rounds: Sequence[Round], way: str, measure: Any, others: Sequence[str] = WAYS
) -> list[Row]:
    rows = []
    for other in others:
        both = [(found[way], found[other]) for found in rounds if way in found and other in found]
        pairs = [(measure(own), measure(its)) for own, its in both]
        if other != way and pairs and all(its for _, its in pairs):
            rows.append(row(name, value, unit, other, *interval([own / its for own, its in pairs])))
    return rows or [row(name, value, unit)]


def _pairs(rounds: Sequence[Round]) -> dict[str, int]:
    """How many rounds hold each way that any holds."""
    return {way: sum(way in found for found in rounds) for way in WAYS if any(way in found for found in rounds)}


def raw_of(rounds: Sequence[Round]) -> list[dict[str, dict[str, Any]]]:
    """Return the numbers of every run.

    `p50` and `p99` in ms, `prefills` and `decodes` in passes, the others in s.
    """
    names = ("seconds", "from_call", "prefills", "decodes", "p50", "p99", "wait", "decode", "checks", "pack")
    return [
        {way: {name: round(getattr(run, name), 6) for name in names} for way, run in found.items()} for found in rounds
    ]


def save(target: Path, earlier: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> None:
    """Replace the file at once, so that whatever ends the run leaves the last complete one."""
    target.parent.mkdir(exist_ok=True, parents=True)
    part = target.with_suffix(".part")
    part.write_text(_compact([*earlier, table]))
    os.replace(part, target)


def earlier_runs(target: Path) -> list[Mapping[str, Any]]:
    """Return the runs that a file holds already."""
    found: list[Mapping[str, Any]] = json.loads(target.read_text())["runs"] if target.exists() else []
    return found


def _compact(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line per row and per run: people read the differences of this file."""
    blocks = []
    for run in runs:
        parts = [
            f'"{key}": {_compact_raw(value) if key == "raw" else json.dumps(value)}'
            for key, value in run.items()
            if key != "rows"
        ]
        rows = ",\n".join(f"  {json.dumps(found)}" for found in run["rows"])
        blocks.append("{" + ",\n ".join([*parts, f'"rows": [\n{rows}\n ]']) + "}")
    return '{"runs": [\n' + ",\n".join(blocks) + "\n]}\n"


def _compact_raw(raw: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    loads = []
    for name, rounds in raw.items():
        shown = ",\n".join(
            "  {" + ",\n   ".join(f'"{way}": {json.dumps(values)}' for way, values in found.items()) + "}"
            for found in rounds
        )
        loads.append(f"{json.dumps(name)}: [\n{shown}]")
    return "{" + ",\n  ".join(loads) + "}"
