"""Joining and leaving the trainer's process group and Megatron's parallel state."""

from __future__ import annotations

import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.trainer.megatron import model_parallel_cuda_manual_seed, parallel_state


def open_store(world: int) -> tuple[dist.TCPStore, str]:
    """Open the rendezvous of the ranks on a free port, on rank 0; return it and the host that others reach it by."""
    host = "127.0.0.1" if world == 1 else _own_address()
    return dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False), host


def join(store: dist.Store, rank: int, world: int, *, seed: int, timeout_s: float) -> None:
    """Join as `rank` of `world` and set up Megatron's groups; blocks until every rank has come.

    CPU tensors travel over gloo and CUDA tensors over NCCL, so small host arrays never need the device.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def leave() -> None:
    """Undo `join`; harmless when nothing was joined."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of a float64 host array over the data-parallel ranks, the same on every rank."""
    total = torch.from_numpy(np.array(values, dtype=np.float64))
    dist.all_reduce(total)
    return total.numpy()


def device() -> torch.device:
    """Return this rank's device: the GPU that it was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
