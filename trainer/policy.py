"""The model that is trained: Megatron's DDP, optimizer and schedules round it, and the two passes that a step needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.config import Config
from r3.metrics import RouterCounts
from r3.trainer.batching import MicroBatch, StepBatch
from r3.trainer.convert import load_weights
from r3.trainer.loss import Objective, policy_loss, token_logprobs
from r3.trainer.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    MegatronOptimizer,
    OptimizerConfig,
    OptimizerParamScheduler,
    cuda_type_names,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
)
from r3.trainer.model import DTYPES, Architecture, build_model, transformer_config
from r3.trainer.parallel import device
from r3.trainer.replay import MicrobatchRouting, ReplayContext
from r3.trainer.rows import RowClasses

LossOutput = tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]
LossFunction = Callable[[MicroBatch, torch.Tensor], LossOutput]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoutingUse:
    """What a pass does with the records: `force` replays them, else they are compared; `audit` adds lag overlaps."""

    force: bool
    audit: bool = False


@dataclass(frozen=True, slots=True)
class LogprobPass:
    """`logprobs` float64 `[T]` nats over the step's response tokens, 0 where another rank has the token."""

    logprobs: Floats
    counts: RouterCounts
    replay_s: float


@dataclass(frozen=True, slots=True)
class UpdateSums:
    """Sums over this rank's trained tokens of one update, to be added up over ranks."""

    tokens: float
    loss: float
    entropy: float
    clipped: float
    kl: float


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update; `grad_norm` is None when a gradient was not finite and the weights were left alone."""

    sums: UpdateSums
    grad_norm: float | None
    lr: float
    counts: RouterCounts
    replay_s: float


class Policy:
    """A trainable model with its replay context, and a frozen reference when a KL penalty is asked for.

    Needs the parallel state (`r3.trainer.parallel.join`). `updates` is the number of optimizer updates in the run, over
    which the learning rate decays.
    """

    def __init__(self, config: Config, arch: Architecture, directory: str | Path, updates: int) -> None:
        self._config, self._arch = config, arch
        self._objective = Objective(config.grpo.clip_low, config.grpo.clip_high, config.grpo.kl_coef)
        self._layout = transformer_config(arch, dtype=DTYPES[config.trainer.dtype], recompute=config.trainer.recompute)
        self.model = build_ddp(arch, self._layout, directory)
        self.replay = ReplayContext(self.model, arch.spec)
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer, updates)
        self._layout.finalize_model_grads_func = finalize_model_grads
        self._layout.grad_scale_func = self.optimizer.scale_loss
        self._reference = _reference(config, arch, directory) if config.grpo.kl_coef > 0 else None

    @torch.no_grad()
    def logprobs(self, microbatches: Sequence[MicroBatch], step: StepBatch, use: RoutingUse | None) -> LogprobPass:
        """Return the log-probs of the response tokens in `microbatches`; `use` None ignores the records."""
        self.model.eval()
        return self._forward(self.model, microbatches, step, use)

    @torch.no_grad()
    def reference_logprobs(self, microbatches: Sequence[MicroBatch], step: StepBatch) -> Floats | None:
        """Return the same of the reference model, which is never replayed; None without one."""
        if self._reference is None:
            return None
        return self._forward(self._reference, microbatches, step, None).logprobs

    def update(
        self,
        microbatches: Sequence[MicroBatch],
        step: StepBatch,
        old: Floats,
        reference: Floats | None,
        use: RoutingUse | None,
    ) -> Update:
        """Run one optimizer update under the arguments of `accumulate`.

        A gradient that is not finite leaves weights, optimizer state and learning rate as they are.
        """
        sums, counts, replay_s = self.accumulate(microbatches, step, old, reference, use)
        grad_norm = None
        if self.gradients_finite():
            # Before the update: the scheduler starts at 0, so the other order would waste the first update.
            self.schedule.step(increment=1)
            _, grad_norm, _ = self.optimizer.step()
        lr = float(self.optimizer.param_groups[0]["lr"])
        return Update(sums, None if grad_norm is None else float(grad_norm), lr, counts, replay_s)

    def accumulate(
        self,
        microbatches: Sequence[MicroBatch],
        step: StepBatch,
        old: Floats,
        reference: Floats | None,
        use: RoutingUse | None,
    ) -> tuple[UpdateSums, RouterCounts, float]:
        """Compute the gradient into the DDP buffers, reduced over ranks; return sums, counters and replay's seconds.

        `old`, `reference`: `[T]` log-probs of the step's response tokens, nats. Loss and gradient are means over the
        trained tokens of all ranks.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = partial(self._policy_loss, step, old, reference)
        reports, counts, replay_s = self._run(self.model, microbatches, use, loss)
        sums = np.sum([report["sums"].cpu().numpy() for report in reports], axis=0)
        return UpdateSums(*sums.tolist()), counts, replay_s

    def gradients_finite(self) -> bool:
        """Tell, alike on every rank, whether every reduced gradient is finite."""
        buffers = [*self.model.buffers, *self.model.expert_parallel_buffers]
        finite = torch.stack([buffer.grad_data.isfinite().all() for buffer in buffers]).all().int().cpu()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _forward(
        self, model: torch.nn.Module, microbatches: Sequence[MicroBatch], step: StepBatch, use: RoutingUse | None
    ) -> LogprobPass:
        reports, counts, replay_s = self._run(model, microbatches, use, self._no_loss, forward_only=True)
        flat = np.zeros(len(step.rollout_logprobs), np.float64)
        for microbatch, report in zip(microbatches, reports, strict=True):
            flat[microbatch.targets[microbatch.targets >= 0]] = report["logprobs"].detach().cpu().numpy()
        return LogprobPass(flat, counts, replay_s)

    def _run(
        self,
        model: torch.nn.Module,
        microbatches: Sequence[MicroBatch],
        use: RoutingUse | None,
        loss: LossFunction,
        *,
        forward_only: bool = False,
    ) -> tuple[list[Mapping[str, Any]], RouterCounts, float]:
        """Push the microbatches through Megatron's schedule; return the loss reports, replay's counters and seconds."""
        where = device()

        def forward_step(source: Any, module: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., LossOutput]]:
            microbatch = next(source)
            tokens, positions = (
                torch.from_numpy(a.copy()).to(where) for a in (microbatch.tokens, microbatch.positions)
            )
            routing = None if use is None else _routing(microbatch, use, where)
            if self._reference is not None and module is self._reference:
                return module(tokens, positions, None), partial(loss, microbatch)
            output = self.replay.run(routing, lambda: module(tokens, positions, None))
            return output, partial(loss, microbatch)

        with self.replay.measured(where) as tally:
            reports = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=model,
                num_microbatches=len(microbatches),
                seq_length=max(microbatch.tokens.shape[1] for microbatch in microbatches),
                micro_batch_size=max(len(microbatch.tokens) for microbatch in microbatches),
                forward_only=forward_only,
            )
        rows = sum((microbatch.rows for microbatch in microbatches), RowClasses())
        return reports, tally.counts(rows), tally.seconds

    def _trained(self, microbatch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return step-wide indices, log-probs and entropies of the microbatch's trained tokens, each `[n]`."""
        targets = torch.from_numpy(microbatch.targets).to(logits.device)
        labels = torch.from_numpy(microbatch.labels).to(logits.device)
        rows = targets >= 0
        logprobs, entropy = token_logprobs(logits[rows], labels[rows], self._config.rollout.temperature)
        return targets[rows], logprobs, entropy

    def _no_loss(self, microbatch: MicroBatch, logits: torch.Tensor) -> LossOutput:
        targets, logprobs, _ = self._trained(microbatch, logits)
        return logprobs.sum(), _count(targets), {"logprobs": logprobs}

    def _policy_loss(
        self, step: StepBatch, old: Floats, reference: Floats | None, microbatch: MicroBatch, logits: torch.Tensor
    ) -> LossOutput:
        targets, logprobs, entropy = self._trained(microbatch, logits)

        def trained(values: NDArray[np.floating]) -> torch.Tensor:
            flat = values[microbatch.targets[microbatch.targets >= 0]]
            return torch.from_numpy(flat.astype(np.float32)).to(logits.device)

        terms = policy_loss(
            self._objective,
            logprobs,
            trained(old),
            trained(step.advantages),
            None if reference is None else trained(reference),
        )
        detached = (terms.loss.detach(), entropy, terms.clipped, terms.kl)
        sums = torch.stack([torch.ones_like(entropy).double().sum(), *(part.double().sum() for part in detached)])
        return terms.loss.sum(), _count(targets), {"sums": sums}


def build_ddp(arch: Architecture, layout: Any, directory: str | Path) -> DistributedDataParallel:
    """Return the trainable model under Megatron's DDP, with the checkpoint's weights."""
    model = build_model(arch, layout, replay=True)
    load_weights(model, arch, directory)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # gloo has no AVG; with a per-token loss Megatron divides by the token count itself.
        average_in_collective=False,
        overlap_grad_reduce=False,
        use_distributed_optimizer=False,
        # A gradient that is not finite is skipped and counted here, not raised.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(config=layout, ddp_config=settings, module=_in_compute_dtype(model, layout))


def build_optimizer(config: Config, model: DistributedDataParallel) -> MegatronOptimizer:
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
        use_distributed_optimizer=False,
    )
    with cuda_type_names():
        return get_megatron_optimizer(settings, [model])


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


def _reference(config: Config, arch: Architecture, directory: str | Path) -> torch.nn.Module:
    layout = transformer_config(arch, dtype=DTYPES[config.trainer.dtype])
    model = build_model(arch, layout, replay=False)
    load_weights(model, arch, directory)
    return _in_compute_dtype(model, layout).requires_grad_(False).eval()


def _in_compute_dtype(model: torch.nn.Module, layout: Any) -> torch.nn.Module:
    model = model.to(device())
    return Float16Module(layout, model) if layout.bf16 else model


def _routing(microbatch: MicroBatch, use: RoutingUse, where: torch.device) -> MicrobatchRouting | None:
    if microbatch.experts is None:
        return None
    experts, recorded = (torch.from_numpy(array).to(where) for array in (microbatch.experts, microbatch.recorded))
    return MicrobatchRouting(experts, recorded, force=use.force, audit=use.audit)


def _count(targets: torch.Tensor) -> torch.Tensor:
    return torch.tensor(len(targets), dtype=torch.int, device=targets.device)
