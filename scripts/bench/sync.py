#!/usr/bin/env python
"""Measure how long new weights take to one engine, by every way; writes docs/benchmarks/sync.json.

    python scripts/bench/sync.py --rows 7b:ipc 7b:object_store 30b:ipc          # one GPU
    python scripts/bench/sync.py --append --rows 7b:broadcast 30b:broadcast     # two GPUs
    python scripts/bench/sync.py --tiny --print                                 # a tiny model, everything on the CPU

The engine is real SGLang with dummy weights; the trainer is its sending half alone (`r3.trainer.outlet`), which takes
Hugging Face named tensors from random memory on its device, so that gathering from ranks is no part of it. A push is
what the main job does in a step: bucket by bucket, checksums, flush of the cache. Shapes: `7b` (dense, 7.4 B
parameters), `7b_moe` (48 layers, 128 experts, hidden 1024; 7.4 B in 18,432 small expert matrices and more) and `30b`
(Qwen3-30B-A3B). The first push of a row makes connections and is not counted. A row takes pushes until `--repeats`, or
until `--seconds` are over; `object_store` moves `--share` of the tensors. The file is written again after each row.

Rows are `name, value, unit, baseline, ratio, ci95`: a mean with Student's 95 % interval; of GB/s the ratio to the row
named `baseline`, of parts of a push the share of its wall time. *Engine* is the time inside SGLang's calls: opening
handles or waiting for the broadcast, our checksum, and its own loader; `--no-verify` leaves the checksums out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r3.config import Config

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "benchmarks" / "sync.json"
QWEN = {
    "vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
MOE = {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4}
SHAPES: dict[str, dict[str, object]] = {
    "tiny": {},
    "7b": QWEN | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "7b_moe": QWEN | MOE | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "moe_intermediate_size": 384,
    },
    "30b": QWEN | MOE | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "moe_intermediate_size": 768,
    },
}  # fmt: skip
# What a GPU host without prebuilt kernels of other kinds can run; no graph is needed to load weights.
GPU_ARGS = {
    "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none",
    "disable_cuda_graph": True, "load_format": "dummy",
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield Hugging Face name and shape of every weight of a Qwen3 or Qwen3-MoE config."""
    hidden, head, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        yield base + "input_layernorm.weight", (hidden,)
        yield base + "self_attn.q_proj.weight", (queries, hidden)
        yield base + "self_attn.k_proj.weight", (keys, hidden)
        yield base + "self_attn.v_proj.weight", (keys, hidden)
        yield base + "self_attn.o_proj.weight", (hidden, queries)
        yield base + "self_attn.q_norm.weight", (head,)
        yield base + "self_attn.k_norm.weight", (head,)
        yield base + "post_attention_layernorm.weight", (hidden,)
        if config["model_type"] == "qwen3":
            yield from mlp(base + "mlp.", hidden, config["intermediate_size"])
            continue
        yield base + "mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from mlp(f"{base}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def mlp(base: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the three matrices of a gated MLP."""
    yield base + "gate_proj.weight", (inner, hidden)
    yield base + "up_proj.weight", (inner, hidden)
    yield base + "down_proj.weight", (hidden, inner)


class RandomTrainer:
    """Stands for trainer rank 0: the product's outlet over random tensors, views of one pool on the device."""

    def __init__(self, config: Config, model: str, share: float) -> None:
        from r3.weights import NCCL_ENVIRONMENT

        os.environ.update({key: value for key, value in NCCL_ENVIRONMENT.items() if key not in os.environ})
        import torch

        from r3.trainer.outlet import WeightOutlet

        self._config, self._share, self.version = config, share, 0
        self._shapes = list(shapes_of(json.loads((Path(model) / "config.json").read_text())))
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        largest = max(math.prod(shape) for _, shape in self._shapes)
        dtype = getattr(torch, config.rollout.dtype)
        self._pool = torch.randn(largest + 65_536, device=device).mul_(0.02).to(dtype)
        self._outlet = WeightOutlet(config, self._tensors, lambda: self.version, device)

    def site(self) -> Any:
        import ray

        from r3.weights import Site

        return Site(ray.get_runtime_context().get_node_id(), self._outlet.gpus())

    def address(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def weights(self, method: str, *arguments: Any) -> Any:
        self.version += method == "open"
        return getattr(self._outlet, method)(*arguments)

    def export(self) -> tuple[tuple[int, int], Any]:
        from r3.trainer.weights import weight_buckets

        self.version += 1
        weights, dtype = self._config.weights, self._pool.dtype
        made = weight_buckets(
            self._tensors(self._share), dtype, weights.bucket_mib << 20, self.version, verify=weights.verify
        )
        return (self.version, made.nbytes), made

    def _tensors(self, share: float = 1.0) -> Iterator[tuple[str, Any]]:
        last = max(1, round(share * len(self._shapes)))
        for number, (name, shape) in enumerate(self._shapes[:last]):
            # Another part of the pool for each name and version, so that no two pushes carry the same bytes.
            begin = (number * 97 + self.version * 13) % 65_536
            yield name, self._pool[begin : begin + math.prod(shape)].reshape(shape)


class Trainers:
    """Stands for `r3.trainer.group.TrainerGroup`."""

    def __init__(self, config: Config, model: Path, share: float, gpus: float) -> None:
        import ray

        self._limit = config.trainer.timeout_s
        self._actor = ray.remote(RandomTrainer).options(num_cpus=1, num_gpus=gpus).remote(config, str(model), share)

    def outlet(self) -> Any:
        from r3.trainer.port import OutletPort

        return OutletPort([self._actor], self._limit)

    def export(self) -> Any:
        import ray

        from r3.trainer.group import Exported

        facts, weights = self._actor.export.options(num_returns=2).remote()
        return Exported(weights, *ray.get(facts, timeout=self._limit))

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float = 1.0
    ci95: tuple[float, ...] = ()


@dataclass(slots=True)
class Memory:
    """Highest use of every GPU, in bytes, while the block runs, asked of the driver a few times a second."""

    base: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Memory:
        self.base = self.peak = used()
        if self.base:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak = {gpu: max(now, self.peak.get(gpu, 0)) for gpu, now in used().items()}


def used() -> dict[str, int]:
    """Return the bytes in use on every GPU that this process may use, nothing where there is none."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    try:
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        command += ["-i", mine] if mine else []
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {line.split(",")[0].strip(): int(line.split(",")[1]) << 20 for line in lines if line.strip()}


def config_of(options: argparse.Namespace, shape: str, way: str) -> Config:
    """Return the configuration of one row."""
    gpu, limit = not options.tiny, max(300.0, 3 * options.seconds)
    return Config.model_validate({
        "task": {"kind": "custom", "prompts": "tests.fake_engine:make_prompt",
                 "reward": "tests.fake_engine:length_reward"},
        "routing": {"capture": False},
        "replay": {"mode": "none"},
        "rollout": {
            "gpus_per_worker": 0.5 if gpu else 0, "dtype": "bfloat16" if gpu else "float32",
            "mem_fraction": options.mem_fraction, "max_total_tokens": 4096, "max_running_requests": 16,
            "engine_args": GPU_ARGS if gpu else {"load_format": "dummy"},
            "start_timeout_s": 600, "timeout_s": limit,
        },
        "trainer": {"timeout_s": limit},
        "weights": {"transport": way, "bucket_mib": options.bucket_mib, "verify": not options.no_verify,
                    "timeout_s": limit / 2},
    })  # fmt: skip


def measure(options: argparse.Namespace, shape: str, way: str, pool: Any, model: Path) -> list[Row]:
    """Push again and again by one way; return its rows."""
    from r3.sync import WeightSync

    config = config_of(options, shape, way)
    trainers = Trainers(config, model, options.share, 0 if options.tiny else 1 if way == "broadcast" else 0.5)
    found: list[tuple[float, dict[str, float]]] = []
    try:
        trainers.outlet().site()  # the actor is up, and its pool is made
        with Memory() as memory, WeightSync(config, pool, trainers, say) as sync:  # type: ignore[arg-type]
            sync.push()
            until = time.monotonic() + options.seconds
            while len(found) < options.repeats and (not found or time.monotonic() < until):
                begin = time.perf_counter()
                moved = sync.push()
                found.append((time.perf_counter() - begin, moved))
    finally:
        trainers.close()
    return rows_of(f"{shape}, {way}", found, memory, options)


def say(kind: str, **facts: Any) -> None:
    """Print an event of pool and push."""
    print(f"  {kind} {facts}", flush=True)


def rows_of(
    name: str, found: Sequence[tuple[float, dict[str, float]]], memory: Memory, options: argparse.Namespace
) -> list[Row]:
    """Return the rows of one way."""
    name += f", buckets of {options.bucket_mib} MiB" + (", not verified" if options.no_verify else "")
    walls = [wall for wall, _ in found]
    whole = sum(walls) / len(walls)

    def mean(key: str) -> float:
        return sum(moved[f"transport/weights_{key}"] for _, moved in found) / len(found)

    speeds = [moved["transport/weights_bytes"] / wall / 1e9 for wall, moved in found]
    rows = [
        Row(name, sum(speeds) / len(speeds), "GB/s", ci95=interval(speeds)),
        Row(f"{name}, push", whole, "s", ci95=interval(walls)),
        Row(f"{name}, bytes", mean("bytes"), "B"),
        Row(f"{name}, pushes", len(found), "count"),
    ]
    for key, what in (("gather_s", "trainer fills buckets"), ("transfer_s", "trainer sends"), ("load_s", "engine")):
        rows.append(Row(f"{name}, {what}", mean(key), "s", "push", mean(key) / whole))
    rows.append(Row(f"{name}, buckets on the trainer", mean("extra_bytes"), "B"))
    rows += [
        Row(f"{name}, GPU {gpu}, most above start", float(peak - memory.base[gpu]), "B")
        for gpu, peak in memory.peak.items()
    ]
    return rows


# Student's t at 97.5 % for 1 to 10 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Sequence[float]) -> tuple[float, ...]:
    """Return the 95 % interval of the mean, nothing for a single value."""
    count = len(values)
    if count < 2:
        return ()
    middle = sum(values) / count
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (count - 1))
    half = STUDENT[min(count - 1, len(STUDENT)) - 1] * deviation / math.sqrt(count)
    return middle - half, middle + half


def related(rows: Sequence[Row]) -> list[Row]:
    """Relate every row of GB/s to that of the object store of the same shape, where there is one."""
    bases = {row.name.split(",")[0]: row for row in rows if row.unit == "GB/s" and ", object_store" in row.name}
    return [
        Row(row.name, row.value, row.unit, base.name, row.value / base.value, row.ci95)
        if row.unit == "GB/s" and (base := bases.get(row.name.split(",")[0]))
        else row
        for row in rows
    ]


def environment() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    from importlib.metadata import version

    import torch

    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    commit = (
        os.environ.get("R3_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "host": f"{' + '.join(gpu) or 'no GPU'}, {os.cpu_count()} cores, {platform.machine()}",
        "sglang": version("sglang"), "torch": torch.__version__, "ray": version("ray"),
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def save(target: Path, earlier: list[Any], facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the file, whole or not at all."""
    runs = [*earlier, {"environment": facts, "rows": [asdict(row) for row in related(rows)]}]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    part.replace(target)


def options_of() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], metavar="SHAPE:WAY", help="in the order given")
    parser.add_argument("--seconds", type=float, default=60, help="most that the pushes of a row may take")
    parser.add_argument("--repeats", type=int, default=5, help="pushes of a row")
    parser.add_argument("--share", type=float, default=0.1, help="of the tensors, through the object store")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--mem-fraction", type=float, default=0.6, help="of the engine's GPU, weights included")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--append", action="store_true", help="keep the runs that the file holds")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--print", action="store_true", help="print the rows, write no file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, by every way")
    options = parser.parse_args()
    if options.tiny:
        options.rows = options.rows or ["tiny:object_store", "tiny:ipc", "tiny:broadcast"]
    for one in options.rows or parser.error("--rows SHAPE:WAY is missing"):
        shape, _, way = one.partition(":")
        if shape not in SHAPES or way not in ("ipc", "broadcast", "object_store"):
            parser.error(f"--rows {one}: shapes are {', '.join(SHAPES)}; ways ipc, broadcast, object_store")
    return options


def written(model: Path) -> Path:
    """Leave out of a dense model's config what the tiny one says of experts."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] == "qwen3":
        file.write_text(json.dumps({key: value for key, value in config.items() if "expert" not in key}))
    return model


def main() -> None:
    """Measure every row, an engine start for each shape."""
    options = options_of()
    import ray

    from r3.rollout.pool import RolloutPool
    from tests import plugin_entry, tiny_model

    # Ray's workers take the path from here; the plugin verifies what arrives.
    places = [str(ROOT), plugin_entry.folder(), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    earlier = json.loads(options.target.read_text())["runs"] if options.append and options.target.is_file() else []
    facts, rows = environment(), []
    asked = [tuple(one.split(":")) for one in options.rows]
    with tempfile.TemporaryDirectory() as place:
        for shape in dict.fromkeys(shape for shape, _ in asked):
            model = written(tiny_model.write_files(Path(place) / shape, **SHAPES[shape]))
            ways = [way for one, way in asked if one == shape]
            with RolloutPool(config_of(options, shape, "auto"), model, say) as pool:
                for way in ways:
                    print(f"{shape} by {way}", flush=True)
                    made = measure(options, shape, way, pool, model)
                    rows += made
                    print("\n".join(f"  {row.name}: {row.value:.4g} {row.unit}" for row in made), flush=True)
                    if not options.print:
                        save(options.target, earlier, facts, rows)
    if options.print:
        print(json.dumps([asdict(row) for row in related(rows)], indent=1))
    ray.shutdown()


if __name__ == "__main__":
    main()
