"""What an engine must be able to do, found out before the first rollout instead of after it.

`probe` looks at a few answers of a running server; `require` holds what an engine says of itself against the model. A
missing capability is an `EngineError` (exit code 4) that names the flag to set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from r3.errors import EngineError
from r3.rollout.engine import EngineSpec, Generation, Recorded, Request, Sampling
from r3.routing import RoutingTrace
from r3.types import ModelSpec

# By the first word of `EngineSpec.engine`: what switches the capture on, and what the prefix cache off.
CAPTURE_FLAGS = {
    "sglang": "--enable-return-routed-experts (in process: enable_return_routed_experts)",
    "lightllm": "--enable_return_routed_experts",
    "vllm": "--enable-return-routed-experts",
}
CACHE_FLAGS = {
    "sglang": "--disable-radix-cache",
    "lightllm": "--disable_dynamic_prompt_cache",
    "vllm": "--no-enable-prefix-caching",
}
_PROBE_TOKENS = 24
Generate = Callable[[Sequence[Request], Sampling], list[Generation]]


@dataclass(frozen=True, slots=True)
class Flags:
    """The options of one kind of engine that an error names."""

    capture: str
    cache: str

    @classmethod
    def of(cls, engine: str) -> Flags:
        """Return the options of an engine by its name with version."""
        kind = engine.partition(" ")[0].lower()
        return cls(
            CAPTURE_FLAGS.get(kind, "enable_return_routed_experts"), CACHE_FLAGS.get(kind, "its prefix cache off")
        )


def require(spec: EngineSpec, *, capture: bool) -> None:
    """Raise `EngineError` with every capability that the run needs and the engine lacks.

    `capture`: the run records routing. An engine that does not describe its records is taken at its word.
    """
    if not capture:
        return
    flags, found, model = Flags.of(spec.engine), spec.recorded, spec.model
    faults = []
    if not spec.capture:
        faults.append(f"runs without routing capture; start it with {flags.capture}")
    elif found is not None:
        if found.layers != model.moe_layers:
            faults.append(
                f"records layers {found.layers}, the model has routers in {model.moe_layers}; serve the whole model in "
                "one pipeline stage, from the checkpoint of model.path"
            )
        if (found.num_experts, found.top_k) != (model.num_experts, model.top_k):
            faults.append(
                f"records top-{found.top_k} of {found.num_experts} experts, the model has top-{model.top_k} of "
                f"{model.num_experts}; serve the checkpoint of model.path"
            )
        if found.ids != "logical":
            faults.append("records physical expert ids; switch expert load balancing (EPLB) off at the engine")
        if found.cached_rows is False:
            faults.append(f"returns no rows for a cached prompt; switch its prefix cache off ({flags.cache})")
    if faults:
        raise EngineError("\n  ".join(f"{spec.engine} {fault}" for fault in faults))


def probe(generate: Generate, model: ModelSpec, engine: str) -> Recorded:
    """Ask a running engine for one short prompt three times, and return what its records were found to hold.

    First with full routing, then again (a cached prefix must carry the same rows), then with a `routing_start`. The
    adapter's decoder has held rows, layers, top-k and ids against `model`. Raises `EngineError` that names the option.
    """
    flags = Flags.of(engine)
    tokens = (2 + np.arange(_PROBE_TOKENS) % max(1, model.vocab_size - 2)).astype(np.int32)
    sampling = Sampling(1.0, 2, greedy=True, ignore_eos=True)

    def ask(start: int) -> tuple[Generation, RoutingTrace]:
        (answer,) = generate([Request(tokens, start)], sampling)
        if answer.routing is None:
            raise EngineError(
                f"{engine} answered the handshake without a usable routing record: {answer.defect or answer.finish}. "
                f"Serve the checkpoint of model.path with {flags.capture}"
            )
        return answer, answer.routing

    first, cold = ask(0)
    second, warm = ask(0)
    cached = min(second.cached_tokens, cold.rows, warm.rows)
    if not np.array_equal(np.sort(cold.experts[:cached], axis=-1), np.sort(warm.experts[:cached], axis=-1)):
        raise EngineError(
            f"{engine} returns other experts for a prompt that it has cached than it computed; restored KV does not "
            f"bring its rows along. Switch tiered caches off (SGLang: HiCache), or the prefix cache ({flags.cache})"
        )
    third, _ = ask(_PROBE_TOKENS - 1)
    return Recorded(
        layers=cold.layers,
        num_experts=cold.num_experts,
        top_k=cold.top_k,
        wire_dtype=first.wire.dtype if first.wire else None,
        honours_start=None if third.wire is None else third.wire.begin > 0,
        cached_rows=True if second.cached_tokens else None,
        provenance=cold.provenance,
    )
