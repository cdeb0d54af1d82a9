"""Sections of the rollout side: the engines, and the routing that they record."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from r3.config_section import HttpUrl, Section

OnDefect = Literal["fail", "drop_sample", "native_sample"]


class RolloutConfig(Section):
    """Rollout actors and their engine."""

    engine: str = "sglang"
    """Engine adapter: `sglang`, `sglang_http`, `lightllm_http`, `vllm_http` (docs/engines.md), or `module:Class`."""
    urls: tuple[HttpUrl, ...] = ()
    """Running servers of a `*_http` engine, such as `http://host:30000`; the workers share them out."""
    http_timeout_s: float = Field(300, gt=0)
    """Longest answer of a server to one request, in seconds."""
    http_retries: int = Field(3, ge=0)
    """Repeats, with back-off, of a request that met a connection error or a status of 500 or above."""
    workers: int = Field(1, ge=1)
    """Rollout actors, each with an engine of its own."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs per rollout actor; 0 runs the engine on the CPU."""
    placement: Literal["pack", "spread"] = "pack"
    """Rollout actors on as few, or as many, nodes of the Ray cluster as possible."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the engine's weights."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts per GRPO step; each is sampled `grpo.group_size` times."""
    max_new_tokens: int = Field(12, ge=1)
    """Longest response, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature, applied to the log-probs of both engine and trainer."""
    top_p: float = 1.0
    """Must stay 1: a truncated distribution has no log-prob that the trainer can recompute."""
    top_k: int = -1
    """Must stay -1, as top_p."""
    min_p: float = 0.0
    """Must stay 0, as top_p."""
    repetition_penalty: float = 1.0
    """Must stay 1, as top_p."""
    presence_penalty: float = 0.0
    """Must stay 0, as top_p."""
    frequency_penalty: float = 0.0
    """Must stay 0, as top_p."""
    logit_processor: str | None = None
    """Must stay unset, as top_p."""
    max_running_requests: int = Field(256, ge=1)
    """Requests that the engine runs at once."""
    max_total_tokens: int | None = Field(32_768, ge=64)
    """KV slots of the engine; null lets the engine size them from its memory fraction (GPU)."""
    mem_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the GPU's memory that the engine takes (weights and KV)."""
    start_timeout_s: float = Field(600, gt=0)
    """Longest engine start, in seconds."""
    timeout_s: float = Field(600, gt=0)
    """Longest generation or weight update call, in seconds."""
    max_failures: int = Field(3, ge=0)
    """Dead rollout actors that a run replaces before it gives up."""
    engine_args: dict[str, Any] = Field({})
    """Further engine arguments (SGLang `ServerArgs`); those that break capture or the sampling contract are refused."""

    @property
    def is_http(self) -> bool:
        """Is the engine a server that is already running?"""
        return self.engine in ("sglang_http", "lightllm_http", "vllm_http")

    @model_validator(mode="after")
    def _gpus(self) -> RolloutConfig:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"rollout.gpus_per_worker={self.gpus_per_worker:g}: name a share of one GPU, or a whole number, over "
                "which the engine is tensor-parallel"
            )
        return self

    @model_validator(mode="after")
    def _sampled_distribution(self) -> RolloutConfig:
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                   "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_processor": None}  # fmt: skip
        changed = [
            f"rollout.{key}={getattr(self, key)!r}" for key, value in neutral.items() if getattr(self, key) != value
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: the recorded log-probs would not be those of the sampled distribution, "
                "so training rollouts may change the temperature only"
            )
        return self


class RoutingConfig(Section):
    """Capture of routed experts."""

    capture: bool = True
    """Record the experts of every training rollout."""
    on_error: OnDefect = "fail"
    """A malformed record: stop the run, leave the sample out, or train the sample on the trainer's own routing."""
    on_missing: OnDefect = "fail"
    """A sample that came back without any record: as on_error."""
    on_alarm: Literal["fail", "warn"] = "fail"
    """A step whose record does not fit the trainer's own choice: stop before it is trained on, or log the alarms."""
    min_overlap: float = Field(0.7, ge=0, lt=1)
    """Overlap with the trainer's own top-k below which a record or layer raises an alarm; 0: relative rules alone."""
    provenance: Literal["auto", "require", "off"] = "auto"
    """Stamp each row with the forward pass that wrote it: where the SGLang plugin runs, always, or never."""
    on_stale: Literal["fail", "drop_sample", "native_rows"] = "fail"
    """Rows known not to be those behind their log-probs: stop, drop the sample, or leave these rows to the trainer."""
    shared_memory: Literal["auto", "require", "off"] = "auto"
    """Take rows through shared memory: where the SGLang plugin runs in this process's engine, always, or never."""
    shared_mib: int = Field(256, ge=1)
    """Shared memory of an engine in MiB; rows that find no room come back as SGLang sends them."""
    block_layers: int | None = Field(None, ge=1)
    """MoE layers per object of a record; a pipeline stage fetches only those with its layers. Default: 8, without a
    pipeline all."""
    save_every: int = Field(0, ge=0)
    """Save the records of every N-th step to `RUN/routing/step-XXXXXXXX.r3`, for `python -m r3.inspect`; 0 = never."""

    @property
    def trains_natively(self) -> bool:
        """Whether a sample without a record may be trained on; one whose rows are all stale has none left."""
        return "native_sample" in (self.on_error, self.on_missing) or self.on_stale == "native_rows"
