"""Joining and leaving the trainer's process group and Megatron's parallel state; where this rank stands in it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.config import TrainerConfig
from r3.trainer.megatron import model_parallel_cuda_manual_seed, parallel_state


@dataclass(frozen=True, slots=True)
class Place:
    """Rank and size of this process in every kind of parallelism."""

    data: int
    data_size: int
    context: int
    context_size: int
    tensor: int
    tensor_size: int
    stage: int
    stages: int

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its tokens: their logits are on the last stage, alike on all tensor ranks."""
        return self.stage == self.stages - 1 and self.tensor == 0


def open_store(world: int) -> tuple[dist.TCPStore, str]:
    """Open the rendezvous of the ranks on a free port, on rank 0; return it and the host that others reach it by."""
    host = "127.0.0.1" if world == 1 else _own_address()
    return dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False), host


def join(
    store: dist.Store, rank: int, world: int, *, seed: int, timeout_s: float, layout: TrainerConfig | None = None
) -> None:
    """Join as `rank` of `world` and set up Megatron's groups (data parallel alone by default); waits for every rank.

    CPU tensors travel over gloo and CUDA tensors over NCCL, so small host arrays never need the device.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    layout = layout or TrainerConfig(processes=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def leave() -> None:
    """Undo `join`; harmless when nothing was joined."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def place() -> Place:
    """Return where this rank stands."""
    return Place(
        data=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        stages=parallel_state.get_pipeline_model_parallel_world_size(),
    )


def sum_over_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of a float64 host array over all ranks, the same on every rank."""
    total = torch.from_numpy(np.array(values, dtype=np.float64))
    dist.all_reduce(total)
    return total.numpy()


def sum_over_model(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` in place over the ranks that hold one data-parallel replica: tensor, context and pipeline."""
    for group in (
        parallel_state.get_tensor_and_context_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            dist.all_reduce(values, group=group)
    return values


def any_over_stages(flags: torch.Tensor) -> torch.Tensor:
    """Return the logical or of bool `flags` `[rows]` over the pipeline stages that worked on the same rows."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return flags
    found = flags.to(torch.int32)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.bool()


def device() -> torch.device:
    """Return this rank's device: the GPU that it was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def host_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of undefined values that `upload` need not copy on the host."""
    array: NDArray[Any] = _pinned(shape, dtype).numpy() if torch.cuda.is_available() else np.empty(shape, dtype)
    return array


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    return torch.empty_like(torch.from_numpy(np.empty(shape, dtype)), pin_memory=True)


def upload(array: NDArray[Any], where: torch.device) -> torch.Tensor:
    """Return a copy of a host array on a device; on a GPU the copy is queued, so that the host does not wait for it.

    An array of `host_array` must stay as it is until the copy is made.
    """
    if where.type != "cuda" or not array.size:
        return torch.from_numpy(np.array(array)).to(where)
    if array.flags.writeable and (here := torch.from_numpy(array)).is_pinned():
        return here.to(where, non_blocking=True)
    # Copied once, into pinned memory; `from_numpy(...).pin_memory()` takes no read-only array without a copy before.
    staged = _pinned(array.shape, array.dtype)
    np.copyto(staged.numpy(), array)
    return staged.to(where, non_blocking=True)


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
