"""Small facts that rollout workers hand to the driver; the heavy part of a rollout is a `Batch` beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from r3.errors import RoutingError
from r3.types import SampleFacts, WeightVersion


class Dropped(NamedTuple):
    """A sample that is not in the batch, and why."""

    group: int
    member: int
    reason: str


class Native(NamedTuple):
    """A sample that is trained without a record, on the trainer's own routing, and why."""

    group: int
    member: int
    reason: str


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """What one worker did in one `generate` call.

    `facts`: one per trajectory, in packing order. `seconds`: from the call until the engine's last answer;
    `check_seconds`: decoding and structural checks, which run behind each answer: inside `seconds` where the adapter
    hands answers out as they finish, else behind generation; `score_seconds`: rewards; `pack_seconds`: packing. Token
    counts include dropped ones.
    `stale_rows`: of all samples, whatever `routing.on_stale` made of them; `first_stale` describes a sample's.
    `unshared_records`: of an engine that returns rows through shared memory, those that found no room there.
    """

    facts: tuple[SampleFacts, ...]
    dropped: tuple[Dropped, ...]
    native: tuple[Native, ...]
    seconds: float
    check_seconds: float
    score_seconds: float
    pack_seconds: float
    prompt_tokens: int
    response_tokens: int
    cached_tokens: int
    routing_bytes: int
    routing_rows: int
    weight_version: WeightVersion
    stale_rows: int = 0
    first_stale: str = ""
    unshared_records: int = 0


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Rewards of greedy answers, in the order of the prompts."""

    rewards: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How far greedy generations from an empty cache, from a warm one and from a mix of both agree.

    `equal_tokens`: share of prompts with the same answer; `equal_rows`: share of (prompt row, layer) pairs with the
    same expert set; `cached_tokens`: prompt tokens that the later rounds took from the cache.
    """

    prompts: int
    equal_tokens: float
    equal_rows: float
    cached_tokens: int

    def require(self, minimum: float = 0.9) -> None:
        """Raise `RoutingError` when cached rows are not those of the prompt.

        Kernels need not be batch-invariant, so bf16 flips a few percent of the pairs at near-ties; rows of another
        request agree in about a fifth (SGLang issue #26975 describes such rows).
        """
        if not self.equal_rows >= minimum:
            raise RoutingError(
                f"start-up canary: only {self.equal_rows:.1%} of the prompt's routing rows are the same from an empty "
                f"and a warm prefix cache ({self.cached_tokens} cached tokens); the engine returns rows of other tokens"
            )
