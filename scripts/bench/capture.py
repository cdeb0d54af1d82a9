#!/usr/bin/env python
"""What capturing and returning routing costs a real engine; writes docs/benchmarks/capture.json.

    python scripts/bench/capture.py --seconds 900                # one GPU, Qwen3-30B-A3B's shape, dummy weights
    python scripts/bench/capture.py --cpu --seconds 60 --print   # the same code on the CPU engine, a tiny model

One engine start. Its ways of handling routing are switched between runs (`scripts/bench/capture_plugin.py`), so that
runs of all ways interleave on the same engine, weights, KV pool and clocks, in an order that rotates from round to
round: `off` (no capture), `on` (captured, not asked for), `stock` (SGLang's own return: int32, base64) and `ours`
(shared memory, with provenance stamps). A ratio is the geometric mean over rounds of (ours / other) in the same round,
with Student's 95 % interval of its logarithm. The radix cache is flushed before every run, log-probs are not asked for.

Then bit equality: `tee` feeds SGLang's own path and ours from the same passes and compares every id of every answer,
with groups of equal prompts, half of them cached before, and with requests retracted and aborted on the way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from scripts.bench.capture_tee import tee

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "benchmarks" / "capture.json"
WAYS = ("off", "on", "stock", "ours")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "attention_bias": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "eos_token_id": 151_645, "bos_token_id": 151_643,
}  # fmt: skip
GPU = {
    "load_format": "dummy", "dtype": "bfloat16", "attention_backend": "triton", "sampling_backend": "pytorch",
    "grammar_backend": "none", "moe_runner_backend": "triton", "disable_custom_all_reduce": True,
    "cuda_graph_backend_prefill": "disabled", "chunked_prefill_size": 8192,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are sent at once; `cached`: their prompts are in the radix cache by then."""

    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    share: float
    cached: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.outputs)


@dataclass(slots=True)
class Run:
    """One run of a load in one way; seconds, and the intervals between passes of decoding, weighted by requests."""

    way: str
    seconds: float
    ready: float
    decode: float
    gaps: list[tuple[float, int]] = field(default_factory=list)

    def p99(self) -> float:
        """99th percentile of a token's wait for its successor, in ms."""
        if not self.gaps:
            return 0.0
        gaps, weights = np.array(self.gaps).T
        order = np.argsort(gaps)
        at = np.searchsorted(np.cumsum(weights[order]), 0.99 * weights.sum())
        return 1e3 * float(gaps[order][min(int(at), len(gaps) - 1)])


class Bench:
    """The engine, its segment, and what one run does."""

    def __init__(self, options: argparse.Namespace) -> None:
        from r3.rollout.segment import Owner
        from r3.types import ModelSpec

        self.folder = Path(tempfile.mkdtemp())
        _announce_plugin(self.folder)
        model = _model(self.folder / "model", options)
        self.model = ModelSpec.from_directory(model)
        begin = time.perf_counter()
        self.engine = _start(model, options)
        self.start_s = time.perf_counter() - begin
        self.owner = Owner(options.shared_mib << 20, prefault=not options.cpu)
        self.way = ""
        self.has_off = not options.cpu  # there are no CUDA graphs to capture again without it
        self.random = np.random.default_rng(0)

    def switch(self, way: str) -> None:
        """Go over to a way; `on` is `ours` without the question."""
        rpc = "ours" if way == "on" else way
        if rpc != self.way:
            self.flush()
            self.engine.collective_rpc("r3_bench_way", way=rpc, path=self.owner.path)
            self.way = rpc

    def flush(self) -> None:
        """Empty the radix cache."""
        while not self.engine.flush_cache().success:
            time.sleep(0.01)

    def facts(self) -> dict[str, Any]:
        """Return what the scheduler noted since the last call."""
        path = self.folder / "facts.json"
        self.engine.collective_rpc("r3_bench_facts", path=str(path))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def requests(self, load: Load) -> dict[str, Any]:
        """Return random prompts and the output lengths."""
        top = self.model.vocab_size - 16
        return {
            "input_ids": [self.random.integers(2, top, n).tolist() for n in load.prompts],
            "sampling_params": [{"temperature": 1.0, "max_new_tokens": n, "ignore_eos": True} for n in load.outputs],
        }

    def run(self, load: Load, way: str, requests: dict[str, Any]) -> Run:
        """Answer the load once, and take its routing where it was asked for, as our adapter and a stock client do."""
        self.switch(way)
        self.flush()
        if load.cached:
            self.engine.generate(input_ids=requests["input_ids"], sampling_params={"max_new_tokens": 1})
        self.facts()
        begin = time.perf_counter()
        outputs = self.engine.generate(**requests, return_routed_experts=way in ("stock", "ours"))
        seconds = time.perf_counter() - begin
        decode = time.perf_counter()
        taken = [self.rows(output) for output in outputs] if way in ("stock", "ours") else []
        decode = time.perf_counter() - decode
        if taken:
            np.concatenate(taken)  # what becomes the Ray object
        ready = time.perf_counter() - begin
        passes = self.facts()["passes"]
        gaps = [(b[0] - a[0], b[1]) for a, b in itertools.pairwise(passes) if a[1] and b[1]]
        del taken
        self.owner.abandon()
        return Run(way, seconds, ready, decode, gaps)

    def rows(self, output: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Return an answer's rows `[rows, layers, k]` uint8, without a check."""
        import pybase64

        from r3.rollout.segment import as_rows
        from r3.rollout.sglang_plugin.tickets import ticket_of
        from r3.routing import expert_dtype

        layers, k, dtype = self.model.num_layers, self.model.top_k, expert_dtype(self.model.num_experts)
        found = ticket_of(output["meta_info"])
        if found is not None:
            ticket, _, rows = found
            return as_rows(self.owner.take(ticket, 60), dtype, (rows, layers, k))
        flat = np.frombuffer(pybase64.b64decode(output["meta_info"]["routed_experts"]), np.int32)
        return flat.reshape(-1, layers, k).astype(dtype)


def _announce_plugin(folder: Path) -> None:
    """Make the benchmark's plugin, and no other, visible to the engine's processes."""
    info = folder / "r3_bench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: r3-bench\nVersion: 0\n")
    points = "[sglang.srt.plugins]\nr3_bench = scripts.bench.capture_plugin:register\n"
    if os.environ.get("R3_BENCH_PLATFORM"):
        points += "[sglang.srt.platforms]\nr3_cpu = r3.rollout.sglang_cpu.platform:activate\n"
    (info / "entry_points.txt").write_text(points)
    sys.path.append(str(folder))  # a spawned process takes sys.path over
    os.environ["SGLANG_PLUGINS"] = "r3_bench,r3_cpu"


def _model(folder: Path, options: argparse.Namespace) -> Path:
    if options.cpu:
        from tests.tiny_model import write_model

        return write_model(folder, seed=0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | ({"num_hidden_layers": options.layers})))
    return folder


def _start(model: Path, options: argparse.Namespace) -> Any:
    common = {
        "model_path": str(model), "skip_tokenizer_init": True, "enable_return_routed_experts": True, "random_seed": 7,
        "max_running_requests": options.running, "weight_version": "0", "log_level": options.log_level,
    }  # fmt: skip
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from r3.rollout.engines.sglang_args import _cpu_kwargs
        from r3.rollout.sglang_cpu.engine import CpuEngine

        cpu = _cpu_kwargs() | {"disable_overlap_schedule": False, "dtype": "float32", "max_total_tokens": 16_384}
        return CpuEngine(**common, **cpu)
    import sglang

    size = {"mem_fraction_static": options.mem_fraction, "cuda_graph_max_bs_decode": options.running}
    return sglang.Engine(**common, **GPU, **size, tp_size=options.tp)


def race(bench: Bench, load: Load, until: float, rounds: int, warm: bool) -> list[dict[str, Run]]:
    """Run a load in every way, round by round, until the rounds or the time are over, but three rounds at least.

    `warm`: the first round compiles kernels and fills pools, and is thrown away.
    """
    found: list[dict[str, Run]] = []
    longest = 0.0
    for number in range(0 if warm else 1, rounds + 1):
        started = time.perf_counter()
        if len(found) > 2 and started + longest > until:
            break
        requests = bench.requests(load)
        order = [WAYS[(number + i) % len(WAYS)] for i in range(len(WAYS))]
        runs = {way: bench.run(load, way, requests) for way in order if way != "off" or bench.has_off}
        line = ", ".join(f"{way} {load.tokens / run.seconds:.0f}" for way, run in runs.items())
        print(f"{load.name} round {number}: {line} tokens/s", flush=True)
        if number:
            found.append(runs)
            longest = max(longest, time.perf_counter() - started)
    return found


def interval(ratios: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the geometric mean of paired ratios and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), (0.0, math.inf)
    half = STUDENT.get(len(logs), 2.0) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def rows_of(load: Load, rounds: Sequence[dict[str, Run]]) -> list[dict[str, Any]]:
    """Return the table's rows of one load."""
    rows = []
    ways = [way for way in WAYS if way in rounds[0]]
    for way in ways:
        speeds = [load.tokens / runs[way].seconds for runs in rounds]
        for baseline in [other for other in ("off", "on", "stock") if other in ways and other != way] or [way]:
            ratio, ci95 = interval([runs[baseline].seconds / runs[way].seconds for runs in rounds])
            rows.append(_row(f"{load.name}, {way}", statistics.median(speeds), "tokens/s", baseline, ratio, ci95))
        rows.append(_row(f"{load.name}, {way}, p99 between tokens",
                         statistics.median(runs[way].p99() for runs in rounds), "ms"))  # fmt: skip
        if way in ("stock", "ours"):
            for what in ("ready", "decode"):
                ratio, ci95 = interval([getattr(runs[way], what) / runs[way].seconds for runs in rounds])
                value = statistics.median(getattr(runs[way], what) for runs in rounds)
                name = "prompt to rows ready" if what == "ready" else "client decode without checks"
                rows.append(_row(f"{load.name}, {way}, {name}", value, "s", "its generation", ratio, ci95))
    rows.append(_row(f"{load.name}, rounds", len(rounds), "rounds"))
    return rows


def _row(
    name: str, value: float, unit: str, baseline: str = "", ratio: float = 1.0, ci95: Sequence[float] = ()
) -> dict[str, Any]:
    shown = [round(bound, 5) for bound in ci95]
    return {"name": name, "value": round(value, 4), "unit": unit, "baseline": baseline, "ratio": round(ratio, 5),
            "ci95": shown}  # fmt: skip


def equality(bench: Bench, load: Load, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare both paths for a while and return the table's rows."""
    found: list[tuple[str, dict[str, int]]] = []
    until, longest = time.perf_counter() + options.tee_seconds, 0.0
    for number in range(100):
        started = time.perf_counter()
        if number > 1 and started + longest > until:
            break
        way = "tee_raw" if number == 1 else "tee"
        bench.switch(way)
        bench.flush()
        found.append((way, tee(bench, bench.requests(load), options.group)))
        bench.owner.abandon()
        print(*found[-1], flush=True)
        longest = max(longest, time.perf_counter() - started)
    rows = []
    for way, what in (("tee", "SGLang's path fed copies"), ("tee_raw", "SGLang's path fed its buffer, as 0.5.17 does")):
        for key in found[0][1]:
            value = sum(counts[key] for name, counts in found if name == way)
            rows.append(_row(f"bit equality, {what}: {key}", value, "count"))
    return rows


def environment(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Return host, versions and commit."""
    import sglang
    import torch

    commit = os.environ.get("R3_COMMIT") or subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()  # fmt: skip
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "host": f"{gpu}, {os.cpu_count()} cores, {platform.machine()}", "commit": commit, "sglang": sglang.__version__,
        "torch": torch.__version__, "python": platform.python_version(), "model": asdict(bench.model),
        "engine": "dummy weights" if not options.cpu else "CPU", "engine_start_s": round(bench.start_s, 1),
        "max_running_requests": options.running, "tp": options.tp, "return_logprob": False,
    }  # fmt: skip


def loads_of(options: argparse.Namespace) -> tuple[Load, ...]:
    """Return the loads; the seed experiment's output lengths are cut where `--out` says so."""
    lengths = np.random.default_rng(1).integers(64, 449, options.mixed)
    if options.cpu:
        return (Load("8 requests", (32,) * 8, tuple(range(4, 12)), 1), Load("1 request", (64,), (16,), 1))
    mixed = f"{options.mixed} requests, 1024 in, 64 to 448 out, at most {options.running} running"
    if options.cached:
        some = tuple(int(n) for n in lengths[: options.running])
        name = f"{len(some)} requests at once, 1024 in (cached), 64 to 448 out"
        first = Load(name, (1024,) * len(some), some, 6, cached=True)
    else:
        first = Load(mixed, (1024,) * options.mixed, tuple(int(n) for n in lengths), 6)
    return (
        first,
        Load(f"64 requests, 1024 in, {options.out64} out", (1024,) * 64, (options.out64,) * 64, 1.6),
        Load(f"1 request, 1024 in, {options.out1} out", (1024,), (options.out1,), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900, help="for everything, the engine's start included")
    parser.add_argument("--tee-seconds", type=float, default=120, help="of these, for bit equality")
    for name, value in {"rounds": 9, "running": 256, "mixed": 512, "out1": 512, "out64": 256, "layers": 48, "tp": 1,
                        "shared-mib": 1024, "group": 4}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mem-fraction", type=float, default=0.85)
    parser.add_argument("--log-level", default="error")
    parser.add_argument("--cached", action="store_true", help="all of --running at once, prompts in the radix cache")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--print", action="store_true", help="leave the docs alone")
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    begin = time.perf_counter()
    bench = Bench(options)
    print(f"engine up in {bench.start_s:.0f} s", flush=True)
    loads = loads_of(options)
    table: dict[str, Any] = {"rows": [], "environment": environment(options, bench)}

    def save() -> None:
        if not options.print:
            options.target.parent.mkdir(exist_ok=True)
            options.target.write_text(json.dumps({"runs": [table]}, indent=1) + "\n")

    table["rows"] += equality(bench, loads[0], options)
    save()
    start, shares = time.perf_counter(), 0.0
    for number, load in enumerate(loads):
        shares += load.share / sum(other.share for other in loads)
        until = start + shares * (begin + options.seconds - start)
        rounds = race(bench, load, until, options.rounds, warm=number > 0)
        table["rows"] += rows_of(load, rounds)
        save()
    facts = bench.facts()
    slots = facts["slots"]
    for name, key in (("stock", "stock_bytes"), ("ours", "our_bytes")):
        table["rows"].append(_row(f"slot rows, {name}, per million KV slots", facts[key] / slots * 1e6 / 2**30, "GiB"))
    pinned = facts["stock_bytes"] if facts["stock_pinned"] else 0
    table["rows"].append(_row("pinned slot rows per rank, stock", pinned / 2**30, "GiB"))
    table["rows"].append(_row("pinned slot rows per rank, ours", 0, "GiB"))
    save()
    print(json.dumps(table["rows"]))
    bench.engine.shutdown()


if __name__ == "__main__":
    main()
