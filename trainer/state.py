"""What one trainer rank holds between two steps, as one file: model, optimizer, schedule and random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r3.checkpoint import FileRecord
from r3.errors import CheckpointError
from r3.trainer.megatron import DistributedOptimizer, MegatronOptimizer, get_cuda_rng_tracker
from r3.trainer.policy import Policy

# What the config decides: a resumed run takes these from its own, not from the saved parameter groups.
_CONFIGURED = ("max_lr", "min_lr", "betas", "eps")


def save_state(policy: Policy, version: int, file: Path) -> FileRecord:
    """Write the rank's state; raise `CheckpointError` when the file cannot be written."""
    state = {
        "weight_version": version,
        "model": [chunk.state_dict() for chunk in policy.chunks],
        "optimizer": [_optimizer_state(part) for part in _parts(policy.optimizer)],
        "schedule": policy.schedule.num_steps,
        "random": _random_states(),
    }
    try:
        torch.save(state, file)
        return FileRecord.of(file)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        raise CheckpointError(
            f"{file} cannot be written: {error}; every trainer rank needs room in, and access to, run.dir"
        ) from error


def load_state(policy: Policy, file: Path) -> int:
    """Restore what `save_state` wrote and return the weight version; raise `CheckpointError` where it does not fit."""
    try:
        # Tensors and plain values only: nothing in the file is executed.
        state = torch.load(file, map_location="cpu", weights_only=True)
        for chunk, weights in zip(policy.chunks, state["model"], strict=True):
            chunk.load_state_dict(weights)
        for part, saved in zip(_parts(policy.optimizer), state["optimizer"], strict=True):
            _load_optimizer(part, saved)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist on this node; run.dir must be on a shared file system") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} does not fit this model and optimizer: {error}") from error
    # Megatron's own loader insists on the learning rate and length of the first run, which a user may well change.
    policy.schedule.num_steps = 0
    policy.schedule.step(increment=state["schedule"])
    _restore_random(state["random"])
    return int(state["weight_version"])


def _parts(optimizer: MegatronOptimizer) -> Sequence[Any]:
    """Return the optimizers that Megatron chains: one for dense parameters and one for experts, where they differ."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _optimizer_state(part: Any) -> dict[str, Any]:
    """Return everything that this rank holds.

    A distributed optimizer leaves its shards out of its own state dict and would gather them on one rank; here every
    rank writes its own, with the fp32 main parameters, which nothing else holds.
    """
    if not isinstance(part, DistributedOptimizer):
        return {"whole": part.state_dict()}
    shards = [shard.detach() for group in part.optimizer.param_groups for shard in group["params"]]
    return {"inner": part.optimizer.state_dict(), "shards": shards}


def _load_optimizer(part: Any, state: dict[str, Any]) -> None:
    inner = state["inner"] if "inner" in state else state["whole"].get("optimizer", state["whole"])
    # Before the load: Megatron-core 0.19.2 finds a group by such values and refuses one that a user has changed.
    for group, saved in zip(part.param_groups, inner["param_groups"], strict=True):
        saved.update({key: group[key] for key in _CONFIGURED if key in group})
    if "whole" in state:
        part.load_state_dict(state["whole"])
    else:
        part.optimizer.load_state_dict(inner)
        found = [shard for group in part.optimizer.param_groups for shard in group["params"]]
        for shard, saved in zip(found, state["shards"], strict=True):
            shard.data.copy_(saved)


def _random_states() -> dict[str, Any]:
    """Return the states of every generator in this process, as tensors and plain values."""
    kind, words, *position = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, words, *position = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
