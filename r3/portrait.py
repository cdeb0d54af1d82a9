"""What a file of routing records holds, as facts and as text: spans and versions of records, load of experts."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r3.errors import RoutingError
from r3.record import Fault, Frame, Stored, faults, map_file, split
from r3.routing import Span
from r3.structure import Run, longest_run

_WIDTH = 64
# From no choice at all to the layer's most chosen expert.
_SHADES = " .:-=+*#%@"
_MARKS = string.ascii_lowercase + string.digits
# Identical neighbouring rows that are worth a line, though equal tokens may explain them.
_NOTABLE_RUN = 8
_Model = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """One stored record. `tokens`: ids stored with it, None without; `longest_run`: of identical neighbouring rows.

    `faults`: every check that failed. Of a record whose sizes do not fit its bytes, nothing else is known.
    """

    index: int
    offset: int
    nbytes: int
    rows: int = 0
    tokens: int | None = None
    layers: tuple[int, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    dtype: str = ""
    engine: str = ""
    provenance: str = ""
    spans: tuple[Span, ...] = ()
    longest_run: Run | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def model(self) -> _Model:
        """What records must share to be counted together."""
        return self.layers, self.num_experts, self.top_k

    def lines(self) -> Iterator[str]:
        """Yield what is wrong with the record, one line each."""
        for fault in self.faults:
            yield f"record {self.index} at byte {self.offset}, {fault.check}: {fault.message}"


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """How often each expert of one MoE layer was chosen, `chosen` `[num_experts]`, over all good records of a file."""

    layer: int
    chosen: tuple[int, ...]

    @property
    def max_over_mean(self) -> float:
        """Largest over mean load; 1 is balanced."""
        return max(self.chosen) * len(self.chosen) / max(sum(self.chosen), 1)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that were never chosen."""
        return tuple(expert for expert, count in enumerate(self.chosen) if not count)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file of records. `broken`: why it cannot be read further, None when it was read to its end.

    `loads`: over the good records of the first good record's model; `others`: records of another model.
    """

    path: Path
    nbytes: int
    records: tuple[RecordFacts, ...]
    loads: tuple[LayerLoad, ...]
    others: int
    broken: str | None

    @property
    def good(self) -> bool:
        """Tell whether nothing is wrong."""
        return self.broken is None and not any(record.faults for record in self.records)

    def problems(self) -> list[str]:
        """Return what is wrong, one line each."""
        found = [line for record in self.records for line in record.lines()]
        return [*found, *([self.broken] if self.broken else [])]


def read_file(path: Path) -> FileFacts:
    """Read every record of a file as far as that is possible; raise `RoutingError` when the file cannot be read."""
    data = map_file(path)
    records: list[RecordFacts] = []
    chosen: NDArray[np.int64] | None = None
    model: _Model | None = None
    others, broken = 0, None
    frames = split(data)
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            break
        except RoutingError as error:
            broken = str(error)
            break
        facts, stored = _examine(frame)
        records.append(facts)
        if facts.faults or stored is None:
            continue
        model = model or facts.model
        if facts.model == model:
            counts = _chosen(stored)
            chosen = counts if chosen is None else chosen + counts
        else:
            others += 1
    loads = () if chosen is None or model is None else tuple(
        LayerLoad(layer, tuple(row)) for layer, row in zip(model[0], chosen.tolist(), strict=True)
    )  # fmt: skip
    return FileFacts(path, len(data), tuple(records), loads, others, broken)


def _examine(frame: Frame) -> tuple[RecordFacts, Stored | None]:
    found, stored = faults(frame.data)
    if stored is None:
        return RecordFacts(frame.number, frame.offset, len(frame.data), faults=tuple(found)), None
    trace = stored.trace
    return RecordFacts(
        index=frame.number,
        offset=frame.offset,
        nbytes=len(frame.data),
        rows=trace.rows,
        tokens=None if stored.tokens is None else len(stored.tokens),
        layers=trace.layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        dtype=str(trace.experts.dtype),
        engine=trace.engine,
        provenance=trace.provenance,
        spans=trace.spans,
        longest_run=None if found else _run(stored),
        faults=tuple(found),
    ), stored


def _run(stored: Stored) -> Run:
    """Without stored tokens nothing is known about their changes, so none is counted."""
    trace = stored.trace
    inputs = np.zeros(trace.rows, np.int32) if stored.tokens is None else stored.tokens[trace.positions()]
    return longest_run(trace.experts, inputs)


def _chosen(stored: Stored) -> NDArray[np.int64]:
    """Return how often each expert was chosen, `[layers, num_experts]`; a layer at a time, since counting widens."""
    trace = stored.trace
    columns = (trace.experts[:, column].reshape(-1) for column in range(len(trace.layers)))
    return np.stack([np.bincount(column, minlength=trace.num_experts) for column in columns])


def describe(facts: FileFacts, limit: int) -> Iterator[str]:
    """Yield the lines that `python -m r3.inspect` prints of a file; at most `limit` records are drawn."""
    yield f"{facts.path}: {count_of(len(facts.records), 'record')}, {facts.nbytes:,} bytes"
    yield from (f"BROKEN {problem}" for problem in facts.problems())
    good = [record for record in facts.records if not record.faults]
    if not good:
        return
    yield from _summary(good)
    if facts.others:
        yield f"{count_of(facts.others, 'record')} of another model are not in the drawing of expert load"
    yield ""
    yield from draw_loads(facts.loads)
    yield ""
    for record in good[:limit]:
        yield from draw_rows(record)
    if len(good) > limit:
        yield f"... and {count_of(len(good) - limit, 'more record')} (--limit)"


def _summary(good: Sequence[RecordFacts]) -> Iterator[str]:
    first = good[0]
    yield (
        f"model       {len(first.layers)} MoE layers ({ranges(first.layers)}), top-{first.top_k} of "
        f"{first.num_experts} experts, {first.dtype}"
    )
    for name, values in (("engine", [r.engine for r in good]), ("provenance", [r.provenance for r in good])):
        counts = Counter(values)
        shown = ", ".join(_printable(value) + (f" ({count})" if len(counts) > 1 else "")
                          for value, count in counts.most_common(4))  # fmt: skip
        yield f"{name:<11} {shown}" + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")
    versions: Counter[int] = Counter()
    for record in good:
        for span in record.spans:
            versions[span.weight_version] += span.end - span.begin
    shown = ", ".join(f"{rows:,} of version {version}" for version, rows in sorted(versions.items())[:8])
    yield f"rows        {sum(record.rows for record in good):,}: {shown}" + (" ..." if len(versions) > 8 else "")
    stored = sum(record.tokens is not None for record in good)
    yield f"token ids   {'stored and verified' if stored == len(good) else f'in {stored} of {len(good)} records'}"


def draw_loads(loads: Sequence[LayerLoad]) -> Iterator[str]:
    """Yield one line per layer: a column per expert, or per group of neighbours, by its share of the largest."""
    if not loads:
        return
    experts = len(loads[0].chosen)
    group = -(-experts // _WIDTH)
    width = -(-experts // group)
    a_column = f"{group} experts a column, " if group > 1 else ""
    yield f"expert load ({a_column}blank = never chosen, {_SHADES[-1]} = most of its layer)"
    yield f"{'layer':>6} {'max/mean':>9} {'dead':>5}  0{experts - 1:>{width}}"
    for load in loads:
        padded = np.zeros(group * width, np.int64)
        padded[:experts] = load.chosen
        columns = padded.reshape(width, group).sum(axis=1)
        shades = np.ceil(columns / max(int(columns.max()), 1) * (len(_SHADES) - 1)).astype(int)
        drawn = "".join(_SHADES[shade] for shade in shades)
        yield f"{load.layer:>6} {load.max_over_mean:>9.2f} {len(load.dead):>5}  |{drawn}|"


def draw_rows(record: RecordFacts) -> Iterator[str]:
    """Yield which token positions of a record have a row, and under which weight version."""
    length = record.tokens if record.tokens is not None else record.spans[-1].end + 1 if record.spans else 0
    yield (
        f"record {record.index}: {count_of(record.rows, 'row')}, {length} tokens"
        + ("" if record.tokens is not None else " at least")
        + f", {_printable(record.provenance)}"
    )
    if length:
        versions = list(dict.fromkeys(span.weight_version for span in record.spans))
        marks = {version: _MARKS[i] if i < len(_MARKS) else "*" for i, version in enumerate(versions)}
        yield f"  positions 0 to {length - 1} |{_bar(record.spans, length, marks)}|"
        for span in record.spans[:8]:
            mark, version = marks[span.weight_version], span.weight_version
            yield f"    {mark} = version {version}: positions {span.begin} to {span.end - 1}"
        if len(record.spans) > 8:
            yield f"    ... and {len(record.spans) - 8} more spans"
    run = record.longest_run
    if run and run.rows >= _NOTABLE_RUN:
        yield (
            f"  rows {run.begin} to {run.begin + run.rows - 1} are identical in every layer; "
            + (f"their token changes {run.changes} times" if record.tokens is not None else "no tokens to compare with")
        )


def _bar(spans: Sequence[Span], length: int, marks: dict[int, str]) -> str:
    """`.` where positions have no row, `+` where a column holds several kinds of positions."""
    width = min(length, _WIDTH)
    edges = [column * length // width for column in range(width + 1)]
    bar = []
    for begin, end in pairwise(edges):
        inside = [(min(span.end, end) - max(span.begin, begin), marks[span.weight_version])
                  for span in spans if span.begin < end and span.end > begin]  # fmt: skip
        kinds = {mark for _, mark in inside} | ({"."} if sum(size for size, _ in inside) < end - begin else set())
        bar.append(kinds.pop() if len(kinds) == 1 else "+")
    return "".join(bar)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs drawn together: `0-3, 5, 7-8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _printable(text: str) -> str:
    """A name from a file must not steer the terminal."""
    return text.encode("unicode_escape").decode()


def count_of(number: int, noun: str) -> str:
    """Return `1 record`, `2 records`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
