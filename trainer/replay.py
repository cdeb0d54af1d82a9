"""Router replay: force Megatron's router to the experts that the rollout engine chose.

`ReplayRouter` is put in through the layer spec; a `ReplayContext` belongs to one model (all of a pipeline stage's
chunks of it) and knows which microbatch that model is working on. Megatron-core asks an object at
`router.router_replay` for the top-k (`get_replay_topk`, the hook of Megatron-LM PRs #2101 and #2693); a forced row gets
the recorded ids, and its gate weights come from the trainer's own scores at those ids, so the router receives gradient.

Activation recompute needs no switch and no queue: a hook on a chunk's output activates the microbatch again when
backward reaches it, and the end of that backward deactivates it, whichever checkpoint function recomputes in between
and in whatever order a pipeline schedule interleaves the passes.

What is not forced: the auxiliary loss. It is a property of the trainer's own scores, and Megatron-core computes it from
its own top-k of them, so balancing pressure acts on what the router would choose next. The expert bias counts the
experts that were used, which are the recorded ones. Pads reach neither, nor the z-loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from r3.errors import ConfigError, RoutingError
from r3.trainer.counting import MicrobatchCounts, PassCounts, Undecided
from r3.trainer.megatron import TopKRouter, TransformerConfig
from r3.trainer.routed import MicrobatchRouting as MicrobatchRouting
from r3.trainer.routed import RoutedRecord
from r3.trainer.routed import router_order as router_order
from r3.trainer.tally import Tally
from r3.types import ModelSpec

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def refuse_unsupported_router(config: TransformerConfig) -> None:
    """Raise `ConfigError` for a router configuration under which replay would be ignored or incomplete."""
    balancing = str(config.moe_router_load_balancing_type)
    graphs = getattr(config, "cuda_graph_impl", "none") not in (None, "none") or getattr(
        config, "enable_cuda_graph", False
    )
    refusals = {
        "moe_router_fusion: the fused kernel never asks for replay": config.moe_router_fusion,
        "load balancing by sinkhorn or quantiles chooses experts without top-k": "sinkhorn" in balancing
        or "quantile" in balancing,
        "moe_expert_capacity_factor drops replayed tokens": config.moe_expert_capacity_factor is not None,
        "CUDA graphs freeze the first microbatch's experts": graphs,
        "moe_enable_routing_replay, Megatron's own, competes for the same hook": config.moe_enable_routing_replay,
        "moe_router_force_load_balancing replaces the router's scores by noise": config.moe_router_force_load_balancing,
        "overlap_moe_expert_parallel_comm runs two microbatches through a layer at once": getattr(
            config, "overlap_moe_expert_parallel_comm", False
        ),
    }
    for reason, found in refusals.items():
        if found:
            raise ConfigError(f"router replay cannot be combined with this trainer configuration; {reason}")


class ReplayRouter(TopKRouter):
    """Megatron's top-k router, forced to recorded experts while its context has an active microbatch.

    Without a context (a reference model, a multi-token-prediction layer) it is exactly its base class.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **kwargs: Any) -> None:
        refuse_unsupported_router(config)
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self.context: ReplayContext | None = None

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route `logits` `[s, b, experts]`; return gate weights and the boolean map, each `[s * b, experts]`."""
        if self.context is not None:
            # GPTModel passes no mask on (0.16.1), so that pads would count in every statistic of the router.
            padding_mask = self.context.pads() if padding_mask is None else padding_mask
        visit = None if self.context is None else self.context.visit(self.layer_number - 1)
        if visit is None:
            return super().routing(logits, padding_mask=padding_mask, **kwargs)
        self.router_replay = visit
        try:
            probs, routing_map = super().routing(logits, padding_mask=padding_mask, **kwargs)
        finally:
            self.router_replay = None  # type: ignore[assignment]
        visit.account(routing_map)
        return probs, routing_map

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        # Megatron-core masks `[tokens, experts]` with `[tokens]` here (0.16.1, 0.19.2): an error, or wrong when equal.
        if self.enable_expert_bias and padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)


@dataclass(slots=True, eq=False)
class _Active:
    """The microbatch that a model is working on; `clock` takes replay's own seconds.

    `counts`: of its first pass, None when it is recomputed.
    """

    routing: MicrobatchRouting
    clock: Tally | None
    record: RoutedRecord = field(init=False)
    counts: MicrobatchCounts | None = None

    def __post_init__(self) -> None:
        self.record = RoutedRecord(self.routing)

    def spent_since(self, begin: float) -> None:
        """Count the host time since `begin` (`time.perf_counter()`) as replay's own."""
        if self.clock is not None:
            self.clock.spent_since(begin)

    def ids(self, local: int) -> torch.Tensor:
        """Return the recorded ids of one layer, int64 `[s * b, k]` in the router's order."""
        return self.record.ids(local)


class ReplayContext:
    """Which microbatch one model is working on, and what its routers did with the record.

    `chunks`: the model, or the chunks of it that a pipeline stage holds. Their routers are bound by walking the live
    decoders, by layer number; multi-token-prediction layers are no part of them. Raises `RoutingError` when the routers
    are not exactly the MoE layers of `spec` there, are bound already or were built without replay.
    """

    def __init__(self, chunks: torch.nn.Module | Sequence[torch.nn.Module], spec: ModelSpec) -> None:
        decoders = [
            _unwrapped(chunk).decoder for chunk in ([chunks] if isinstance(chunks, torch.nn.Module) else chunks)
        ]
        routers = {m.layer_number - 1: m for d in decoders for m in d.modules() if isinstance(m, TopKRouter)}
        built = {layer.layer_number - 1 for decoder in decoders for layer in decoder.layers}
        expected = [layer for layer in spec.moe_layers if layer in built]
        if sorted(routers) != expected:
            raise RoutingError(f"the model has routers in layers {sorted(routers)}, its MoE layers are {expected}")
        for layer, router in routers.items():
            _require_unbound(layer, router, spec)
        for router in routers.values():
            router.context = self
        self._spec, self._chunks = spec, len(decoders)
        self.columns = tuple(spec.moe_layers.index(layer) for layer in expected)
        self._local = {layer: column for column, layer in enumerate(expected)}
        self._active: _Active | None = None
        # Of the pass that is open.
        self._counts: PassCounts | None = None

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[Tally]:
        """Open one pass over some microbatches and yield its counters; nothing stays active behind it.

        Raises `RoutingError` when a microbatch is active before or after the pass, or when a router was not consulted
        exactly once per microbatch.
        """
        self.require_empty("before the pass")
        tally = Tally.zero(self._spec, device)
        counts = self._counts = PassCounts(tally)
        try:
            yield tally
            self.require_empty("after the pass")
            begin = time.perf_counter()
            counts.count()
            tally.spent_since(begin)
            tally.require_all_visited(dict(zip(self._local, self.columns, strict=True)), self._chunks)
        finally:
            self._active = self._counts = None

    def require_empty(self, when: str) -> None:
        """Raise `RoutingError` when a microbatch is active."""
        if self._active is not None:
            raise RoutingError(f"replay state is left over {when}; a microbatch was activated and never finished")

    def run(self, routing: MicrobatchRouting, call: Callable[[], torch.Tensor], chunk: int = 0) -> torch.Tensor:
        """Run chunk `chunk` of the model under the record of one microbatch and return its output.

        Recompute inside the output's backward pass sees the same record.
        """
        self.require_empty("before a microbatch")
        self._check(routing)
        active = self._active = _Active(routing, self._clock)
        if self._counts is not None:
            active.counts = self._counts.begin(routing, active.record, chunk)
        try:
            output = call()
        finally:
            self._active = None
        if active.counts is not None:
            begin = time.perf_counter()
            # An update has work for the device ahead of it, and needs its memory.
            active.counts.finish(count=output.requires_grad)
            active.spent_since(begin)
        if output.requires_grad:
            output.register_hook(partial(self._enter_backward, routing))
        return output

    def visit(self, layer: int) -> _Visit | None:
        """Return how the router of `layer` (global index) must treat this call, or None for its own routing."""
        if self._active is None or self._active.routing.experts is None:
            return None
        local = self._local[layer]
        return _Visit(self._active, layer, local, self.columns[local])

    def pads(self) -> torch.Tensor | None:
        """Return which rows of the active microbatch are pads, bool `[s, b]`."""
        return None if self._active is None else self._active.routing.pads.T

    def _enter_backward(self, routing: MicrobatchRouting, gradient: torch.Tensor) -> None:
        self.require_empty("before a backward pass")
        self._active = _Active(routing, self._clock)
        torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    @property
    def _clock(self) -> Tally | None:
        return None if self._counts is None else self._counts.tally

    def _leave_backward(self) -> None:
        self._active = None

    def _check(self, routing: MicrobatchRouting) -> None:
        if routing.experts is None:
            return
        shape = (*routing.recorded.shape, len(self.columns), self._spec.top_k)
        if routing.experts.shape != shape or routing.experts.dtype.is_floating_point:
            raise RoutingError(
                f"the record of a microbatch is {routing.experts.dtype} {tuple(routing.experts.shape)}; integer ids "
                f"[b, s, layers, k] = {shape} are required"
            )


class _Visit:
    """One router call under an active microbatch; stands where Megatron-core expects its own `RouterReplay`."""

    def __init__(self, active: _Active, layer: int, local: int, column: int) -> None:
        # `local` counts the MoE layers of this rank (the record), `column` those of the whole model (the tally).
        self._active, self._layer, self._local, self._column = active, layer, local, column
        self._own: torch.Tensor | Undecided | None = None
        self._ids: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids `[tokens, k]` of the experts to use: recorded where there is a record, else the own."""
        assert default_compute_topk is not None
        choose = partial(default_compute_topk, topk=topk, num_groups=num_groups, group_topk=group_topk)
        routing = self._active.routing
        force, fault = routing.forces(self._layer), routing.fault
        # Megatron-core chooses among groups of experts for exactly as many rows as it routes.
        if force and not routing.watched and not group_topk:
            return self._replayed(scores, topk, choose)
        # Where routing is forced the own choice needs no graph. The grad mode stays as it is: 0.19 sorts by it.
        values, own = choose(scores.detach() if force and scores.requires_grad else scores)
        if fault is not None and fault.noise:
            spread = fault.noise * scores.std(1, keepdim=True)
            _, own = choose(scores + spread * torch.randn_like(scores))
            values = scores.gather(1, own)
        begin = time.perf_counter()
        self._own, self._ids = own, self._recorded(own.shape)
        if force:
            own = self._completed(self._ids, partial(own.index_select, 0))
            values = scores.gather(1, own)
        if fault is not None and fault.uniform_gates:
            # Equal before the softmax over the chosen as well as behind one over all.
            values = torch.full_like(values, 1 / topk)
        self._active.spent_since(begin)
        return values, own

    def _replayed(self, scores: torch.Tensor, topk: int, choose: TopK) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same where nobody looks at the own choice of a forced row yet: the others alone make one here."""
        begin = time.perf_counter()
        ids = self._ids = self._recorded(torch.Size((len(scores), topk)))
        used = self._completed(ids, lambda rows: choose(scores.detach().index_select(0, rows))[1])
        self._own = Undecided(scores.detach(), choose) if self._active.routing.compare else used
        self._active.spent_since(begin)
        return scores.gather(1, used), used

    def _completed(self, ids: torch.Tensor, chosen: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the recorded `ids` with what is `chosen` of the rows that choose for themselves in their places."""
        rows = self._active.routing.choosing
        assert rows is not None
        return ids.index_copy(0, rows, chosen(rows)) if rows.numel() else ids

    def _recorded(self, shape: torch.Size) -> torch.Tensor:
        """Return the recorded ids of this layer, of the router's `shape` `[tokens, k]`."""
        ids = self._active.ids(self._local)
        if ids.shape != shape:
            raise RoutingError(
                f"layer {self._layer} routes {tuple(shape)} [tokens, k], its record has {tuple(ids.shape)}"
            )
        return ids

    def account(self, routing_map: torch.Tensor) -> None:
        """Hand over what the router did; `routing_map` bool `[tokens, experts]` is what the experts will really get.

        Raises `RoutingError` when this Megatron-core never asked for replay.
        """
        if self._own is None or self._ids is None:
            raise RoutingError(
                f"the router of layer {self._layer} never asked for replay; is this megatron-core supported?"
            )
        routing, counts = self._active.routing, self._active.counts
        if counts is None:
            return
        begin = time.perf_counter()
        if routing.own is not None and not isinstance(self._own, Undecided):
            routing.own[self._local] = self._own
        used = routing_map if routing.forces(self._layer) else None
        counts.add(self._local, self._column, self._own, used)
        self._active.spent_since(begin)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model


def _require_unbound(layer: int, router: TopKRouter, spec: ModelSpec) -> None:
    if not isinstance(router, ReplayRouter):
        raise RoutingError(f"the router of layer {layer} was built without replay; build the model with replay=True")
    if router.context is not None:
        raise RoutingError(f"the router of layer {layer} is bound to another context; bind it once")
    if (router.topk, router.num_experts) != (spec.top_k, spec.num_experts):
        raise RoutingError(
            f"the router of layer {layer} chooses {router.topk} of {router.num_experts} experts, "
            f"the checkpoint says {spec.top_k} of {spec.num_experts}"
        )
