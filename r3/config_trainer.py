"""Sections of the trainer side: replay, ranks and optimizer, the objective, and the weights' way to the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from r3.config_section import Section


class ReplayConfig(Section):
    """What the trainer does with the record."""

    mode: Literal["none", "r3"] = "r3"
    """`r3`: force the recorded top-k in the old-log-prob and every update pass; `none`: the trainer's own routing."""


class TrainerConfig(Section):
    """Megatron-core trainer ranks and their optimizer."""

    processes: int = Field(1, ge=1)
    """Trainer ranks: data parallel x the sizes below."""
    gpus_per_process: float = Field(0, ge=0)
    """GPUs per rank: 1, a share of one where the engine has the rest, or 0 to train on the CPU over gloo."""
    mem_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the GPU's memory that a rank may take; on a GPU shared with an engine, what `rollout` leaves."""
    placement: Literal["pack", "spread"] = "pack"
    """Trainer ranks on as few, or as many, nodes of the Ray cluster as possible."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; bfloat16 keeps fp32 main parameters."""
    micro_batch_size: int = Field(64, ge=1)
    """Trajectories per microbatch."""
    packed: bool = True
    """Sequences end to end in one row (THD) instead of right-padded to the longest."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks that share every matrix (with sequence parallelism)."""
    pipeline_parallel: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel: int = Field(1, ge=1)
    """Ranks that share every sequence."""
    expert_parallel: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel: int | None = Field(None, ge=1)
    """Ranks that share one expert's matrices; null takes tensor_parallel."""
    distributed_optimizer: bool = False
    """Shard optimizer state and main parameters over the data-parallel ranks."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to experts on other ranks."""
    experts: Literal["auto", "sequential", "grouped"] = "auto"
    """One matrix product per expert, or grouped ones for all of a rank's; `auto`: grouped on a GPU in bfloat16."""
    transformer_engine: bool = False
    """Transformer Engine's layers, where it is installed; only after `python -m r3.doctor replay` passed with them."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recompute; `selective` recomputes attention cores and MoE layers."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate (AdamW)."""
    lr_warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, over the optimizer steps of the run."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW beta 1."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW beta 2."""
    clip_grad: float = Field(1.0, gt=0)
    """Gradient norm limit."""
    start_timeout_s: float = Field(600, gt=0)
    """Longest start of all ranks, in seconds."""
    timeout_s: float = Field(1800, gt=0)
    """Longest training step, in seconds."""

    @property
    def data_parallel(self) -> int:
        """Ranks that work on different trajectories."""
        return self.processes // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

    @property
    def expert_tensor(self) -> int:
        """`expert_tensor_parallel` with its default resolved."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @model_validator(mode="after")
    def _gpus(self) -> TrainerConfig:
        share = self.gpus_per_process
        if share > 1:
            raise ValueError(f"trainer.gpus_per_process={share:g}: a rank works on one GPU; raise trainer.processes")
        if 0 < share < 1 and self.processes > 1:
            raise ValueError(
                f"trainer.gpus_per_process={share:g} with trainer.processes={self.processes}: NCCL connects no two "
                "ranks on one GPU; give every rank a whole one"
            )
        return self

    @model_validator(mode="after")
    def _layout(self) -> TrainerConfig:
        tensor, stages = self.tensor_parallel, self.pipeline_parallel
        dense = tensor * stages * self.context_parallel
        if self.processes % dense:
            raise ValueError(
                f"trainer.processes={self.processes} is not divisible by tensor_parallel x pipeline_parallel x "
                f"context_parallel = {dense}"
            )
        experts = self.expert_tensor * self.expert_parallel * stages
        if self.processes % experts:
            raise ValueError(
                f"trainer.processes={self.processes} is not divisible by expert_tensor_parallel x expert_parallel x "
                f"pipeline_parallel = {experts}"
            )
        if self.expert_tensor != tensor and self.expert_parallel == 1:
            raise ValueError(
                f"trainer.tensor_parallel={tensor} with expert_tensor_parallel={self.expert_tensor} and "
                "expert_parallel=1: Megatron-core would reduce the experts' gradients over the wrong ranks; leave "
                "expert_tensor_parallel unset or use expert_parallel > 1"
            )
        if self.virtual_pipeline > 1 and stages == 1:
            raise ValueError("trainer.virtual_pipeline needs pipeline_parallel > 1; a single stage has no bubble")
        return self


class GrpoConfig(Section):
    """The objective (Group Relative Policy Optimization, arXiv 2402.03300)."""

    group_size: int = Field(8, ge=2)
    """Samples per prompt."""
    mini_steps: int = Field(1, ge=1)
    """Optimizer updates per batch; each takes an equal share of the groups."""
    advantage: Literal["std", "mean", "leave_one_out"] = "std"
    """Group baseline: mean, divided by the group's standard deviation; mean only; leave-one-out mean."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL penalty towards the initial model; 0 keeps no reference model."""


class WeightsConfig(Section):
    """Weight transfer from trainer to engines."""

    transport: Literal["auto", "object_store", "ipc", "broadcast"] = "auto"
    """Way to the engines: `ipc` where they share trainer rank 0's GPU, else `broadcast`; `auto` chooses."""
    verify: bool = True
    """Compare a checksum of every bucket that the trainer sent with one of what each engine rank received."""
    timeout_s: float = Field(300, gt=0)
    """Longest wait of a broadcast for its engines, to join and to take one bucket, in seconds."""
    bucket_mib: int = Field(256, ge=1)
    """Size of one flattened bucket, in MiB; `ipc` and `broadcast` hold two on the trainer's device.

    So large are also the batches in which other trainer ranks send their shards, two at once on either side.
    """
    flush_timeout_s: float = Field(30, gt=0)
    """How long a refused cache flush is retried, in seconds."""
    exchange_dir: Path | None = None
    """Directory that rollout workers and `sglang_http` servers both see; null: the temporary directory of one host."""
