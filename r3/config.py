"""The configuration: one schema, one loader, every mistake reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from r3._loading import apply_override, read_tree, validate
from r3.errors import ConfigError

_ENTRY_POINT = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
PACKAGED = Path(__file__).parent / "configs"
# What engine and trainer on one GPU may take of it together.
SHARED_GPU_LIMIT = 0.9
# A bare text in the place of a section stands for this key of it.
_SHORTHANDS = {"model": "path"}


def _entry_point(value: object) -> object:
    if isinstance(value, str) and not _ENTRY_POINT.match(value):
        raise ValueError(f"{value!r} is not of the form 'package.module:name'")
    return value


OnDefect = Literal["fail", "drop_sample", "native_sample"]
EntryPoint = Annotated[str, BeforeValidator(_entry_point)]


def _http_url(value: object) -> object:
    if isinstance(value, str) and not re.match(r"^https?://[^/\s]+(/\S*)?$", value):
        raise ValueError(f"{value!r} is not of the form 'http://host:port'")
    return value.rstrip("/") if isinstance(value, str) else value


HttpUrl = Annotated[str, BeforeValidator(_http_url)]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors, field docstrings are the help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


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
    args: dict[str, Any] = {}
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
    engine_args: dict[str, Any] = {}
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
    block_layers: int = Field(8, ge=1)
    """MoE layers per object in which the record travels; a pipeline stage fetches only the objects with its layers."""
    save_every: int = Field(0, ge=0)
    """Save the records of every N-th step to `RUN/routing/step-XXXXXXXX.r3`, for `python -m r3.inspect`; 0 = never."""

    @property
    def trains_natively(self) -> bool:
        """Whether a sample without a record may be trained on; one whose rows are all stale has none left."""
        return "native_sample" in (self.on_error, self.on_missing) or self.on_stale == "native_rows"


class ReplayConfig(Section):
    """What the trainer does with the record."""

    mode: Literal["none", "r3"] = "r3"
    """`r3`: force the recorded top-k in the old-log-prob and every update pass; `none`: the trainer's own routing."""


class TrainerConfig(Section):
    """Megatron-core trainer ranks and their optimizer."""

    processes: int = Field(1, ge=1)
    """Trainer ranks: data parallel x the sizes below."""
    gpus_per_process: float = Field(0, ge=0)
    """GPUs per rank: 1, a share of one where the engine has the rest, or 0 to train on the CPU over gloo."""
    mem_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the GPU's memory that a rank may take; on a GPU shared with an engine, what `rollout` leaves."""
    placement: Literal["pack", "spread"] = "pack"
    """Trainer ranks on as few, or as many, nodes of the Ray cluster as possible."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; bfloat16 keeps fp32 main parameters."""
    micro_batch_size: int = Field(64, ge=1)
    """Trajectories per microbatch."""
    packed: bool = True
    """Sequences end to end in one row (THD) instead of right-padded to the longest."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks that share every matrix (with sequence parallelism)."""
    pipeline_parallel: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel: int = Field(1, ge=1)
    """Ranks that share every sequence."""
    expert_parallel: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel: int | None = Field(None, ge=1)
    """Ranks that share one expert's matrices; null takes tensor_parallel."""
    distributed_optimizer: bool = False
    """Shard optimizer state and main parameters over the data-parallel ranks."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to experts on other ranks."""
    experts: Literal["auto", "sequential", "grouped"] = "auto"
    """One matrix product per expert, or grouped ones for all of a rank's; `auto`: grouped on a GPU in bfloat16."""
    transformer_engine: bool = False
    """Transformer Engine's layers, where it is installed; only after `python -m r3.doctor replay` passed with them."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recompute; `selective` recomputes attention cores and MoE layers."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate (AdamW)."""
    lr_warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, over the optimizer steps of the run."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW beta 1."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW beta 2."""
    clip_grad: float = Field(1.0, gt=0)
    """Gradient norm limit."""
    start_timeout_s: float = Field(600, gt=0)
    """Longest start of all ranks, in seconds."""
    timeout_s: float = Field(1800, gt=0)
    """Longest training step, in seconds."""

    @property
    def data_parallel(self) -> int:
        """Ranks that work on different trajectories."""
        return self.processes // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

    @property
    def expert_tensor(self) -> int:
        """`expert_tensor_parallel` with its default resolved."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @model_validator(mode="after")
    def _gpus(self) -> TrainerConfig:
        share = self.gpus_per_process
        if share > 1:
            raise ValueError(f"trainer.gpus_per_process={share:g}: a rank works on one GPU; raise trainer.processes")
        if 0 < share < 1 and self.processes > 1:
            raise ValueError(
                f"trainer.gpus_per_process={share:g} with trainer.processes={self.processes}: NCCL connects no two "
                "ranks on one GPU; give every rank a whole one"
            )
        return self

    @model_validator(mode="after")
    def _layout(self) -> TrainerConfig:
        tensor, stages = self.tensor_parallel, self.pipeline_parallel
        dense = tensor * stages * self.context_parallel
        if self.processes % dense:
            raise ValueError(
                f"trainer.processes={self.processes} is not divisible by tensor_parallel x pipeline_parallel x "
                f"context_parallel = {dense}"
            )
        experts = self.expert_tensor * self.expert_parallel * stages
        if self.processes % experts:
            raise ValueError(
                f"trainer.processes={self.processes} is not divisible by expert_tensor_parallel x expert_parallel x "
                f"pipeline_parallel = {experts}"
            )
        if self.expert_tensor != tensor and self.expert_parallel == 1:
            raise ValueError(
                f"trainer.tensor_parallel={tensor} with expert_tensor_parallel={self.expert_tensor} and "
                "expert_parallel=1: Megatron-core would reduce the experts' gradients over the wrong ranks; leave "
                "expert_tensor_parallel unset or use expert_parallel > 1"
            )
        if self.virtual_pipeline > 1 and stages == 1:
            raise ValueError("trainer.virtual_pipeline needs pipeline_parallel > 1; a single stage has no bubble")
        return self


class GrpoConfig(Section):
    """The objective (Group Relative Policy Optimization, arXiv 2402.03300)."""

    group_size: int = Field(8, ge=2)
    """Samples per prompt."""
    mini_steps: int = Field(1, ge=1)
    """Optimizer updates per batch; each takes an equal share of the groups."""
    advantage: Literal["std", "mean", "leave_one_out"] = "std"
    """Group baseline: mean, divided by the group's standard deviation; mean only; leave-one-out mean."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 KL penalty towards the initial model; 0 keeps no reference model."""


class WeightsConfig(Section):
    """Weight transfer from trainer to engines."""

    transport: Literal["auto", "object_store", "ipc", "broadcast"] = "auto"
    """Way to the engines: `ipc` where they share trainer rank 0's GPU, else `broadcast`; `auto` chooses."""
    verify: bool = True
    """Compare a checksum of every bucket that the trainer sent with one of what each engine rank received."""
    timeout_s: float = Field(300, gt=0)
    """Longest wait of a broadcast for its engines, to join and to take one bucket, in seconds."""
    bucket_mib: int = Field(256, ge=1)
    """Size of one flattened bucket, in MiB; `ipc` and `broadcast` hold two on the trainer's device.

    So large are also the batches in which other trainer ranks send their shards, two at once on either side.
    """
    flush_timeout_s: float = Field(30, gt=0)
    """How long a refused cache flush is retried, in seconds."""
    exchange_dir: Path | None = None
    """Directory that rollout workers and `sglang_http` servers both see; null: the temporary directory of one host."""


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


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    routing: RoutingConfig = RoutingConfig()
    replay: ReplayConfig = ReplayConfig()
    trainer: TrainerConfig = TrainerConfig()
    grpo: GrpoConfig = GrpoConfig()
    weights: WeightsConfig = WeightsConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        """Each line of the error is a fault of its own and names, by their dotted paths, the keys that it is about."""
        rollout, grpo = self.rollout, self.grpo
        faults = {
            "replay.mode is r3, but routing.capture is false; capture the routing or set replay.mode: none": (
                self.replay.mode == "r3" and not self.routing.capture
            ),
            f"rollout.prompts_per_step={rollout.prompts_per_step} is not divisible by "
            f"grpo.mini_steps={grpo.mini_steps}; each update takes an equal share of the prompts": (
                rollout.prompts_per_step % grpo.mini_steps != 0
            ),
            f"rollout.workers={rollout.workers} exceeds rollout.prompts_per_step={rollout.prompts_per_step}; "
            "lower the first or raise the second": rollout.prompts_per_step < rollout.workers,
            "metrics.counterfactual_r2 needs routing.capture; capture the routing or switch it off": (
                self.metrics.counterfactual_r2 and not self.routing.capture
            ),
            "rollout.max_total_tokens is null, which needs rollout.gpus_per_worker > 0 to measure; name the KV slots": (
                rollout.max_total_tokens is None and not rollout.gpus_per_worker and not rollout.is_http
            ),
            f"weights.transport={self.weights.transport}, but rollout.engine={rollout.engine} takes weights from a "
            "directory; use auto or object_store": rollout.is_http and self.weights.transport in ("ipc", "broadcast"),
        }
        faults |= _memory_faults(rollout, self.trainer) | _url_faults(rollout, self.weights)
        if found := [text for text, applies in faults.items() if applies]:
            raise ValueError("\n".join(found))
        return self

    def to_yaml(self) -> str:
        """Return every key with its resolved value, as YAML that loads back to the same config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _memory_faults(rollout: RolloutConfig, trainer: TrainerConfig) -> dict[str, bool]:
    """Actors on one GPU: the engines take their shares first, and all need room beside their shares."""
    share, other = rollout.gpus_per_worker, trainer.gpus_per_process
    if not 0 < share < 1:
        return {}
    rest = f"leave {1 - SHARED_GPU_LIMIT:.0%} to CUDA contexts, graphs and NCCL"
    faults = {}
    beside = min(rollout.workers, int((1 - other) / share + 1e-9)) if 0 < other < 1 else 0
    if beside:
        together = beside * rollout.mem_fraction + trainer.mem_fraction
        faults[
            f"rollout.mem_fraction={rollout.mem_fraction:g} (times {beside}) and trainer.mem_fraction="
            f"{trainer.mem_fraction:g} share a GPU and add up to {together:g}; {rest}"
        ] = together > SHARED_GPU_LIMIT + 1e-9
    engines = min(rollout.workers, int(1 / share + 1e-9))
    if engines > 1:
        together = engines * rollout.mem_fraction
        faults[
            f"rollout.mem_fraction={rollout.mem_fraction:g} of {engines} engines that may share a GPU adds up to "
            f"{together:g}; {rest}"
        ] = together > SHARED_GPU_LIMIT + 1e-9
    return faults


def _url_faults(rollout: RolloutConfig, weights: WeightsConfig) -> dict[str, bool]:
    """Faults across the keys of an engine that is a running server."""
    name, urls = rollout.engine, rollout.urls
    remote = [url for url in urls if urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")]
    return {
        f"rollout.engine={name} needs rollout.urls; name the running servers": rollout.is_http and not urls,
        f"rollout.urls={list(urls)} is set, but rollout.engine=sglang starts its own engines; use sglang_http": (
            name == "sglang" and bool(urls)
        ),
        f"rollout.urls={list(urls)} names a server twice": len(set(urls)) < len(urls),
        f"rollout.workers={rollout.workers} exceeds the {len(urls)} rollout.urls; a server takes its weights from one "
        "worker only": rollout.is_http and 0 < len(urls) < rollout.workers,
        f"rollout.gpus_per_worker={rollout.gpus_per_worker:g}, but the servers of rollout.engine={name} hold the GPUs; "
        "set it to 0": rollout.is_http and rollout.gpus_per_worker > 0,
        f"rollout.engine_args is set, but rollout.engine={name} talks to a server that is running; put them on its "
        "command line": rollout.is_http and bool(rollout.engine_args),
        f"rollout.urls has {remote} on another host, so weights.exchange_dir must name a directory that this host and "
        "that one share": name == "sglang_http" and bool(remote) and weights.exchange_dir is None,
    }


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Load FILE over the file that its `defaults` names, apply `key.path=value` overrides and check everything.

    FILE is a path, a name in `./configs`, or a name shipped with the package; None means all defaults. Raises
    `ConfigError` that lists every wrong key at once, with a suggestion for a misspelt one.
    """
    tree = read_tree(find_config(file), find_config, _SHORTHANDS) if file is not None else {}
    for override in overrides:
        apply_override(tree, override, _SHORTHANDS)
    return validate(Config, tree, str(file) if file else "the configuration", [key for key, _, _ in describe()])


def find_config(file: str | Path) -> Path:
    """Return the first of FILE, `./configs/FILE` and the packaged FILE that exists, else raise `ConfigError`."""
    names = [Path(file)] if Path(file).suffix else [Path(file), Path(f"{file}.yaml")]
    candidates = [place / name for name in names for place in (Path(), Path("configs"), PACKAGED)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted(path.name for path in PACKAGED.glob("*.yaml") if path.name != "runtime_env.yaml")
    raise ConfigError(
        f"no config {str(file)!r}; looked in ., ./configs and the package, which ships {', '.join(shipped)}"
    )


def describe() -> Iterator[tuple[str, str, str]]:
    """Yield `(key, default, help line)` of every configuration key."""
    for section, outer in Config.model_fields.items():
        model = outer.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        for name, field in model.model_fields.items():
            yield f"{section}.{name}", str(field.default), field.description or ""


def run_directory(config: Config, stamp: str) -> Path:
    """Return the absolute run directory; `stamp` is the start time in its default name.

    Raises `ConfigError` in a Ray job unless `run.dir` is absolute: a job's current directory is deleted with it.
    """
    directory = config.run.dir or Path("runs") / f"{config.run.name}-{stamp}"
    if not directory.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"run.dir={config.run.dir}: a Ray job runs in a temporary directory; set run.dir to an absolute path"
        )
    return directory.absolute()
