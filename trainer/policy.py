"""The model that is trained: Megatron's DDP, optimizer and schedules round it, and the two passes that a step needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3.config import Config
from r3.metrics import RouterCounts
from r3.routing import expert_dtype
from r3.trainer.architecture import Architecture, require_layout
from r3.trainer.batching import Form, MicroBatch, StepBatch
from r3.trainer.build import build_ddp, build_layout, build_optimizer, build_reference, build_schedule
from r3.trainer.convert import WeightExport
from r3.trainer.feed import finish_checks, largest_shape
from r3.trainer.loss import Objective, policy_loss, token_logprobs
from r3.trainer.megatron import finalize_model_grads, get_forward_backward_func, parallel_state
from r3.trainer.packing import Packing
from r3.trainer.parallel import device, place, upload
from r3.trainer.replay import ReplayContext
from r3.trainer.routed import MicrobatchRouting
from r3.trainer.rows import RowClasses
from r3.trainer.sampling import AuditRows, audit_rows
from r3.trainer.tally import Tally
from r3.trainer.trace import Trace
from r3.trainer.use import RoutingUse as RoutingUse

LossOutput = tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]
LossFunction = Callable[[MicroBatch, torch.Tensor], LossOutput]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LogprobPass:
    """`logprobs` float64 `[T]` nats over the step's response tokens, 0 where another rank has the token.

    `own`: of a pass that keeps the model's own choice, the microbatches with it in the place of the record. `trace`:
    where `RoutingUse.trace` asks for it.
    """

    logprobs: Floats
    counts: RouterCounts
    replay_s: float
    own: tuple[MicroBatch, ...] = ()
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class _Ran:
    """What one pass through the schedule left; `own`: per microbatch the ids `[s * b, k]` by local MoE layer."""

    reports: list[Mapping[str, Any]]
    counts: RouterCounts
    tally: Tally
    own: tuple[dict[int, torch.Tensor], ...]


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

    Needs the parallel state (`r3.trainer.parallel.join`). `updates` is the number of
    optimizer updates in the run, over which the learning rate decays.
    """

    def __init__(self, config: Config, arch: Architecture, directory: str | Path, updates: int) -> None:
        require_layout(arch, config.trainer)
        self._config, self.arch, self.place = config, arch, place()
        self._objective = Objective(config.grpo.clip_low, config.grpo.clip_high, config.grpo.kl_coef)
        self._layout = build_layout(config, arch)
        self.chunks = build_ddp(config, arch, self._layout, directory)
        self.replay = ReplayContext(self.chunks, arch.spec)
        self.optimizer = build_optimizer(config, self.chunks)
        self.schedule = build_schedule(config, self.optimizer, updates)
        self._layout.finalize_model_grads_func = finalize_model_grads
        self._layout.grad_scale_func = self.optimizer.scale_loss
        self._reference = build_reference(config, arch, directory) if config.grpo.kl_coef > 0 else None

    @cached_property
    def export(self) -> WeightExport:
        """The walk over its weights, under the names of its checkpoint."""
        return WeightExport(self.chunks, self.arch, batch_bytes=self._config.weights.bucket_mib * 2**20)

    @property
    def data(self) -> tuple[int, int]:
        """This rank's data-parallel rank and their number."""
        return self.place.data, self.place.data_size

    @property
    def gradients_sharded(self) -> bool:
        """Whether a rank holds only its part of a reduced gradient."""
        return self._config.trainer.distributed_optimizer

    @property
    def form(self) -> Form:
        """How this rank's microbatches must be laid out."""
        where = self.place
        return Form(
            packed=self._config.trainer.packed,
            context=(where.context, where.context_size),
            sequence=(where.tensor, where.tensor_size),
            columns=self.replay.columns,
        )

    @torch.no_grad()
    def logprobs(self, microbatches: Sequence[MicroBatch], step: StepBatch, use: RoutingUse | None) -> LogprobPass:
        """Return the log-probs of the response tokens in `microbatches`; `use` None ignores the records."""
        for chunk in self.chunks:
            chunk.eval()
        return self._forward(self.chunks, microbatches, step, use)

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
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = partial(self._policy_loss, step, old, reference)
        ran = self._run(self.chunks, microbatches, use, loss)
        sums = sum((report["sums"].cpu().numpy() for report in ran.reports), np.zeros(len(fields(UpdateSums))))
        return UpdateSums(*sums.tolist()), ran.counts, ran.tally.seconds

    def gradients_finite(self) -> bool:
        """Tell, alike on every rank, whether every reduced gradient is finite."""
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        finite = torch.stack([buffer.grad_data.isfinite().all() for buffer in buffers]).all().int().cpu()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _forward(
        self,
        chunks: Sequence[torch.nn.Module],
        microbatches: Sequence[MicroBatch],
        step: StepBatch,
        use: RoutingUse | None,
    ) -> LogprobPass:
        ran = self._run(chunks, microbatches, use, self._no_loss, forward_only=True)
        flat = np.zeros(len(step.rollout_logprobs), np.float64)
        for report in ran.reports:
            flat[report["targets"].cpu().numpy()] = report["logprobs"].detach().cpu().numpy()
        own = zip(microbatches, ran.own, strict=True) if use is not None and use.keep else ()
        # By what all ranks know alike: a stage without an MoE layer of its own must run the passes of the others.
        spec = self.arch.spec
        kept = tuple(_with_own(one, ids, spec.num_experts) for one, ids in own if one.experts is not None)
        traces = use is not None and use.trace
        trace = Trace.of(ran.tally.flags, microbatches, len(spec.moe_layers)) if traces else None
        return LogprobPass(flat, ran.counts, ran.tally.seconds, kept, trace)

    def _run(
        self,
        chunks: Sequence[torch.nn.Module],
        microbatches: Sequence[MicroBatch],
        use: RoutingUse | None,
        loss: LossFunction,
        *,
        forward_only: bool = False,
    ) -> _Ran:
        """Push the microbatches through Megatron's schedule; return loss reports, replay's counters and their tally.

        The reports are those of the rank that speaks for its tokens (`Place.reports`), the others have none.
        """
        where = device()
        own: tuple[dict[int, torch.Tensor], ...] = tuple({} for _ in range(len(microbatches)))

        def forward_step(source: Any, module: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., LossOutput]]:
            index, microbatch = next(source)
            tokens, positions = (upload(array, where) for array in (microbatch.tokens, microbatch.positions))
            packing = None if microbatch.lengths is None else Packing.of(microbatch.lengths, where)
            call = partial(module, tokens, positions, None, packed_seq_params=packing)
            if chunks is self._reference:
                return call(), partial(loss, microbatch)
            chunk = next(index for index, one in enumerate(chunks) if one is module)
            begin = time.perf_counter()
            routing = _routing(microbatch, use, where, own[index])
            if routing.experts is not None:
                tally.spent_since(begin)
            return self.replay.run(routing, call, chunk), partial(loss, microbatch)

        sources = [iter(enumerate(microbatches)) for _ in chunks]
        most_rows, length = largest_shape(microbatches)
        with self.replay.measured(where) as tally:
            reports = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=sources if len(chunks) > 1 else sources[0],
                model=list(chunks) if len(chunks) > 1 else chunks[0],
                num_microbatches=len(microbatches),
                seq_length=length,
                micro_batch_size=most_rows,
                forward_only=forward_only,
            )
            finish_checks(microbatches)
        rows = sum((microbatch.rows for microbatch in microbatches), RowClasses())
        return _Ran(reports if self.place.reports else [], tally.counts(rows), tally, own)

    def _trained(self, microbatch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return step-wide indices, log-probs and entropies of the microbatch's trained tokens, each `[n]`."""
        # On the host, where the number of trained rows is known without a look at the device.
        rows = np.flatnonzero(microbatch.targets >= 0)
        targets, labels, picked = (
            upload(array, logits.device)
            for array in (microbatch.targets.reshape(-1)[rows], microbatch.labels.reshape(-1)[rows], rows)
        )
        group = parallel_state.get_tensor_model_parallel_group()
        trained = logits.flatten(0, 1).index_select(0, picked)
        logprobs, entropy = token_logprobs(trained, labels, self._config.rollout.temperature, group)
        return targets, logprobs, entropy

    def _no_loss(self, microbatch: MicroBatch, logits: torch.Tensor) -> LossOutput:
        targets, logprobs, _ = self._trained(microbatch, logits)
        return logprobs.sum(), _count(targets), {"logprobs": logprobs, "targets": targets}

    def _policy_loss(
        self, step: StepBatch, old: Floats, reference: Floats | None, microbatch: MicroBatch, logits: torch.Tensor
    ) -> LossOutput:
        targets, logprobs, entropy = self._trained(microbatch, logits)

        def trained(values: NDArray[np.floating]) -> torch.Tensor:
            flat = values[microbatch.targets[microbatch.targets >= 0]]
            return upload(flat.astype(np.float32), logits.device)

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


def _routing(
    microbatch: MicroBatch, use: RoutingUse | None, where: torch.device, own: dict[int, torch.Tensor]
) -> MicrobatchRouting:
    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return upload(array, where)

    def audit() -> AuditRows:
        return audit_rows(microbatch.recorded, microbatch.order, microbatch.windows, microbatch.sampled)

    needed = use is not None and (use.force or use.compare or use.keep)
    audits = use is not None and use.audit
    recorded = microbatch.recorded
    if use is not None and use.sampled_rows:
        recorded = recorded & microbatch.sampled
    forces = use is not None and use.force
    return MicrobatchRouting(
        experts=tensor(microbatch.experts) if needed and microbatch.experts is not None else None,
        recorded=tensor(recorded),
        pads=tensor(microbatch.pads),
        force=forces,
        audit=audit if audits else None,
        audited=int(np.count_nonzero(microbatch.windows >= 0)) if audits else 0,
        layers=None if use is None else use.layers,
        fault=None if use is None else use.fault,
        own=own if use is not None and use.keep else None,
        trace=use is not None and use.trace,
        compare=use is not None and use.compare,
        choosing=tensor(np.flatnonzero(~(recorded | microbatch.filled).T)) if forces else None,
    )


def _with_own(microbatch: MicroBatch, ids: Mapping[int, torch.Tensor], num_experts: int) -> MicroBatch:
    """Return the microbatch with the model's own choice, `[s * b, k]` by local layer, as the record of every row."""
    if not ids:
        return microbatch
    b, rows = microbatch.pads.shape
    joined = torch.stack([ids[column] for column in sorted(ids)], 1).cpu().numpy().astype(expert_dtype(num_experts))
    experts = np.ascontiguousarray(joined.reshape(rows, b, *joined.shape[1:]).swapaxes(0, 1))
    return replace(microbatch, experts=experts, recorded=~microbatch.pads, filled=microbatch.pads)


def _count(targets: torch.Tensor) -> torch.Tensor:
    # `torch.tensor` would wait for the device.
    return torch.full((), len(targets), dtype=torch.int, device=targets.device)
