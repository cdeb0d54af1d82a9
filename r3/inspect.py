"""What is in this file or run? `python -m r3.inspect FILE|RUN [--json] [--limit N]`.

Reads files of routing records (`docs/record.md`) and run directories; starts nothing and needs no more than numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.errors import ConfigError, R3Error, RoutingError
from r3.portrait import FileFacts, RecordFacts, count_of, describe, read_file

_RUN_FILES = ("config.resolved.yaml", "metrics.jsonl", "events.jsonl", "status.json", "routing")
# Of the last step: what tells whether replay was sound.
_SHOWN = ("mismatch/k3", "router/coverage", "router/mismatched_ids", "router/dropped_samples", "rollout/reward_mean")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run directory holds. `status`: of `status.json`; `steps`: rows of `metrics.jsonl`, of which `last` is one.

    `events`: how many of each kind. `problems`: what cannot be read.
    """

    path: Path
    status: dict[str, Any]
    steps: int
    last: dict[str, Any]
    events: dict[str, int]
    files: tuple[FileFacts, ...]
    problems: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the facts; return 0 when all is well, 3 when something is broken, 2 for a path that is neither."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options) if options.path.is_dir() else _file(options)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _file(options: argparse.Namespace) -> int:
    if not options.path.is_file():
        raise ConfigError(f"{options.path} does not exist; name a file of routing records or a run directory")
    facts = read_file(options.path)
    if options.json:
        _print(json.dumps(_file_object(facts), indent=1))
    else:
        _print("\n".join(describe(facts, options.limit)))
    return 0 if facts.good else RoutingError.exit_code


def _run(options: argparse.Namespace) -> int:
    facts = read_run(options.path)
    if options.json:
        _print(json.dumps(_run_object(facts), indent=1))
    else:
        _print("\n".join(_describe_run(facts, options.limit)))
    return RoutingError.exit_code if facts.problems else 0


def read_run(path: Path) -> RunFacts:
    """Read what a run left in its directory, also while it still runs; raise `ConfigError` when it is none."""
    if not any((path / name).exists() for name in _RUN_FILES):
        raise ConfigError(f"{path} is no run directory: it holds none of {', '.join(_RUN_FILES)}")
    problems: list[str] = []
    status = _json_lines(path / "status.json", problems, whole=True)
    steps, events = (_json_lines(path / name, problems) for name in ("metrics.jsonl", "events.jsonl"))
    files = []
    for file in sorted((path / "routing").glob("*.r3")):
        try:
            files.append(read_file(file))
            problems += [f"{file}: {problem}" for problem in files[-1].problems()]
        except RoutingError as error:
            problems.append(str(error))
    return RunFacts(
        path=path,
        status=status[0] if status else {},
        steps=len(steps),
        last=steps[-1] if steps else {},
        events=dict(Counter(str(row.get("event")) for row in events)),
        files=tuple(files),
        problems=tuple(problems),
    )


def _json_lines(path: Path, problems: list[str], *, whole: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line or one in all; the last line of a run that still writes may be cut."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    parts = [text] if whole else text.splitlines(keepends=True)
    found = []
    for number, part in enumerate(parts, start=1):
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            if whole or part.endswith("\n"):
                problems.append(f"{path} line {number} is not JSON: {error}")
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            problems.append(f"{path} line {number} is no JSON object")
    return found


def _describe_run(facts: RunFacts, limit: int) -> Iterator[str]:
    state = ", ".join(f"{key} {facts.status[key]}" for key in ("step", "exit_code", "error") if key in facts.status)
    yield f"{facts.path}: {facts.status.get('state', 'no status.json')}" + (f" ({state})" if state else "")
    yield from (f"BROKEN {problem}" for problem in facts.problems)
    shown = ", ".join(f"{key} {facts.last[key]:.4g}" for key in _SHOWN if isinstance(facts.last.get(key), int | float))
    yield f"steps       {facts.steps}" + (f"; step {facts.last.get('step')}: {shown}" if shown else "")
    events = ", ".join(f"{kind} {count}" for kind, count in sorted(facts.events.items()))
    yield f"events      {events or 'none'}"
    rows = sum(record.rows for file in facts.files for record in file.records)
    yield f"routing     {count_of(len(facts.files), 'file')}, {count_of(rows, 'row')}" + (
        "" if facts.files else " (routing.save_every is 0)"
    )
    if facts.files:
        yield ""
        yield from describe(facts.files[-1], limit)


def _run_object(facts: RunFacts) -> dict[str, Any]:
    return {
        "path": str(facts.path),
        "good": not facts.problems,
        "problems": list(facts.problems),
        "status": facts.status,
        "steps": facts.steps,
        "last": facts.last,
        "events": facts.events,
        "files": [_file_object(file) for file in facts.files],
    }


def _file_object(facts: FileFacts) -> dict[str, Any]:
    return {
        "path": str(facts.path),
        "good": facts.good,
        "problems": facts.problems(),
        "bytes": facts.nbytes,
        "records": [_record_object(record) for record in facts.records],
        "load": [
            {"layer": one.layer, "max_over_mean": one.max_over_mean, "dead": list(one.dead), "chosen": list(one.chosen)}
            for one in facts.loads
        ],
        "records_of_another_model": facts.others,
    }


def _record_object(record: RecordFacts) -> dict[str, Any]:
    return {
        "index": record.index,
        "offset": record.offset,
        "bytes": record.nbytes,
        "rows": record.rows,
        "tokens": record.tokens,
        "layers": list(record.layers),
        "num_experts": record.num_experts,
        "top_k": record.top_k,
        "dtype": record.dtype,
        "engine": record.engine,
        "provenance": record.provenance,
        "spans": [span._asdict() for span in record.spans],
        "longest_run": record.longest_run._asdict() if record.longest_run else None,
        "faults": [fault._asdict() for fault in record.faults],
    }


def _print(text: str) -> None:
    """Print, also to a reader such as `head` that leaves before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3.inspect",
        usage="python -m r3.inspect FILE|RUN [--json] [--limit N]",
        description="Show what a file of routing records or a run directory holds, and what is wrong with it.",
        epilog="exit codes: 0 all is well, 2 usage, 3 something is broken",
    )
    parser.add_argument("path", type=Path, metavar="FILE|RUN", help="file of records (.r3) or run directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="records that are drawn (default 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
