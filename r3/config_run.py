"""Sections of a run as a whole: its length and place, the model, the task, what is measured and where that goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from r3.config_section import EntryPoint, Section


class RunConfig(Section):
    """Where a run lives and how long it is."""

    name: str = Field("grpo-qwen3moe", pattern=r"^[\w.-]+$")
    """Name of the run; part of the default directory and the W&B run name."""
    dir: Path | None = None
    """Run directory; default `runs/<name>-<time>/` under the current directory. Must be absolute under a Ray job."""
    seed: int = Field(0, ge=0)
    """Seed of prompts, engine sampling and trainer."""
    steps: int = Field(80, ge=1)
    """GRPO steps."""
    eval_every: int = Field(20, ge=0)
    """Greedy evaluation on held-out prompts before step 1, every N steps and after the last; 0 switches it off."""
    checkpoint_every: int = Field(20, ge=0)
    """Save the run's state every N steps and after the last, for `--resume`; 0 switches it off."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept; older ones are deleted."""
    deterministic: bool = False
    """Repeatable to the bit on the same machines: deterministic kernels, and no prompt is reused between calls."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU, in GiB: a run whose plan does not fit is refused; null leaves the fit unchecked."""


class ModelConfig(Section):
    """The model that is trained."""

    path: str = "builtin:tiny-qwen3moe"
    """Hugging Face Qwen3-MoE or Mixtral directory, or `builtin:` and a name (warm-started, cached; docs/gpu.md)."""
    warm_start_reward: float = Field(0.35, ge=0, lt=1)
    """Sampled reward at which the supervised warm start of a built-in model stops; 0 keeps random weights."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class TaskConfig(Section):
    """Prompts and their verifier."""

    kind: Literal["reasoning_gym", "jsonl", "custom"] = "reasoning_gym"
    """`reasoning_gym`: procedural dataset; `jsonl`: file of `{"prompt", "answer"}` lines; `custom`: own functions."""
    name: str = "spell_backward"
    """Name of the reasoning-gym dataset."""
    args: dict[str, Any] = Field({})
    """Keyword arguments of the reasoning-gym dataset."""
    partial_credit: bool = False
    """Use the reasoning-gym score as it is; by default only a full score counts, as 1."""
    path: Path | None = None
    """File of `kind: jsonl`."""
    prompts: EntryPoint | None = None
    """Prompt source `module:function` of `kind: custom`: `index -> {"prompt": ..., "answer": ...}`."""
    reward: EntryPoint | None = None
    """Own reward `module:function`: `(prompt, response_text) -> float`. Replaces the verifier of any kind."""
    verifier: Literal["exact", "math"] = "exact"
    """Verifier of `jsonl` and `custom` without an own reward: stripped text equality, or math-verify."""
    seed: int = Field(1, ge=0)
    """Seed of the procedural dataset."""
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of questions (by hash of their text) that is kept for evaluation and never trained on."""
    eval_prompts: int = Field(128, ge=1)
    """Held-out prompts per evaluation."""

    @model_validator(mode="after")
    def _complete(self) -> TaskConfig:
        if self.kind == "jsonl" and self.path is None:
            raise ValueError("task.kind is jsonl, but task.path is not set; name the file")
        if self.kind == "custom" and self.prompts is None:
            raise ValueError("task.kind is custom; set task.prompts to 'module:function'")
        return self


class MetricsConfig(Section):
    """Mismatch measurements and their limits."""

    counterfactual_every: int = Field(5, ge=0)
    """Run the pass without replay on the same batch every N steps (`mismatch_native/*`); 0 switches it off."""
    counterfactual_r2: bool = False
    """On those steps also replay the routing that the trainer chose itself in that pass (`mismatch_r2/*`)."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """An alarm of the `alarm_*` keys below: log it, or also stop the run (exit code 6) behind the step."""
    alarm_k3: float = Field(0.01, gt=0)
    """Alarm when `mismatch/k3` exceeds this, in nats; wrong records and gates give more, healthy MoE stacks less."""
    alarm_load: float = Field(10.0, gt=1)
    """Alarm when the most loaded expert of a layer gets this many times the mean; experts / top-k is the most."""
    alarm_dead: float = Field(0.5, gt=0, lt=1)
    """Alarm when no row chooses this share of a layer's experts, or all rows the same experts."""
    alarm_drift: float = Field(0.3, gt=0, lt=1)
    """Alarm when a layer's expert histogram is this far from that of the early steps (total variation, 0 to 1)."""
    early_steps: int = Field(5, ge=1)
    """First steps of the run whose expert histogram `alarm_drift` compares with."""
    canary: bool = True
    """Prove engine and trainer on a few prompts before the first step."""
    canary_prompts: int = Field(8, ge=8)
    """Different prompts that the canary answers."""
    canary_abs_mean: float = Field(0.5, gt=0)
    """Largest mean |log-prob difference| under replay that the canary accepts, in nats."""
    max_k3: float = Field(1.0, gt=0)
    """Stop the run (exit code 6) when `mismatch/k3` exceeds this."""
    max_skipped_steps: int = Field(3, ge=0)
    """Stop the run (exit code 6) after this many optimizer steps in a row with a non-finite gradient."""
    tokens_every: int = Field(5, ge=0)
    """Keep the worst tokens, their sequences and the histogram of the difference every N steps (`RUN/tokens.jsonl`)."""
    worst_tokens: int = Field(20, ge=1, le=500)
    """Tokens with the largest |log-prob difference| that are kept in such a step."""


class TrackingConfig(Section):
    """Where metrics go besides RUN/metrics.jsonl and the console."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with an API key, offline without. The environment variable WANDB_MODE wins."""
    project: str = "r3"
    """W&B project."""
    entity: str | None = None
    """W&B entity; null takes the account's default."""
