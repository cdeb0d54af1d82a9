"""What may happen to a request between its first token and its last, played on real SGLang in the engine's process."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r3.rollout.engine import Generation, Request, Sampling
from r3.rollout.engines.sglang import SglangEngine
from r3.rollout.sglang_plugin.client import RETURNS, open_returns
from r3.types import Batch, Trajectory

NEW_TOKENS = 24


@dataclass(frozen=True)
class Played:
    """An answer, and how many of its tokens had been sampled when the scenario interfered, as SGLang itself says."""

    answer: Generation
    sampled_before: int
    retractions: int


def _params() -> dict[str, Any]:
    return {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}


def _run(adapter: SglangEngine, prompt: np.ndarray, interfere: Callable[[Any, str], Awaitable[int]]) -> Any:
    """Stream one request and call `interfere(manager, request id)` once, behind its third token or a later one."""
    engine = adapter._engine

    async def play() -> tuple[dict[str, Any], int]:
        stream = await engine.async_generate(
            input_ids=prompt.tolist(), sampling_params=_params(), return_logprob=True, return_routed_experts=True,
            stream=True, rid="played",
        )  # fmt: skip
        before, chunk = -1, {}
        async for chunk in stream:
            if before < 0 and chunk["meta_info"]["completion_tokens"] >= 3:
                before = await interfere(engine.tokenizer_manager, "played")
        return chunk, before

    return engine.loop.run_until_complete(play())


def _answer(adapter: SglangEngine, prompt: np.ndarray, output: dict[str, Any], before: int, version: int) -> Played:
    adapter._version = version
    found = adapter._generation(0, Request(prompt), output, True)
    return Played(found, before, int(output["meta_info"].get("num_retractions") or 0))


async def _pause(manager: Any, rid: str, mode: str) -> int:
    """Pause and return the tokens sampled so far; a control call's reply comes behind everything sent before it."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    await manager.pause_generation(PauseGenerationReqInput(mode=mode))
    await manager.get_internal_state()
    return len(manager.rid_to_state[rid].output_ids)


async def _continue(manager: Any) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    await manager.continue_generation(ContinueGenerationReqInput())


async def _update(manager: Any, directory: Path, version: int, flush: bool) -> None:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(model_path=str(directory), flush_cache=flush, weight_version=str(version))
    success, message, *_ = await manager.update_weights_from_disk(request, None)
    assert success, message


def paused_update(
    adapter: SglangEngine, prompt: np.ndarray, old: Path, new: Path, version: int, mode: str, flush: bool
) -> Played:
    """Sample under `old` (version `version`), pause in `mode`, load `new` (one version later), go on to the end."""
    adapter.load_weights(old, version)

    async def interfere(manager: Any, rid: str) -> int:
        before = await _pause(manager, rid, mode)
        await _update(manager, new, version + 1, flush)
        await _continue(manager)
        return before

    output, before = _run(adapter, prompt, interfere)
    return _answer(adapter, prompt, output, before, version + 1)


def retracted(adapter: SglangEngine, prompt: np.ndarray, model: Path, version: int, abort: str) -> Played:
    """Pause in mode `retract`, without an update; abort `never`, `queued` (before it goes on) or `running`."""
    adapter.load_weights(model, version)

    async def interfere(manager: Any, rid: str) -> int:
        before = await _pause(manager, rid, "retract")
        if abort == "queued":
            manager.abort_request(rid)
        await _continue(manager)
        if abort == "running":
            # The next token shows that it runs again.
            state = manager.rid_to_state[rid]
            while len(state.output_ids) <= before:
                await manager.get_internal_state()
            manager.abort_request(rid)
        return before

    output, before = _run(adapter, prompt, interfere)
    return _answer(adapter, prompt, output, before, version)


def warm_prefix(
    adapter: SglangEngine, prompt: np.ndarray, old: Path, new: Path, version: int, flush: bool
) -> Generation:
    """Answer a prompt under `old`, load `new` one version later, with or without a flush, and answer it again."""
    adapter.load_weights(old, version)
    sampling = Sampling(1.0, NEW_TOKENS, ignore_eos=True)
    adapter.generate([Request(prompt)], sampling, capture=True)
    loop, manager = adapter._engine.loop, adapter._engine.tokenizer_manager
    if flush:
        adapter.flush_cache()
    loop.run_until_complete(_update(manager, new, version + 1, flush=False))
    adapter._version = version + 1
    (again,) = adapter.generate([Request(prompt)], sampling, capture=True)
    return again


def unnamed_update(adapter: SglangEngine, prompt: np.ndarray, old: Path, new: Path, version: int) -> Generation:
    """Answer a prompt under `old`, load `new` without telling its version, and answer it again from the cache."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    adapter.load_weights(old, version)
    sampling = Sampling(1.0, NEW_TOKENS, ignore_eos=True)
    adapter.generate([Request(prompt)], sampling, capture=True)
    request = UpdateWeightFromDiskReqInput(model_path=str(new), flush_cache=False)
    adapter._engine.loop.run_until_complete(adapter._engine.tokenizer_manager.update_weights_from_disk(request, None))
    (again,) = adapter.generate([Request(prompt)], sampling, capture=True)
    return again


def aborted(adapter: SglangEngine, prompt: np.ndarray, model: Path, version: int) -> Generation:
    """Abort a request that runs and was never retracted."""
    adapter.load_weights(model, version)

    async def interfere(manager: Any, rid: str) -> int:
        manager.abort_request(rid)
        return 0

    output, before = _run(adapter, prompt, interfere)
    return _answer(adapter, prompt, output, before, version).answer


def three_ways(
    adapter: SglangEngine, requests: list[Request], sampling: Sampling
) -> tuple[list[Generation], list[Generation], list[Generation]]:
    """Answer requests with rows through shared memory, with a segment too small for any, and as SGLang sends them."""
    found = []
    for size in (1 << 20, 64, 0):
        if adapter._segment is not None:
            adapter._segment.close()
        adapter._engine.collective_rpc(RETURNS, path="")
        adapter._segment = open_returns(adapter._engine, "require", size, prefault=False)[0] if size else None
        adapter.flush_cache()
        found.append(adapter.generate(requests, sampling, capture=True))
    adapter._segment, _ = open_returns(adapter._engine, "require", 1 << 20, prefault=False)
    first, second, third = found
    return first, second, third


def handed_over(adapter: SglangEngine, request: Request) -> tuple[int, int]:
    """Pack two answers to a request as the rollout worker does, and pickle them as Ray does.

    Returns the bytes that the object store is to copy straight out of the engine's shared memory, and those of all
    rows, of which the second answer shares the prompt's.
    """
    assert adapter._segment is not None
    answers = adapter.generate([request, request], Sampling(1.0, 4, ignore_eos=True), capture=True)
    batch = Batch.pack(
        [
            Trajectory(0, i, a.tokens, a.prompt_len, a.logprobs, a.routing, 0.0, a.finish, a.weight_version, "abc")
            for i, a in enumerate(answers)
        ]
    )
    segment = adapter._segment._mapped.bytes
    first = segment.__array_interface__["data"][0]
    handed = []

    def note(buffer: pickle.PickleBuffer) -> None:
        raw = np.frombuffer(buffer, np.uint8)
        if first <= raw.__array_interface__["data"][0] < first + len(segment):
            handed.append(raw.nbytes)

    pickle.dumps(batch, 5, buffer_callback=note)
    return sum(handed), batch.routing_bytes


def describe(adapter: SglangEngine) -> str:
    """Return what the engine says of its rows by now."""
    return adapter.spec().describe_rows()


def looked_ahead(
    adapter: SglangEngine, requests: list[Request], sampling: Sampling
) -> tuple[list[Generation], int, int]:
    """Answer requests; return how many of their records were sound when they were read, and how many there were."""
    looks: list[Any] = []
    look = adapter._looking

    def noted(capture: bool) -> Any:
        looks.append(look(capture))
        return looks[-1]

    adapter._looking = noted  # type: ignore[method-assign]
    try:
        answers = adapter.generate(requests, sampling, capture=True)
    finally:
        del adapter._looking
    return answers, len(looks[0]._sound), sum(answer.wire is not None and answer.wire.shared for answer in answers)
