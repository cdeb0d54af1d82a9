"""A small model of a given architecture and random trajectories for it, to prove a layout on in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r3.config import TrainerConfig
from r3.routing import RoutingTrace
from r3.types import Batch, ModelSpec, Trajectory

_GROUPS, _MEMBERS = 4, 3
# As many experts as keep every rank busy with a few; a model with more than 256 keeps its two-byte ids.
_EXPERTS, _WIDE_EXPERTS = 32, 264


def shrunk_config(source: Mapping[str, Any], trainers: Sequence[TrainerConfig]) -> dict[str, Any]:
    """Return `source` (a Hugging Face `config.json`) with sizes that are small and divisible by every layout.

    The router, the activation, the norms and which of the first layers are dense stay as they are.
    """
    tensor = math.lcm(*(trainer.tensor_parallel for trainer in trainers))
    chunks = math.lcm(*(trainer.pipeline_parallel * trainer.virtual_pipeline for trainer in trainers))
    expert_ranks = math.lcm(*(trainer.expert_parallel for trainer in trainers))
    expert_cut = math.lcm(*(trainer.expert_tensor for trainer in trainers))
    layers = chunks * math.ceil(4 / chunks)
    key = "num_local_experts" if "num_local_experts" in source else "num_experts"
    most = _WIDE_EXPERTS if source[key] > 256 else min(_EXPERTS, source[key])
    experts = expert_ranks * max(1, math.ceil(max(most, source["num_experts_per_tok"]) / expert_ranks))
    groups = math.lcm(tensor, 2)
    small = {
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": groups,
        "head_dim": 16,
        "intermediate_size": 96 * tensor if "moe_intermediate_size" in source else 32 * expert_cut,
        key: experts,
        "vocab_size": math.lcm(320, tensor),
        "max_position_embeddings": 512,
        "tie_word_embeddings": source.get("tie_word_embeddings", False),
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if "moe_intermediate_size" in source:
        small["moe_intermediate_size"] = 32 * expert_cut
    if source.get("mlp_only_layers"):
        small["mlp_only_layers"] = [layer for layer in source["mlp_only_layers"] if layer < layers - 1]
    # The layer types of every layer, where newer files list them.
    dropped = {"layer_types", "max_window_layers"}
    return {name: value for name, value in source.items() if name not in dropped} | small


def write_model(config: Mapping[str, Any], directory: Path) -> None:
    """Write a checkpoint of `config` with random fp32 weights, large enough that every layer matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = str(config["model_type"])
    settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from 1 too: a conversion that swaps two of them must be seen.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)
    model.save_pretrained(directory)


def trial_batch(spec: ModelSpec, block_layers: int | None) -> Batch:
    """Return random trajectories with random records: no router would choose so, hence nothing agrees by chance."""
    rng = np.random.default_rng(0)
    samples = [_trajectory(spec, rng, group, member) for group in range(_GROUPS) for member in range(_MEMBERS)]
    return Batch.pack(samples, block_layers)


def trial_advantages() -> NDArray[np.float32]:
    """Return random advantages `[n]` of the trajectories of `trial_batch`."""
    return np.random.default_rng(1).standard_normal(_GROUPS * _MEMBERS).astype(np.float32)


def _trajectory(spec: ModelSpec, rng: np.random.Generator, group: int, member: int) -> Trajectory:
    prompt, response = int(rng.integers(4, 17)), int(rng.integers(4, 25))
    tokens = rng.integers(0, spec.vocab_size, prompt + response).astype(np.int32)
    chosen = rng.random((len(tokens) - 1, len(spec.moe_layers), spec.num_experts)).argsort(-1)[..., : spec.top_k]
    trace = RoutingTrace.record(
        chosen, tokens, layers=spec.moe_layers, num_experts=spec.num_experts, weight_version=0, engine="trial"
    )
    logprobs = (-5 + rng.random(response)).astype(np.float32)
    return Trajectory(group, member, tokens, prompt, logprobs, trace, 0.0, "stop", 0, spec.fingerprint)
