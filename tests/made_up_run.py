"""Run directories as a trainer would leave them, with invented numbers, for the report and W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r3.config import load_config
from r3.run import RunDirectory
from r3.tokens import Pass, SequenceFacts, TokenReport, observe

LAYERS = (0, 1, 2, 3)
# What a model may say: nothing of it may reach a browser as markup.
HOSTILE = "<script>alert(1)</script>"


def decode(ids: Sequence[int]) -> str:
    return "".join(HOSTILE if i == 13 else f"w{i} " for i in ids)


def make_tokens(step: int, seed: int = 0) -> TokenReport:
    """Return a report of ten answers of twelve tokens; a native pass stands beside it in odd steps."""
    draw = np.random.default_rng([seed, step])
    facts = [SequenceFacts(i // 2, i % 2, 1.0, "stop", 4, np.arange(10, 26) + i) for i in range(10)]
    rollout = -draw.random(120)
    differs = draw.random((120, len(LAYERS))) < 0.1
    train = Pass(rollout + 0.02 * draw.standard_normal(120), lambda chosen: differs[chosen])
    native = Pass(rollout + 0.05 * draw.standard_normal(120), lambda chosen: differs[chosen])
    return observe(step, facts, rollout, train, native if step % 2 else None, LAYERS, decode, worst=6)


def make_row(step: int, seed: int = 0) -> dict[str, float]:
    draw = np.random.default_rng([seed, step, 1])
    row = {
        "rollout/reward_mean": 0.3 + step / 100 + 0.02 * draw.random(),
        "mismatch/k3": 1e-4 * (1 + draw.random()),
        "mismatch/extreme_1p5": 0.0,
        "mismatch/abs_max": 0.2,
        "mismatch/abs_p99": 0.05,
        "mismatch/ess_sequence": 0.999,
        "router/coverage": 1.0,
        "router/mismatched_ids": 0.0,
        "router/missing_rows": 0.0,
        "router/lag0_overlap": 0.99,
        "router/lag_margin": 0.3,
        "router/load_max_over_mean": 3.5,
        "router/shadow_disagree_token_layer": 0.004,
        "transport/routing_bytes": 120_000.0,
        "transport/bytes_per_token": 16.0,
        "time/step_s": 4.0,
        "time/generate_s": 2.0,
        "time/train_s": 1.5,
        "time/weights_s": 0.1,
        **{f"router/shadow_disagree_layer/{layer}": 0.001 * (layer + 1) for layer in LAYERS},
    }
    if step % 5 == 1:
        row |= {"mismatch_native/k3": 3e-4, "mismatch_native/extreme_1p5": 1e-3, "eval/reward_mean": 0.5}
    return row


def make_run(path: Path, steps: int = 12, state: str = "done", overrides: Sequence[str] = ()) -> RunDirectory:
    """Write a run directory of that many steps."""
    config = load_config(None, overrides)
    run = RunDirectory.create(path, config)
    for step in range(1, steps + 1):
        run.log_metrics({"step": step, **make_row(step, config.run.seed)})
        if step % 5 == 1:
            run.log_tokens(make_tokens(step, config.run.seed))
    run.write_status(state, step=steps)
    return run
