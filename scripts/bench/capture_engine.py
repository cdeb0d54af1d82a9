"""The engine of `scripts/bench/capture.py`: how it starts, and what one run of a load in one way does."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.capture_table import RETURNING, WAYS, Load, Run

TIMEOUT_S = 60.0
# Longest wait for the requests of a run to be queued; they take a second or two.
HOLD_S = 60.0
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
# FlashInfer's fused all-reduce, which SGLang switches on for this model at TP > 1, is not installed everywhere and may
# use NVLink multicast; NCCL alone is what every way shares.
GPUS = {"enforce_disable_flashinfer_allreduce_fusion": True}


class Bench:
    """The engine, its segment, and what one run does."""

    def __init__(self, options: argparse.Namespace) -> None:
        from r3.rollout.segment import Owner
        from r3.types import ModelSpec

        self.sound: Mapping[Any, Any] = {}
        self.folder = Path(tempfile.mkdtemp())
        _announce_plugin(self.folder)
        model = _model(self.folder / "model", options)
        self.model = ModelSpec.from_directory(model)
        self.ranks = options.tp
        begin = time.perf_counter()
        self.engine = _start(model, options)
        self.start_s = time.perf_counter() - begin
        self.owner = Owner(options.shared_mib << 20, prefault=not options.cpu)
        self.way = ""
        self.ways: Sequence[str] = WAYS
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

    def facts(self, trim: bool = False) -> list[dict[str, Any]]:
        """Return what the scheduler of every rank noted since the last call; `trim` gives unused pinned memory back."""
        path = self.folder / "facts"
        self.engine.collective_rpc("r3_bench_facts", path=str(path), trim=trim)
        return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(self.ranks)]

    def requests(self, load: Load) -> dict[str, Any]:
        """Return random prompts and the output lengths."""
        top = self.model.vocab_size - 16
        return {
            "input_ids": [self.random.integers(2, top, n).tolist() for n in load.prompts],
            "sampling_params": [{"temperature": 1.0, "max_new_tokens": n, "ignore_eos": True} for n in load.outputs],
        }

    def run(self, load: Load, way: str, requests: dict[str, Any], trim: bool = False) -> Run:
        """Answer the load once; where its routing is asked for, take, check and pack it as the rollout worker does.

        The clock starts when all requests wait in the scheduler, which plans its first pass then and not before. With
        `trim` the scheduler begins without pinned memory that it keeps for later.
        """
        self.switch(way)
        self.flush()
        if load.cached:
            self.engine.generate(input_ids=requests["input_ids"], sampling_params={"max_new_tokens": 1})
        self.facts(trim)
        called = time.perf_counter()
        with self._looking(way) as self.sound:
            outputs = self._answers(len(load.prompts), **requests, return_routed_experts=way in RETURNING)
        ended = time.perf_counter()
        run = Run(way, 0.0, from_call=ended - called)
        if way in RETURNING:
            self._receive(run, outputs, requests["input_ids"])
        noted = self.facts()
        released, passes = _release(noted[0], len(load.prompts)), noted[0]["passes"]
        run.seconds = ended - released
        run.parts = [b - a for a, b in itertools.pairwise([released, *(taken for taken, _ in passes), ended])]
        run.decodes = sum(1 for _, decoded in passes if decoded)
        run.prefills = len(passes) - run.decodes
        run.gaps = [(b[0] - a[0], b[1]) for a, b in itertools.pairwise(passes) if a[1] and b[1]]
        run.pinned = tuple(int(rank["pinned"]) for rank in noted) if noted[0]["pinned"] is not None else ()
        self.owner.abandon()
        return run

    def _looking(self, way: str) -> AbstractContextManager[Mapping[Any, Any]]:
        """Look at rows as they come, as the adapter does."""
        from r3.rollout.early import EarlyLook

        return EarlyLook(self.owner, self.model) if way == "ours" else nullcontext({})

    def _answers(self, requests: int, **arguments: Any) -> Any:
        """Generate, with no pass before all requests are queued; a hold that they never end is let go of."""
        self.engine.collective_rpc("r3_bench_hold", requests=requests)
        letting_go = self.engine.loop.call_later(
            HOLD_S, lambda: self.engine.collective_rpc("r3_bench_hold", requests=0)
        )
        try:
            return self.engine.generate(**arguments)
        finally:
            letting_go.cancel()

    def rows(self, output: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Return an answer's rows `[rows, layers, k]` without a check."""
        return self._taken(output)[0]

    def _receive(self, run: Run, outputs: Sequence[dict[str, Any]], prompts: Sequence[list[int]]) -> None:
        from r3.rollout.sglang_plugin.tickets import ticket_of

        marks = [time.perf_counter()]
        for output in outputs:
            found = ticket_of(output["meta_info"])
            if found is not None:
                self.owner.wait(found[0], TIMEOUT_S)
        marks.append(time.perf_counter())
        taken = [self._taken(output) for output in outputs]
        marks.append(time.perf_counter())
        tokens = [np.array([*p, *o["output_ids"]], np.int32) for p, o in zip(prompts, outputs, strict=True)]
        marks.append(time.perf_counter())
        traces = [
            self._checked(output, rows, trailer, ids, len(prompt))
            for output, (rows, trailer), ids, prompt in zip(outputs, taken, tokens, prompts, strict=True)
        ]
        marks.append(time.perf_counter())
        self._pack(traces, tokens, prompts)
        marks.append(time.perf_counter())
        run.wait, run.decode, _, run.checks, run.pack = (b - a for a, b in itertools.pairwise(marks))
        if run.way == "stock":
            run.checks = max(0.0, run.checks - run.decode)  # its decoder with checks decodes once more

    def _taken(self, output: dict[str, Any]) -> tuple[np.ndarray[Any, Any], bytes]:
        """Return an answer's rows `[rows, layers, k]` without a check, and the stamps that lay beside them."""
        import pybase64

        from r3.rollout.segment import as_rows
        from r3.rollout.sglang_plugin.tickets import ticket_of
        from r3.routing import expert_dtype

        layers, k, dtype = self.model.num_layers, self.model.top_k, expert_dtype(self.model.num_experts)
        found = ticket_of(output["meta_info"])
        if found is not None:
            ticket, _, rows = found
            record = self.owner.take(ticket, TIMEOUT_S)
            return as_rows(record, dtype, (rows, layers, k)), record.trailer
        if self.way != "stock":
            raise RuntimeError(f"rows found no room in {self.owner.size >> 20} MiB; raise --shared-mib")
        raw = pybase64.b64decode(output["meta_info"]["routed_experts"])
        return np.frombuffer(raw, np.int32).reshape(-1, layers, k).astype(dtype), b""

    def _checked(
        self, output: dict[str, Any], rows: np.ndarray[Any, Any], trailer: bytes, tokens: Any, prompt_len: int
    ) -> Any:
        from r3.rollout.provenance import with_provenance
        from r3.rollout.sglang_plugin.tickets import ticket_of
        from r3.rollout.wire import decode_sglang, read_rows

        who: dict[str, Any] = {"request": 0, "weight_version": 0, "engine": "sglang"}
        returned = ticket_of(output["meta_info"])
        if returned is None:
            return decode_sglang(output["meta_info"]["routed_experts"], tokens, self.model, **who).routing
        seen = self.sound.get(returned[0])
        routing = read_rows(rows, tokens, self.model, **who, begin=0, start=0, seen=seen).routing
        found, stale = with_provenance(routing, trailer, num_tokens=len(tokens), prompt_len=prompt_len)
        if stale:
            raise RuntimeError(f"rows of an undisturbed answer are stale: {stale[:3]}")
        return found

    def _pack(self, traces: Sequence[Any], tokens: Sequence[Any], prompts: Sequence[list[int]]) -> None:
        from r3.types import Batch, Trajectory

        batch = Batch.pack(
            [
                Trajectory(
                    group=i, member=0, tokens=ids, prompt_len=len(prompt),
                    logprobs=np.zeros(len(ids) - len(prompt), np.float32), routing=trace, reward=0.0, finish="length",
                    weight_version=0, fingerprint=self.model.fingerprint,
                )
                for i, (trace, ids, prompt) in enumerate(zip(traces, tokens, prompts, strict=True))
            ],
        )  # fmt: skip
        buffers: list[pickle.PickleBuffer] = []
        pickle.dumps(batch, 5, buffer_callback=buffers.append)
        for buffer in buffers:
            # What the object store does with each.
            bytes(buffer.raw())


def _release(noted: dict[str, Any], requests: int) -> float:
    """Return when the last request had come; raise `RuntimeError` where the scheduler did not wait for it."""
    released: float | None = noted["released"]
    if released is None:
        raise RuntimeError(
            f"{noted['queued']} of {requests} requests waited in the scheduler after {HOLD_S:.0f} s, so the passes of "
            "this run are not those of the others; see the engine's log for requests that it refused"
        )
    return released


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
    if options.tp > 1:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        size |= GPUS
    return sglang.Engine(**common, **GPU, **size, tp_size=options.tp)
