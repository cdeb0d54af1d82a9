"""One trainer rank: everything between receiving rollout batches and handing out new weights.

A plain class; `r3.trainer.group` runs it as a Ray actor. All methods that take batches are collective: every rank
calls them with the same arguments, of which the batches may lack blocks of routing that hold none of the rank's own
layers, works on its own share, and ends up with the same numbers.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from r3 import metrics
from r3.audit import Alarm, AuditError, find_alarms, overlap_metrics
from r3.checkpoint import FileRecord
from r3.config import Config
from r3.errors import ConfigError
from r3.metrics import RouterCounts
from r3.tokens import observes_tokens
from r3.trainer import parallel
from r3.trainer.batching import MicroBatch, StepBatch, plan_step, require_records
from r3.trainer.feed import MicroBatches, StepShare
from r3.trainer.megatron import megatron_core
from r3.trainer.model import DTYPES, Architecture
from r3.trainer.outcome import Recomputation, Recomputed, Rehearsal
from r3.trainer.outlet import WeightOutlet
from r3.trainer.policy import LogprobPass, Policy, RoutingUse, Update, UpdateSums
from r3.trainer.records import name
from r3.trainer.rehearsal import rehearse
from r3.trainer.state import load_state, save_state
from r3.trainer.tally import counts_over_ranks
from r3.trainer.trace import TokenObserver, Trace, Traced
from r3.trainer.weights import save_checkpoint, weight_buckets
from r3.types import Batch, ModelSpec, StepResult
from r3.weights import WeightBuckets

Metrics = dict[str, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Pass:
    """A log-prob pass over the whole step, the same on every rank."""

    logprobs: Floats
    counts: RouterCounts
    replay_s: float
    seconds: float
    own: tuple[MicroBatch, ...] = ()
    trace: Trace | None = None

    @property
    def traced(self) -> Traced:
        return Traced(self.logprobs, self.trace)


class TrainerWorker:
    """Trainer rank `rank` of `world` for the checkpoint in `model_dir`.

    `total_optimizer_steps`: updates of the whole run, over which the learning rate decays. Build every rank, then
    `join` them; nothing else works before. Raises `ConfigError` for a model that the trainer does not support.
    """

    def __init__(self, config: Config, model_dir: str, rank: int, world: int, total_optimizer_steps: int) -> None:
        if config.trainer.gpus_per_process and not torch.cuda.is_available():
            raise ConfigError(
                f"trainer.gpus_per_process={config.trainer.gpus_per_process:g}, but torch {torch.__version__} sees no "
                "CUDA device; set it to 0 to train on the CPU, or install a CUDA build of torch and its driver"
            )
        if not torch.cuda.is_available():
            # A rank's small matrices gain nothing from threads, and waiting ones steal the core from other ranks.
            torch.set_num_threads(1)
        self._config, self._directory = config, Path(model_dir)
        self._rank, self._world, self._updates = rank, world, total_optimizer_steps
        self._arch = Architecture.from_directory(model_dir)
        worst = config.metrics.worst_tokens
        self._tokens = TokenObserver(self._directory, self._arch.spec.moe_layers, worst, rank)
        self._store: dist.Store | None = None
        self._version = 0

    def host_port(self) -> tuple[str, int]:
        """Open the rendezvous on rank 0 and return where the other ranks find it."""
        store, host = parallel.open_store(self._world)
        self._store = store
        return host, store.port

    def join(self, host: str, port: int) -> None:
        """Join the other ranks, then build the model; blocks until all have come."""
        limit = self._config.trainer.timeout_s
        store = self._store or dist.TCPStore(host, port, self._world, is_master=False)
        layout = self._config.trainer
        if torch.cuda.is_available():
            # Ray shows a rank its own GPU alone. An engine that shares it has taken its part before.
            torch.cuda.set_per_process_memory_fraction(layout.mem_fraction)
        parallel.join(store, self._rank, self._world, seed=self._config.run.seed, timeout_s=limit, layout=layout)
        torch.use_deterministic_algorithms(self._config.run.deterministic)
        self.policy = Policy(self._config, self._arch, self._directory, self._updates)

    def close(self) -> None:
        """Leave the group and drop the model."""
        del self.policy
        parallel.leave()

    def spec(self) -> ModelSpec:
        """Return the facts of the model in training."""
        return self._arch.spec

    @property
    def layers(self) -> tuple[int, ...]:
        """Global index of every MoE layer in this rank's part of the model."""
        return tuple(self._arch.spec.moe_layers[column] for column in self.policy.replay.columns)

    def versions(self) -> dict[str, str]:
        """Return the versions of what this rank runs on."""
        where = parallel.device()
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron_core.__version__,
            "transformers": version("transformers"),
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        }

    @property
    def weight_version(self) -> int:
        """Number of steps that the weights have behind them."""
        return self._version

    def audit(self, *batches: Batch) -> Metrics:
        """Compare engine and trainer on some captured batches without training; the start-up canary.

        One pass under replay and one without: `mismatch/*`, `mismatch_native/*`, `router/*` with lag overlaps,
        `router/consulted_layers`. Raises `RoutingError` for a record that is missing or does not fit.
        """
        share_ = self._prepare(batches, None, mini_steps=1)
        require_records(share_.step)
        replayed = self._logprobs(share_, RoutingUse(force=True))
        native = self._logprobs(share_, RoutingUse(force=False, audit=True))
        return {
            **self._mismatch("mismatch", share_.step, replayed),
            **self._mismatch("mismatch_native", share_.step, native),
            **metrics.disagreement(replayed.counts, "shadow", self._arch.spec.moe_layers),
            **metrics.disagreement(native.counts, "native", self._arch.spec.moe_layers),
            **self._overlaps(share_.step, native),
            **metrics.replay_health(replayed.counts),
            "router/consulted_layers": float(len(self._arch.spec.moe_layers)),
        }

    def step(
        self, step: int, advantages: NDArray[np.float32], counterfactual: bool, *batches: Batch
    ) -> StepResult | None:
        """Train on one step's batches and return its metrics on rank 0, None elsewhere.

        `advantages` float32 `[n]` in the order of the concatenated batches. `counterfactual` adds the pass without
        replay and, with `metrics.counterfactual_r2`, one that replays the routing that the trainer chose in it. Old
        log-probs are recomputed under the routing that `replay.mode` asks for, then `grpo.mini_steps` updates run under
        the same. Raises `RoutingError` for a record that is missing (unless `routing.on_error` or `routing.on_missing`
        trains such samples natively) or does not fit, and `AuditError`, before the first update, for one that breaks a
        rule of the audit (unless `routing.on_alarm` is `warn`).
        """
        config, begin = self._config, time.perf_counter()
        share_ = self._prepare(batches, advantages, config.grpo.mini_steps, step)
        use = RoutingUse(force=config.replay.mode == "r3")
        trace = observes_tokens(config.metrics.tokens_every, step)
        if use.force and not config.routing.trains_natively:
            require_records(share_.step)
        keeps = counterfactual and config.metrics.counterfactual_r2
        old = self._logprobs(share_, replace(use, audit=True, keep=keeps and not use.force, trace=trace))
        overlaps = self._overlaps(share_.step, old)
        # Before anything is trained on the record.
        alarms = self._alarms(share_.step, overlaps, step)
        free = RoutingUse(force=False, keep=keeps, trace=trace)
        native = self._logprobs(share_, free) if use.force and counterfactual else None
        r2 = self._replay_own(share_, native or old) if keeps else None
        extra = sum(one.seconds for one in (native, r2) if one)
        loads = old.counts.loads
        tokens = self._tokens.report(step, share_.step, old.traced, native.traced if native else None)
        reference = self._reduced(self.policy.reference_logprobs(share_.microbatches, share_.step))
        # The old log-probs' pass compared the same records; updates are only asked for what they used.
        plain = replace(use, compare=False)
        updates = [self.policy.update(one, share_.step, old.logprobs, reference, plain) for one in share_.mini_steps]
        report = {
            **self._old_metrics(share_.step, old, native, use),
            **(self._mismatch("mismatch_r2", share_.step, r2) if r2 else {}),
            **metrics.load_metrics(loads, self._arch.spec.top_k),
            **self._update_metrics(share_.step, old, updates),
            **overlaps,
            **({"router/alarms": float(len(alarms))} if overlaps else {}),
            "rollout/staleness_max": float(self._version - min(t.weight_version for t in share_.step.trajectories)),
            "time/install_s": share_.seconds,
        }
        spent = time.perf_counter() - begin - share_.seconds - extra
        report["time/train_s"] = spent
        report["train/tokens_per_s"] = share_.step.tokens / spent
        if extra:
            report["time/counterfactual_s"] = extra
        self._version += 1
        return StepResult(step, self._version, report, alarms, loads, tokens) if self._rank == 0 else None

    def measure(self, uses: Sequence[RoutingUse], *batches: Batch) -> Recomputed | None:
        """Recompute the log-probs of some batches once under each of `uses`, without training; on rank 0, else None.

        Raises `RoutingError` for a record that is missing where a use forces it, or does not fit.
        """
        share_ = self._prepare(batches, None, mini_steps=1)
        if any(use.force for use in uses):
            require_records(share_.step)
        found = []
        for use in uses:
            one = self._logprobs(share_, use)
            found.append(Recomputation(one.logprobs, one.counts, self._overlaps(share_.step, one), one.seconds))
        step = share_.step
        groups = np.array([trajectory.group for trajectory in step.trajectories], np.int64)
        if self._rank:
            return None
        return Recomputed(step.rollout_logprobs.astype(np.float64), step.response_lengths, groups, tuple(found))

    def rehearse(self, advantages: NDArray[np.float32], *batches: Batch) -> Rehearsal:
        """Run one forced-routing step of known outcome; see `r3.trainer.rehearsal`. The weights change."""
        share_ = self._prepare(batches, advantages, mini_steps=1)
        require_records(share_.step)
        with share_.microbatches.checks as checks:
            microbatches = list(share_.microbatches)
            checks.finish()
            return rehearse(self.policy, share_.step, microbatches, RoutingUse(force=True))

    def export(self) -> WeightBuckets | None:
        """Return all weights under Hugging Face names in the engine's dtype on rank 0, None elsewhere; collective."""
        buckets = weight_buckets(
            self.policy.export,
            DTYPES[self._config.rollout.dtype],
            self._config.weights.bucket_mib * 2**20,
            self._version,
            verify=self._config.weights.verify,
        )
        return buckets if self._rank == 0 else None

    def outlet(self) -> WeightOutlet:
        """Return this rank's part in streaming its weights; only after `join`."""
        return WeightOutlet(
            self._config,
            lambda: iter(self.policy.export),
            lambda: self._version,
            parallel.device(),
            lambda: self.policy.export.extra_bytes,
        )

    def save_hf(self, directory: str) -> None:
        """Write the model as a Hugging Face checkpoint directory, on rank 0; raise `CheckpointError` if that fails."""
        weights = iter(self.policy.export)
        if self._rank == 0:
            save_checkpoint(weights, self._directory, Path(directory), DTYPES[self._config.trainer.dtype])
        for _ in weights:
            # The other ranks send their parts; on rank 0 nothing is left.
            pass

    def save_state(self, directory: str) -> FileRecord:
        """Write everything that this rank needs to go on from here; raise `CheckpointError` if that fails."""
        return save_state(self.policy, self._version, self._state_file(directory))

    def load_state(self, directory: str) -> int:
        """Go on from a saved state and return its weight version; raise `CheckpointError` where it does not fit."""
        self._version = load_state(self.policy, self._state_file(directory))
        return self._version

    def _state_file(self, directory: str) -> Path:
        return Path(directory) / f"rank-{self._rank:05d}.pt"

    def _prepare(
        self, batches: Sequence[Batch], advantages: NDArray[np.float32] | None, mini_steps: int, turn: int = 0
    ) -> StepShare:
        begin = time.perf_counter()
        step = StepBatch.join(batches, advantages, self._arch.spec, turn)
        plan, form = plan_step(step, self._config.trainer, mini_steps, self.policy.form, self.policy.data)
        laid_out = MicroBatches(step, [part for cuts in plan for part in cuts], self._arch.spec, form)
        return StepShare(step, laid_out, tuple(len(cuts) for cuts in plan), time.perf_counter() - begin)

    def _logprobs(self, share_: StepShare, use: RoutingUse) -> _Pass:
        begin = time.perf_counter()
        with share_.microbatches.checks:
            found: LogprobPass = self.policy.logprobs(share_.microbatches, share_.step, use)
        logprobs = parallel.sum_over_ranks(found.logprobs)
        counts, seconds = counts_over_ranks(found.counts), time.perf_counter() - begin
        return _Pass(logprobs, counts, found.replay_s, seconds, found.own, found.trace)

    def _replay_own(self, share_: StepShare, native: _Pass) -> _Pass | None:
        """Replay what the trainer chose in a pass of its own (R2); None where nothing was recorded to compare with."""
        if not native.own:
            return None
        begin = time.perf_counter()
        found = self.policy.logprobs(native.own, share_.step, RoutingUse(force=True))
        logprobs = parallel.sum_over_ranks(found.logprobs)
        return _Pass(logprobs, found.counts, found.replay_s, time.perf_counter() - begin)

    def _reduced(self, values: Floats | None) -> Floats | None:
        return None if values is None else parallel.sum_over_ranks(values)

    def _mismatch(self, prefix: str, step: StepBatch, found: _Pass) -> Metrics:
        values = metrics.mismatch(found.logprobs, step.rollout_logprobs, step.response_lengths)
        return metrics.prefixed(prefix, values)

    def _old_metrics(self, step: StepBatch, old: _Pass, native: _Pass | None, use: RoutingUse) -> Metrics:
        layers = self._arch.spec.moe_layers
        report = {
            **self._mismatch("mismatch", step, old),
            **metrics.disagreement(old.counts, "shadow" if use.force else "native", layers),
        }
        if native is None:
            return report
        plain = metrics.mismatch(native.logprobs, step.rollout_logprobs, step.response_lengths)
        replayed = metrics.mismatch(old.logprobs, step.rollout_logprobs, step.response_lengths)
        return {
            **report,
            **metrics.prefixed("mismatch_native", plain),
            **metrics.prefixed("mismatch", metrics.gain(plain, replayed)),
            **metrics.disagreement(native.counts, "native", layers),
        }

    def _overlaps(self, step: StepBatch, found: _Pass) -> Metrics:
        return overlap_metrics(found.counts, self._arch.spec.moe_layers, step.audit.windows)

    def _alarms(self, step: StepBatch, overlaps: Metrics, number: int) -> tuple[Alarm, ...]:
        """Return what the audit found, alike on every rank; raise it where the config says so."""

        def where(row: int) -> str:
            return name(step.trajectories[step.audit.trajectory(row)])

        alarms = find_alarms(overlaps, self._config.routing.min_overlap, where)
        if alarms and self._config.routing.on_alarm == "fail":
            raise AuditError(f"step {number}", alarms)
        return alarms

    def _update_metrics(self, step: StepBatch, old: _Pass, updates: Sequence[Update]) -> Metrics:
        counts = [old.counts, *(counts_over_ranks(update.counts) for update in updates)]
        sums = UpdateSums(
            *parallel.sum_over_ranks(np.sum([astuple(update.sums) for update in updates], axis=0)).tolist()
        )
        norms = [update.grad_norm for update in updates if update.grad_norm is not None]
        report = {
            "train/loss": sums.loss / sums.tokens,
            "train/entropy": sums.entropy / sums.tokens,
            "train/clip_frac": sums.clipped / sums.tokens,
            "train/lr": updates[-1].lr,
            "train/mini_steps": float(len(updates)),
            "train/skipped_steps": float(sum(update.grad_norm is None for update in updates)),
            "train/replay_s": old.replay_s + sum(update.replay_s for update in updates),
        }
        if norms:
            report["train/grad_norm"] = float(np.mean(norms))
        if self._config.grpo.kl_coef > 0:
            report["train/kl"] = sums.kl / sums.tokens
        if self._config.replay.mode == "r3":
            report |= metrics.replay_health(sum(counts[1:], counts[0]))
        return report
