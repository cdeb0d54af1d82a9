"""Arguments of the SGLang engine: what the config decides, and which of the user's own are refused, with the reason.

No SGLang import, so that a wrong option is found before anything heavy starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r3.config import Config
from r3.errors import ConfigError
from r3.types import DENSE

OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)
ENGINE_ARGS = "rollout.engine_args"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An engine argument that cannot be used: name, for which values, what it would break, and why (with source).

    `over_http`: it cannot be used in a server that is met over HTTP either.
    """

    option: str
    applies: Callable[[Any], bool]
    breaks: Literal["capture", "sampling", "adapter"]
    reason: str
    over_http: bool = True


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", "none", "null", [], {})


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


# Runner backends whose `TopK` hands logits to the kernel (SGLang 0.5.23, `TopK.bind_runner_backend`).
_ROUTES_INSIDE = ("flashinfer_trtllm", "triton_kernel", "flashinfer_mxfp4", "experimental_sgl_trtllm")

REFUSALS: tuple[Refusal, ...] = (
    Refusal("speculative_algorithm", _is_set, "capture",
            "the capture buffer is not sized for verify forwards (SGLang PR #38717) and log-probs are the target's"),
    Refusal("pp_size", _above_one, "capture", "each pipeline stage records only its own layers, nothing merges them"),
    Refusal("enable_hierarchical_cache", bool, "capture",
            "restored KV moves to new slots and its routing rows do not follow (SGLang issue #26975)"),
    *(Refusal(option, bool, "capture",
              "KV that is restored from outside the GPU brings no routing rows (as in SGLang #26975 and vLLM #39568)")
      for option in ("enable_lmcache", "enable_flexkv", "enable_hisparse")),
    Refusal("disaggregation_mode", _is_set, "capture",
            "prompt rows stay on the prefill node (SGLang PRs #22916, #23885)"),
    Refusal("moe_runner_backend",
            lambda value: value == "auto" or str(value).startswith(_ROUTES_INSIDE), "capture",
            "routing inside the kernel bypasses the capture and every row reads 0 (the fault of vLLM issue #44116); "
            "'auto' may choose such a kernel"),
    Refusal("moe_a2a_backend", lambda value: _is_set(value) and value != "deepep", "capture",
            "only DeepEP's scattered tokens are known to be gathered by the capture"),
    Refusal("chunked_prefill_size", lambda value: isinstance(value, int) and value <= 0, "capture",
            "the capture buffer then holds max_running_requests rows and a longer prompt overruns it"),
    Refusal("enable_two_batch_overlap", bool, "capture",
            "both half batches write the same rows of one capture buffer"),
    Refusal("enable_pdmux", bool, "capture",
            "prefill and decode run at once and write the same rows of one capture buffer"),
    Refusal("attn_cp_size", _above_one, "capture",
            "a prompt's tokens are split over ranks, and nothing is known to gather their rows"),
    Refusal("enable_return_routed_experts", lambda value: not value, "capture",
            "capture would be off; set routing.capture: false"),
    Refusal("enable_custom_logit_processor", bool, "sampling",
            "log-probs would not be those of the sampled distribution"),
    Refusal("enable_watermark", bool, "sampling", "log-probs would not be those of the sampled distribution"),
    # A server shows '<redacted>' in its place, set or not.
    Refusal("watermark_config", _is_set, "sampling", "log-probs would not be those of the sampled distribution",
            over_http=False),
    Refusal("skip_tokenizer_init", lambda value: not value, "adapter", "the bridge sends and receives token ids"),
    Refusal("dp_size", _above_one, "adapter",
            "SGLang takes weight updates with one data-parallel replica only; use rollout.workers"),
    Refusal("nnodes", _above_one, "adapter", "one engine lives on one host; use rollout.workers", over_http=False),
    Refusal("tokenizer_worker_num", _above_one, "adapter", "the engine runs inside the rollout worker",
            over_http=False),
)  # fmt: skip

# Decided by other keys of the config, so that one fact has one place.
DECIDED = {
    "model_path": "model.path",
    "dtype": "rollout.dtype",
    "device": "rollout.gpus_per_worker",
    "max_running_requests": "rollout.max_running_requests",
    "max_total_tokens": "rollout.max_total_tokens",
    "mem_fraction_static": "rollout.mem_fraction",
    "random_seed": "run.seed",
    "weight_version": "the trainer",
}


def check_engine_args(arguments: Mapping[str, Any], *, capture: bool) -> None:
    """Raise `ConfigError` that lists every refused argument of `rollout.engine_args` with the reason."""
    faults = [
        f"{ENGINE_ARGS}.{option} is decided by {owner}; set that instead"
        for option, owner in DECIDED.items()
        if option in arguments
    ]
    faults += [
        f"{ENGINE_ARGS}.{refusal.option}={arguments[refusal.option]!r} is refused: {refusal.reason}"
        for refusal in REFUSALS
        if refusal.option in arguments
        and (capture or refusal.breaks != "capture")
        and refusal.applies(arguments[refusal.option])
    ]
    if faults:
        raise ConfigError("\n  ".join(faults))


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` for a variable that would make SGLang report log-probs of another distribution."""
    if environment.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "0").lower() in ("1", "true", "yes", "y"):
        raise ConfigError(
            "SGLANG_RETURN_ORIGINAL_LOGPROB is set: SGLang would report log-probs before temperature, which are not "
            "those of the sampled distribution; unset it"
        )


def check_output_layer(model_dir: str | Path) -> None:
    """Raise `ConfigError` for a checkpoint with tied embeddings, whose output layer SGLang's Qwen3-MoE never fills.

    SGLang 0.5.23 makes a separate `lm_head` (`models/qwen3_moe.py`) and loads it only from a tensor of that name, so
    such a model samples uniformly.
    """
    contents = json.loads((Path(model_dir) / "config.json").read_text())
    # Its dense Qwen3 reads them.
    if contents.get("tie_word_embeddings", False) and contents.get("model_type") != DENSE:
        raise ConfigError(
            f"{model_dir} has tie_word_embeddings=true, which SGLang's Qwen3-MoE does not read: its output layer would "
            "stay empty. Save the checkpoint with tie_word_embeddings=false and an lm_head.weight"
        )


def check_release(version: str) -> None:
    """Raise `ConfigError` for an SGLang release outside the range that this adapter was written for."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST <= release <= NEWEST:
        raise ConfigError(
            f"SGLang {version} is installed; 0.5.17 to 0.5.23 are supported (older releases return routing of other "
            "requests in mixed batches, newer ones are not known)"
        )


def engine_kwargs(config: Config, model_dir: str, index: int) -> dict[str, Any]:
    """Return the `ServerArgs` of one engine; arguments of the user win where they are not refused.

    Raises `ConfigError` for refused arguments.
    """
    rollout = config.rollout
    check_engine_args(rollout.engine_args, capture=config.routing.capture)
    common: dict[str, Any] = {
        "model_path": model_dir,
        "skip_tokenizer_init": True,
        "dtype": rollout.dtype,
        "random_seed": config.run.seed + index,
        "max_running_requests": rollout.max_running_requests,
        "enable_return_routed_experts": config.routing.capture,
        "weight_version": "0",
        "log_level": "error",
    }
    if rollout.max_total_tokens is not None:
        common["max_total_tokens"] = rollout.max_total_tokens
    specific = _gpu_kwargs(config) if rollout.gpus_per_worker else _cpu_kwargs()
    return common | specific | dict(rollout.engine_args)


def _gpu_kwargs(config: Config) -> dict[str, Any]:
    return {
        "mem_fraction_static": config.rollout.mem_fraction,
        "moe_runner_backend": "triton",
        "tp_size": max(1, math.ceil(config.rollout.gpus_per_worker)),
        "enable_deterministic_inference": config.run.deterministic,
    }


def _cpu_kwargs() -> dict[str, Any]:
    return {
        "device": "cpu",
        "mem_fraction_static": 0.1,  # max_total_tokens sizes the KV pool
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "chunked_prefill_size": 8192,
        "disable_cuda_graph": True,
        # One scheduler thread beside the trainer on few cores: overlap gains nothing, and polling would burn a core.
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,
    }
