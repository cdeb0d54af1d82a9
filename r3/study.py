"""What `r3.mismatch` measures: answers of the engine, recomputed by the trainer under each variant, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from r3 import controls
from r3.audit import find_alarms
from r3.config import Config
from r3.consistency import Drawn, Row, cluster_sums, counted, disagreement_of, draw, estimates, mismatch_of, pass_sums
from r3.errors import DivergenceError
from r3.metrics import Floats
from r3.rollout.pool import RolloutPool
from r3.tasks import Task
from r3.trainer.group import TrainerGroup
from r3.trainer.outcome import Recomputation, Recomputed
from r3.trainer.use import RouterFault, RoutingUse
from r3.transport import BatchRef
from r3.types import Batch, ModelSpec, Prompt

Say = Callable[[str], None]
Keep = Callable[["Study"], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of the table: what the trainer does with the records, and what was done to them before."""

    key: str
    name: str
    use: RoutingUse
    change: controls.Change | None = None
    control: bool = False


@dataclass(slots=True)
class Collected:
    """What the rounds gave of one variant: `sums` `[prompts, features]` and `passes` `[features]` of each round.

    `alarms`: the rules that the audit of any round broke.
    """

    sums: list[Floats] = field(default_factory=list)
    passes: list[Floats] = field(default_factory=list)
    alarms: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, found: Recomputed, one: Recomputation, layers: int) -> None:
        """Add one round; raise `DivergenceError` where a number is not finite, which no table should hide."""
        d = one.logprobs - found.rollout
        if not np.isfinite(d).all():
            raise DivergenceError("a log-prob difference is not finite; engine or trainer overflowed")
        # A cluster is a prompt of a round.
        self.sums.append(cluster_sums(d, found.lengths, found.groups))
        counts = one.counts
        self.passes.append(pass_sums(counts.compared, int(counts.disagree.sum()), counts.disagree_any, layers))
        self.seconds += one.seconds

    def all_sums(self) -> Floats:
        """Return the cluster sums of every round."""
        return np.concatenate(self.sums)

    def k3(self) -> float:
        """Return k3 over every round, nats."""
        return float(mismatch_of(self.all_sums().sum(0))["k3"])

    def row(self, variant: Variant, drawn: Drawn, *, disagrees: bool, alarm_k3: float) -> Row:
        """Return the line of the table; `disagrees`: the pass compared routing; `alarm_k3`: nats."""
        values = estimates(drawn, mismatch_of)
        if disagrees:
            values |= estimates(draw({"passes": np.stack(self.passes)})["passes"], disagreement_of)
        tokens, sequences = counted(self.all_sums())
        alarms = self.alarms | ({"k3"} if self.k3() > alarm_k3 else set())
        return Row(
            variant.key, variant.name, tokens, sequences, values, tuple(sorted(alarms)) if variant.control else None
        )


@dataclass(frozen=True)  # without slots, for the cached property
class Study:
    """Everything measured of one model so far.

    `compared`: there were records; `alarm_k3`: nats, above which a control raises an alarm; `facts`: engine, versions,
    seconds.
    """

    variants: tuple[Variant, ...]
    found: Mapping[str, Collected]
    rounds: int
    compared: bool
    alarm_k3: float
    facts: Mapping[str, object]

    @cached_property
    def drawn(self) -> dict[str, Drawn]:
        """The sums of every variant; all rows and factors come from this one draw."""
        return draw({variant.key: self.found[variant.key].all_sums() for variant in self.variants})

    def rows(self) -> Iterator[Row]:
        """Yield the lines of the table."""
        for variant in self.variants:
            yield self.found[variant.key].row(
                variant, self.drawn[variant.key], disagrees=self.compared, alarm_k3=self.alarm_k3
            )


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier command measured of the same model, to go on from: its rounds, and each variant's sums."""

    rounds: int
    found: Mapping[str, Collected]

    @property
    def tokens(self) -> int:
        """Response tokens so far."""
        # Rows without a control come first, and see every token.
        return counted(next(iter(self.found.values())).all_sums())[0] if self.found else 0


NOTHING = Earlier(0, {})


def replay_variants(spec: ModelSpec) -> tuple[Variant, ...]:
    """Return the variants that every study measures."""
    layers = spec.moe_layers
    half = layers[len(layers) // 2 :]
    return (
        Variant("native", "native", RoutingUse(force=False)),
        Variant("r3", "R3", RoutingUse(force=True)),
        Variant("r3_response", "R3, response tokens only", RoutingUse(force=True, sampled_rows=True)),
        Variant("r3_last_half", "R3, last half of the layers only", RoutingUse(force=True, layers=half)),
    )


def control_variants(noises: Sequence[float], *, records: bool) -> tuple[Variant, ...]:
    """Return what must look bad (`records`: records and gates that are wrong), and routers with noise injected."""
    audited = RoutingUse(force=True, audit=True)
    wrong = (
        Variant("control_shift", "control: shifted by one token", audited, controls.shift, True),
        Variant("control_neighbour", "control: neighbour's routes", audited, controls.neighbour, True),
        Variant("control_reverse", "control: layers reversed", audited, controls.reverse, True),
        Variant(
            "control_gates", "control: uniform gates",
            RoutingUse(force=True, audit=True, fault=RouterFault(uniform_gates=True)), None, True,
        ),
    )  # fmt: skip
    noisy = []
    for sigma in noises:
        for key, name, force in (("native", "native", False), ("r3", "R3", True)):
            use = RoutingUse(force=force, fault=RouterFault(noise=sigma))
            label = f"injected router noise {sigma:g}, {name}"
            noisy.append(Variant(f"noise_{sigma:g}_{key}", label, use, None, True))
    return (*(wrong if records else ()), *noisy)


def variants_of(config: Config, spec: ModelSpec, extra: Sequence[Variant], keys: Sequence[str]) -> tuple[Variant, ...]:
    """Return what a study measures: the rows that `keys` names (all where it is empty), and `extra`."""
    if not config.routing.capture:
        return (Variant("native", "native", RoutingUse(force=False)), *extra)
    return (*(one for one in replay_variants(spec) if one.key in keys or not keys), *extra)


def measure(
    config: Config,
    task: Task,
    pool: RolloutPool,
    trainers: TrainerGroup,
    variants: Sequence[Variant],
    *,
    tokens: int,
    control_tokens: int,
    seconds: float,
    earlier: Earlier,
    keep: Keep,
    say: Say,
) -> None:
    """Generate until there are `tokens` response tokens, or `seconds` passed, and recompute them under every variant.

    Controls see the first `control_tokens` only. `keep` gets what there is, behind every round and once at least.
    Raises what engine and trainer raise.
    """
    found = {variant.key: earlier.found.get(variant.key, Collected()) for variant in variants}
    begin, generating = time.perf_counter(), 0.0
    done, number = earlier.tokens, earlier.rounds

    def so_far() -> Study:
        facts = {
            "engine": pool.spec().engine,
            "trainer": trainers.versions(),
            "generate_s": generating,
            "recompute_s": {variant.key: found[variant.key].seconds for variant in variants},
        }
        return Study(tuple(variants), found, number, config.routing.capture, config.metrics.alarm_k3, facts)

    if done:
        keep(so_far())
    while not done or (done < tokens and time.perf_counter() - begin < seconds):
        number += 1
        rollout = pool.generate(_prompts(config, task, number), number)
        generating += rollout.seconds
        now = [variant for variant in variants if done < control_tokens or not variant.control]
        done += _recompute(config, trainers, rollout.batches, now, found)
        keep(so_far())
        say(f"round {number}: {done:,} of {tokens:,} response tokens, {time.perf_counter() - begin:.0f} s")


def _recompute(
    config: Config,
    trainers: TrainerGroup,
    batches: Sequence[BatchRef],
    variants: Sequence[Variant],
    found: Mapping[str, Collected],
) -> int:
    """Add one round to every variant in `found` and return its response tokens."""
    tokens, layers = 0, len(trainers.spec().moe_layers)
    for change in dict.fromkeys(variant.change for variant in variants):
        chosen = [variant for variant in variants if variant.change is change]
        answers = trainers.measure(
            [variant.use for variant in chosen], batches if change is None else _changed(batches, change)
        )
        tokens = len(answers.rollout)
        for variant, one in zip(chosen, answers.passes, strict=True):
            collected = found[variant.key]
            collected.add(answers, one, layers)
            if variant.use.audit:
                collected.alarms |= {alarm.rule for alarm in find_alarms(one.overlaps, config.routing.min_overlap)}
    return tokens


@contextmanager
def actors(config: Config, model: str) -> Iterator[tuple[RolloutPool, TrainerGroup]]:
    """Start engine and trainer of a model, on a Ray cluster of their own or that of RAY_ADDRESS."""
    from r3.cluster import ray_cluster

    with (
        ray_cluster(config) as places,
        RolloutPool(config, model, place=places.rollout) as pool,
        TrainerGroup(config, model, place=places.trainer) as trainers,
    ):
        pool.spec().model.require_same(trainers.spec(), "engine", "trainer")
        yield pool, trainers


def _prompts(config: Config, task: Task, number: int) -> list[Prompt]:
    # Those of a run's first steps: the table is about what that run would be trained on.
    size = config.rollout.prompts_per_step
    first = (config.run.seed * 1_000_003 + number - 1) * size
    return [task.train_prompt(index) for index in range(first, first + size)]


def _changed(batches: Sequence[BatchRef], change: controls.Change) -> list[BatchRef]:
    return [BatchRef.put(Batch.pack(change(batch.get().trajectories()))) for batch in batches]
