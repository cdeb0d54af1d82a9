"""Bit equality of SGLang's path of routing and ours, fed from the same passes; used by `scripts/bench/capture.py`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np


def tee(bench: Any, requests: dict[str, Any], group: int, pause_s: float) -> dict[str, int]:
    """Answer requests once in an engine that feeds both paths; return what was compared, and what differed.

    Groups of `group` requests share a prompt, and half of the prompts are in the radix cache before. While they run,
    all of them are retracted twice, after `pause_s` and twice as much later, and one in 128 is aborted.
    """
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    prompts = requests["input_ids"]
    requests["input_ids"] = [prompts[i - i % group] for i in range(len(prompts))]
    rids = [f"tee-{time.monotonic_ns()}-{i}" for i in range(len(prompts))]
    manager, engine = bench.engine.tokenizer_manager, bench.engine
    engine.generate(input_ids=requests["input_ids"][: len(prompts) // 2 : group], sampling_params={"max_new_tokens": 1})

    async def play() -> Any:
        answer = asyncio.ensure_future(
            engine.async_generate(**requests, rid=rids, return_routed_experts=True, return_logprob=True)
        )
        for pause in (pause_s, 2 * pause_s):
            await asyncio.wait([answer], timeout=pause)
            await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
            await manager.continue_generation(ContinueGenerationReqInput())
            for rid in bench.random.choice(rids, max(1, len(rids) // 128)).tolist():
                manager.abort_request(rid)
        return await answer

    found = dict.fromkeys(("ids", "different", "answers", "aborted", "cached", "retractions", "not_compared"), 0)
    for output in engine.loop.run_until_complete(play()):
        _compare(bench, output, found)
    return found


def _compare(bench: Any, output: dict[str, Any], found: dict[str, int]) -> None:
    import pybase64

    from r3.rollout.sglang_plugin.tickets import ticket_of

    meta = output["meta_info"]
    found["answers"] += 1
    found["aborted"] += (meta.get("finish_reason") or {}).get("type") == "abort"
    found["cached"] += int(meta.get("cached_tokens") or 0)
    found["retractions"] += int(meta.get("num_retractions") or 0)
    if ticket_of(meta) is None or not meta.get("routed_experts"):
        found["not_compared"] += 1
        return
    ours = bench.rows(output)
    stock = np.frombuffer(pybase64.b64decode(meta["routed_experts"]), np.int32)
    found["ids"] += ours.size
    found["different"] += int((stock != ours.reshape(-1)).sum()) if stock.size == ours.size else ours.size
