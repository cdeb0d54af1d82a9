"""Tiny checkpoints, trajectories and configs for the trainer's tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r3.config import Config
from r3.routing import RoutingTrace
from r3.trainer import replay
from r3.trainer.batching import MicroBatch, Shares, StepBatch, microbatch, share
from r3.trainer.policy import Policy, RoutingUse
from r3.trainer.worker import TrainerWorker
from r3.types import Batch, ModelSpec, Trajectory
from tests.tiny_model import CONFIG, write_files

VOCAB = 320
# Shapes that SGLang's prebuilt kernels take: head_dim 64, KV rows of 256 bytes.
SIZES_FOR_KERNELS = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "intermediate_size": 512}
# Megatron-core 0.19.2 sorts the top-k only where gradients are on: a recomputed forward pass adds in another order.
BITS_UNDER_RECOMPUTE = version("megatron-core").startswith("0.16.")


def write_model(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random fp32 Qwen3-MoE checkpoint: 4 layers, 16 experts, top-4, h 64, norms away from 1."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 96}
    settings = {k: v for k, v in CONFIG.items() if k != "model_type"} | small | changes
    torch.manual_seed(seed)
    return _write(Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)), directory)


def write_mixtral(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random fp32 Mixtral checkpoint: 4 layers, 8 experts, top-2, h 64, norms away from 1."""
    from transformers import MixtralConfig, MixtralForCausalLM

    kept = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    config = MixtralConfig(**({key: CONFIG[key] for key in kept} | sizes | changes))
    return _write(MixtralForCausalLM(config), directory)


def write_dense(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random fp32 dense Qwen3 checkpoint: 4 layers, h 64, norms away from 1."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    moe = ("model_type", "architectures", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
           "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")  # fmt: skip
    kept = {key: value for key, value in CONFIG.items() if key not in moe}
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96} | changes
    return _write(Qwen3ForCausalLM(Qwen3Config(**(kept | sizes))), directory)


def _write(model: Any, directory: Path) -> Path:
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random norms too: a converter that swaps two of them must be seen.
            parameter.normal_(1.0, 0.2) if "norm" in name else parameter.normal_(0.0, 0.08)
    model.save_pretrained(directory)
    written = (directory / "config.json").read_text()
    write_files(directory)
    (directory / "config.json").write_text(written)
    return directory


def make_config(**sections: dict[str, Any]) -> Config:
    """Return the default config with some keys changed; a high, constant learning rate makes updates visible.

    The audit only warns, because the records of `make_batch` are random; the checkpoints have no tokenizer for texts.
    """
    sections["routing"] = {"on_alarm": "warn"} | sections.get("routing", {})
    sections["metrics"] = {"tokens_every": 0} | sections.get("metrics", {})
    trainer = {"lr": 1e-3, "lr_warmup_steps": 0, "micro_batch_size": 4} | sections.pop("trainer", {})
    return Config.model_validate({"trainer": trainer, **sections})


def make_trajectory(
    spec: ModelSpec, rng: np.random.Generator, group: int = 0, member: int = 0, routing: bool = True
) -> Trajectory:
    """Return a random trajectory of 8 to 20 tokens with random routing (distinct ids in every row)."""
    prompt, response = int(rng.integers(4, 9)), int(rng.integers(4, 12))
    tokens = rng.integers(0, VOCAB, prompt + response).astype(np.int32)
    wide = np.argsort(rng.random((len(tokens) - 1, len(spec.moe_layers), spec.num_experts)), -1)[..., : spec.top_k]
    trace = make_trace(spec, wide, tokens) if routing else None
    logprobs = (-5 + rng.random(response)).astype(np.float32)
    return Trajectory(group, member, tokens, prompt, logprobs, trace, 0.0, "stop", 0, spec.fingerprint)


def make_trace(spec: ModelSpec, wide: NDArray[np.integer], tokens: NDArray[np.int32]) -> RoutingTrace:
    """Return the record of `wide` ids `[rows, layers, k]`."""
    return RoutingTrace.record(
        wide, tokens, layers=spec.moe_layers, num_experts=spec.num_experts, weight_version=0, engine="test"
    )


def make_batch(spec: ModelSpec, groups: int = 4, members: int = 3, seed: int = 0, routing: bool = True) -> Batch:
    """Return a batch of random trajectories."""
    rng = np.random.default_rng(seed)
    return Batch.pack([make_trajectory(spec, rng, g, m, routing) for g in range(groups) for m in range(members)])


def make_advantages(batch: Batch, seed: int = 0) -> NDArray[np.float32]:
    """Return random advantages `[n]`."""
    return np.random.default_rng(seed).standard_normal(len(batch)).astype(np.float32)


@contextmanager
def joined_worker(config: Config, directory: Path, updates: int = 10) -> Iterator[TrainerWorker]:
    """Yield a worker that is the only rank, in this process."""
    worker = TrainerWorker(config, str(directory), 0, 1, updates)
    worker.join(*worker.host_port())
    try:
        yield worker
    finally:
        worker.close()


def prepare(
    policy: Policy, batch: Batch, size: int = 4, rank: int = 0, world: int = 1
) -> tuple[StepBatch, list[MicroBatch]]:
    """Return the joined step and one rank's microbatches of its only mini-step."""
    spec = policy.arch.spec
    step = StepBatch.join([batch], make_advantages(batch), spec)
    plan: Shares = share(step.trajectories, mini_steps=1, rank=rank, world=world, micro_batch_size=size)
    return step, [microbatch(step, samples, spec) for samples in plan[0]]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Return a copy of every reduced gradient by parameter name."""
    return {name: parameter.main_grad.clone() for name, parameter in policy.chunks[0].named_parameters()}


def own_routing(policy: Policy, step: StepBatch, microbatches: Sequence[MicroBatch]) -> list[NDArray[np.int64]]:
    """Return the ids `[b, s, layers, k]` that the model itself chooses in each microbatch, in its own order."""
    seen: list[torch.Tensor] = []
    account = replay._Visit.account

    def record(visit: Any, routing_map: torch.Tensor) -> None:
        seen.append(visit._own.clone())
        account(visit, routing_map)

    replay._Visit.account = record  # type: ignore[method-assign]
    try:
        # With gradients, as in training: megatron-core 0.19 leaves the top-k unsorted without.
        policy.chunks[0].eval()
        policy._forward(policy.chunks, microbatches, step, RoutingUse(force=False))
    finally:
        replay._Visit.account = account  # type: ignore[method-assign]
    layers = len(policy.arch.spec.moe_layers)
    found = []
    for i, one in enumerate(microbatches):
        b, s = one.tokens.shape
        chosen = torch.stack(seen[i * layers : (i + 1) * layers], 1)
        found.append(chosen.reshape(s, b, layers, -1).transpose(0, 1).numpy())
    return found
