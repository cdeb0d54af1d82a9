#!/usr/bin/env python
"""Feed broken input to every decoder of routing: nothing but `RoutingError` may come out, and no memory be taken.

    python scripts/fuzz_record.py --inputs 1000000 --seed 0      mutation of valid inputs, repeatable
    python scripts/fuzz_record.py --inputs 1000000 --atheris     guided by coverage (pip install atheris)
    python scripts/fuzz_record.py --replay crash-record-123      one input again

Half of the inputs have their checksums or base64 made right again after the mutation, so that what lies behind these is
reached. Memory: the process may not grow by more than --memory MiB of address space over all inputs; an allocation by a
hostile size field fails there, and counts as a finding. The first input that raises anything but `RoutingError` is
written to a file and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import os
import random
import re
import resource
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from r3 import record
from r3.errors import RoutingError
from r3.rollout.provenance import KEY, Weights, pack, with_provenance
from r3.rollout.wire import decode_lightllm, decode_sglang, decode_vllm
from r3.routing import RoutingTrace
from r3.types import ModelSpec

MODEL = ModelSpec("qwen3_moe", 6, (1, 2, 4, 5), 16, 4, 64, 100)  # layers 0 and 3 are dense
TOKENS = np.arange(10, 22, dtype=np.int32)
LARGEST = 4096
NUMBERS = (0, 1, 2, 7, 8, 79, 80, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1,
           2**63, 2**64 - 1)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder: `seeds`, valid inputs; `decode`; `repair`: make a mutated input pass the outermost checks again."""

    seeds: Sequence[bytes]
    decode: Callable[[bytes], object]
    repair: Callable[[bytes], bytes]


def rows(count: int, layers: int, k: int, experts: int, seed: int = 0) -> np.ndarray:
    """Return `[count, layers, k]` int64 with distinct ids."""
    return np.random.default_rng(seed).random((count, layers, experts)).argsort(axis=2)[:, :, :k]


def record_seeds() -> list[bytes]:
    """Records of both widths, with and without tokens, with a gap, without rows, and two in one file."""
    made = []
    for experts, layers, begin, count in ((16, 4, 0, 11), (300, 2, 3, 6), (256, 1, 0, 0), (2, 3, 0, 11)):
        trace = RoutingTrace.record(
            rows(count, layers, 2, experts), TOKENS, layers=range(1, layers + 1), num_experts=experts,
            weight_version=5, engine="sglang 0.5.23", begin=begin,
        )  # fmt: skip
        made += [trace.to_bytes(), trace.to_bytes(TOKENS)]
    gap = RoutingTrace.from_bytes(made[1])
    gap = gap.clip(0, 3, TOKENS).concatenate(gap.clip(5, 9, TOKENS), TOKENS)
    return [*made, gap.to_bytes(TOKENS), made[0] + made[1]]


def seal(data: bytes) -> bytes:
    """Make length and checksums of a record agree with its bytes, as far as its size fields make sense."""
    made = bytearray(data)
    if len(made) < 80:
        return data
    struct.pack_into("<Q", made, 16, len(made))
    (number, layers, k, _, width, _, _, spans, engine, tokens) = struct.unpack_from("<QIIIBBHIIQ", made, 24)
    begins = [80]
    for size in (4 * layers, 24 * spans, engine, 4 * tokens):
        begins.append(begins[-1] + -(-size // 8) * 8)
    end = begins[4] + number * layers * k * width
    if end <= len(made):
        rows_crc = zlib.crc32(made[begins[4] : end])
        struct.pack_into("<II", made, 64, zlib.crc32(made[begins[3] : begins[3] + 4 * tokens], rows_crc), rows_crc)
    if begins[3] <= len(made):
        struct.pack_into("<I", made, 76, zlib.crc32(made[80 : begins[3]], zlib.crc32(made[:76])))
    return bytes(made)


def read_record(data: bytes) -> None:
    """Read one record, several, and what is wrong with each; the last must not raise."""
    for frame in record.split(data):
        record.faults(frame.data)
    for stored in record.scan(data):
        assert record.encode(stored.trace, stored.tokens) in data, "a record that was read is not written as it was"


def sglang_seeds() -> list[bytes]:
    """`meta_info.routed_experts` of SGLang: base64 of int32 rows of all layers, zeros in the dense ones."""
    wide = rows(len(TOKENS) - 1, MODEL.num_layers, MODEL.top_k, MODEL.num_experts)
    wide[:, [0, 3]] = 0
    return [base64.b64encode(wide.astype("<i4").tobytes()), b""]


def read_sglang(data: bytes) -> None:
    """Decode as bytes, and as the text that JSON would have made of them."""
    decode_sglang(data, TOKENS, MODEL, request=0, weight_version=1, engine="fuzz")
    decode_sglang(data.decode("latin-1"), TOKENS, MODEL, request=0, weight_version=1, engine="fuzz")


def as_base64(data: bytes) -> bytes:
    """Mutate below the base64: decode leniently, and encode again, at the right length for most of the inputs."""
    letters = re.sub(rb"[^A-Za-z0-9+/]", b"", data)
    raw = base64.b64decode(letters[: len(letters) // 4 * 4])
    needed = 4 * (len(TOKENS) - 1) * MODEL.num_layers * MODEL.top_k
    return base64.b64encode(raw[:needed].ljust(needed, b"\0") if len(letters) % 8 else raw)


def lightllm_seeds() -> list[bytes]:
    """JSON of LightLLM's `routed_experts`, in its layouts."""
    wide = rows(len(TOKENS) - 1, len(MODEL.moe_layers), MODEL.top_k, MODEL.num_experts)
    made = []
    for dtype, array in (("int8", wide.transpose(1, 0, 2)), ("int32", wide.transpose(1, 0, 2)), ("uint8", wide)):
        data = base64.b64encode(np.ascontiguousarray(array, dtype=np.dtype(dtype)).tobytes()).decode()
        made.append(json.dumps({"shape": list(array.shape), "dtype": dtype, "data": data}).encode())
    return made


def read_lightllm(data: bytes) -> None:
    """Decode what JSON makes of the bytes; what is no JSON never reaches the decoder."""
    decode_lightllm(as_json(data), TOKENS, MODEL, request=0, weight_version=1, engine="fuzz")


def with_base64(data: bytes) -> bytes:
    """Make the base64 inside a mutated JSON text whole again, where the text still is JSON."""
    value = as_json(data)
    if isinstance(value, dict) and isinstance(value.get("data"), str):
        value["data"] = as_base64(value["data"].encode("utf-8", "replace")).decode()
        return json.dumps(value).encode()
    return data


def vllm_seeds() -> list[bytes]:
    """vLLM's base64 of a `.npy` file, of both widths, and from a later row on."""
    wide = rows(len(TOKENS) - 1, MODEL.num_layers, MODEL.top_k, MODEL.num_experts)
    wide[:, [0, 3]] = 0
    made = []
    for dtype in ("u1", "<u2", "<i4"):
        file = io.BytesIO()
        np.save(file, wide.astype(dtype))
        made.append(base64.b64encode(file.getvalue()))
    return made


def read_vllm(data: bytes) -> None:
    """Decode as bytes, and as text."""
    decode_vllm(data, TOKENS, MODEL, request=0, weight_version=1, engine="fuzz")
    decode_vllm(data.decode("latin-1"), TOKENS, MODEL, request=0, weight_version=1, engine="fuzz")


def below_base64(data: bytes) -> bytes:
    """Mutate below the base64: decode leniently, and encode again."""
    letters = re.sub(rb"[^A-Za-z0-9+/]", b"", data)
    return base64.b64encode(base64.b64decode(letters[: len(letters) // 4 * 4]))


def stamp_seeds() -> list[bytes]:
    """JSON of the stamps that the SGLang plugin adds to an answer."""
    passes, weights = np.arange(1, len(TOKENS), dtype=np.int32), (Weights(1, "0", 0), Weights(6, "1", 1))
    stamps = pack(passes, passes[-4:], weights)
    return [json.dumps(stamps).encode(), json.dumps([None, None, None, stamps]).encode()]


def read_stamps(data: bytes) -> None:
    """Unpack what JSON makes of the bytes, and apply it to a record of as many rows."""
    with_provenance(STAMPED, {KEY: as_json(data)}, num_tokens=len(TOKENS), prompt_len=len(TOKENS) - 4)


def as_json(data: bytes) -> Any:
    """Return the JSON value of the bytes; a text where they are none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("latin-1")


def same(data: bytes) -> bytes:
    """Repair nothing."""
    return data


STAMPED = RoutingTrace.record(
    rows(len(TOKENS) - 1, 4, 2, 16), TOKENS, layers=range(4), num_experts=16, weight_version=1, engine="fuzz"
)
# A new decoder of an engine's payload is added here.
TARGETS = {
    "record": Target(record_seeds(), read_record, seal),
    "sglang": Target(sglang_seeds(), read_sglang, as_base64),
    "lightllm": Target(lightllm_seeds(), read_lightllm, with_base64),
    "vllm": Target(vllm_seeds(), read_vllm, below_base64),
    "stamps": Target(stamp_seeds(), read_stamps, same),
}


def mutate(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a valid input in one to six places."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data)) if data else 0
        kind = draw.randrange(9)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[at] = draw.randrange(256)
        elif kind in (2, 3, 4) and data:
            # Most fields are in the header; half of these go there.
            width = draw.choice((1, 2, 4, 8))
            place = (at if draw.random() < 0.5 else draw.randrange(min(len(data), 136))) // width * width
            value = draw.choice(NUMBERS) % 2 ** (8 * width)
            data[place : place + width] = value.to_bytes(width, "little")[: len(data) - place]
        elif kind == 5:
            data[at:at] = draw.randbytes(draw.randint(1, 16))
        elif kind == 6 and data:
            del data[at : at + draw.randint(1, 64)]
        elif kind == 7:
            other = draw.choice(seeds)
            cut = draw.randrange(len(other) + 1)
            data[at:] = other[cut:]
        elif kind == 8 and data:
            data[at:at] = data[at : at + draw.randint(1, 64)]
    return bytes(data[:LARGEST])


def try_one(name: str, data: bytes) -> str:
    """Decode an input and return `accepted`, or `refused` with the kind of refusal; all other errors go through."""
    try:
        TARGETS[name].decode(data)
    except RoutingError as error:
        # Without its values, what an error says tells which check it was.
        words = str(error).removeprefix("request 0: ").partition(";")[0]
        return "refused: " + re.sub(r"\d[\d.,]*|'[^']*'|\[.*?\]", "#", words)[:50]
    return "accepted"


def limit_memory(mebibytes: int) -> None:
    """Let the process grow by this much address space and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(inputs: int, seed: int, names: Sequence[str], memory: int) -> int:
    """Try `inputs` mutations, shared among the targets; return the exit code."""
    limit_memory(memory)
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(inputs):
        # A generator of its own for each input, so that any can be made again without those before it.
        draw = random.Random(seed * 2**40 + number)
        name = names[number % len(names)]
        target = TARGETS[name]
        data = mutate(draw, target.seeds)
        if draw.random() < 0.5:
            data = target.repair(data)
        try:
            outcomes[f"{name} {try_one(name, data)}"] += 1
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is what is looked for
            report(name, number, data, error)
            return 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{inputs:,} inputs, seed {seed}, {time.perf_counter() - begin:.0f} s "
          f"({after.ru_utime - before.ru_utime:.0f} s CPU): nothing but RoutingError; resident memory grew by "
          f"{(after.ru_maxrss - before.ru_maxrss) / 1024:.1f} MiB, limit {memory} MiB of address space")  # fmt: skip
    for name in names:
        kinds = {kind: count for kind, count in outcomes.items() if kind.startswith(f"{name} refused")}
        print(f"  {name:<9} accepted {outcomes[f'{name} accepted']:>8,}, refused {sum(kinds.values()):>8,} "
              f"for {len(kinds)} kinds of reason")  # fmt: skip
    return 0


def report(name: str, number: int, data: bytes, error: BaseException) -> None:
    """Write down an input that found something."""
    path = Path(f"crash-{name}-{number}")
    path.write_bytes(data)
    traceback.print_exception(error)
    print(f"input {number} of target {name} raised {type(error).__name__}; it is in {path}", file=sys.stderr)


def run_atheris(inputs: int, seed: int, names: Sequence[str]) -> None:
    """Let libFuzzer look for inputs that reach new code; the first byte chooses target and repair. Does not return."""
    import tempfile

    import atheris

    for function in (record.decode, record.scan, record.split, record.faults, decode_sglang):
        atheris.instrument_func(function)
    for module in (
        "r3.record",
        "r3.routing",
        "r3.structure",
        "r3.rollout.wire.common",
        "r3.rollout.wire.sglang",
        "r3.rollout.wire.lightllm",
        "r3.rollout.wire.vllm",
        "r3.rollout.provenance",
    ):
        for value in list(vars(sys.modules[module]).values()):
            if callable(value) and getattr(value, "__module__", None) == module and hasattr(value, "__code__"):
                atheris.instrument_func(value)

    def one(data: bytes) -> None:
        if data:
            name = names[data[0] // 2 % len(names)]
            rest = data[1:]
            try_one(name, TARGETS[name].repair(rest) if data[0] % 2 else rest)

    corpus = Path(tempfile.mkdtemp(prefix="fuzz-record-"))
    for i, name in enumerate(names):
        for j, data in enumerate(TARGETS[name].seeds):
            for repair in (0, 1):
                (corpus / f"{name}-{j}-{repair}").write_bytes(bytes([2 * i + repair]) + data)
    flags = [
        f"-runs={inputs}",
        f"-seed={seed + 1}",
        f"-max_len={LARGEST}",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--memory", type=int, default=64, metavar="MIB", help="address space to grow by")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="decode one input, named crash-TARGET-NUMBER")
    options = parser.parse_args()
    if options.replay:
        name = options.replay.name.split("-")[1]
        print(try_one(name, options.replay.read_bytes()).partition(":")[0])
        return 0
    if options.atheris:
        run_atheris(options.inputs, options.seed, options.target)
    return run(options.inputs, options.seed, options.target, options.memory)


if __name__ == "__main__":
    sys.exit(main())
