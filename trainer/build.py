"""The parts that a policy is made of: model chunks under Megatron's DDP, optimizer, learning-rate schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from r3.config import Config
from r3.trainer.convert import load_weights
from r3.trainer.experts import uses_grouped
from r3.trainer.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    MegatronOptimizer,
    OptimizerConfig,
    OptimizerParamScheduler,
    cuda_type_names,
    get_megatron_optimizer,
)
from r3.trainer.model import DTYPES, Architecture, build_model, engine_changes, layout_changes, transformer_config
from r3.trainer.parallel import device


def build_layout(config: Config, arch: Architecture, *, trained: bool = True) -> Any:
    """Return Megatron's configuration of a model in the run's layout; only a `trained` one recomputes activations."""
    trainer = config.trainer
    recompute = trainer.recompute if trained else "none"
    changes = layout_changes(trainer) | engine_changes(trainer)
    return transformer_config(arch, dtype=DTYPES[trainer.dtype], recompute=recompute, **changes)


def build_ddp(config: Config, arch: Architecture, layout: Any, directory: str | Path) -> list[DistributedDataParallel]:
    """Return this stage's chunks of the trainable model under Megatron's DDP, with the checkpoint's weights."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # gloo has no AVG; with a per-token loss Megatron divides by the token count itself.
        average_in_collective=False,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.trainer.distributed_optimizer,
        # A gradient that is not finite is skipped and counted here, not raised.
        check_for_nan_in_grad=False,
    )
    chunks = build_chunks(config, arch, layout, directory, replay=True)
    return [
        DistributedDataParallel(config=layout, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_chunks(
    config: Config, arch: Architecture, layout: Any, directory: str | Path, *, replay: bool
) -> list[torch.nn.Module]:
    """Return this stage's chunks in the compute dtype and on the device, with the checkpoint's weights."""
    virtual = config.trainer.virtual_pipeline
    stages = range(virtual) if virtual > 1 else [None]
    grouped = uses_grouped(arch, config.trainer)
    chunks = [build_model(arch, layout, replay=replay, grouped=grouped, vp_stage=stage) for stage in stages]
    load_weights(chunks, arch, directory)
    return [_in_compute_dtype(chunk, layout) for chunk in chunks]


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Return Megatron's AdamW over the model's parameters (fp32 main parameters under bfloat16)."""
    trainer = config.trainer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        min_lr=0.0,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        clip_grad=trainer.clip_grad,
        bf16=trainer.dtype == "bfloat16",
        params_dtype=DTYPES[trainer.dtype],
        use_distributed_optimizer=trainer.distributed_optimizer,
    )
    with cuda_type_names():
        return get_megatron_optimizer(settings, chunks)


def build_schedule(config: Config, optimizer: MegatronOptimizer, updates: int) -> OptimizerParamScheduler:
    """Return Megatron's schedule: linear warm-up, then constant or decay to 0 over `updates` optimizer updates."""
    trainer = config.trainer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=trainer.lr,
        min_lr=0.0,
        lr_warmup_steps=trainer.lr_warmup_steps,
        lr_decay_steps=max(updates, trainer.lr_warmup_steps + 1),
        lr_decay_style=trainer.lr_decay,
        start_wd=trainer.weight_decay,
        end_wd=trainer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def build_reference(config: Config, arch: Architecture, directory: str | Path) -> list[torch.nn.Module]:
    """Return this stage's chunks of the frozen initial model, which is never replayed."""
    chunks = build_chunks(config, arch, build_layout(config, arch, trained=False), directory, replay=False)
    return [chunk.requires_grad_(False).eval() for chunk in chunks]


def _in_compute_dtype(model: torch.nn.Module, layout: Any) -> torch.nn.Module:
    model = model.to(device())
    return Float16Module(layout, model) if layout.bf16 else model
