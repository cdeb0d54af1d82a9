"""The configuration: one schema, one loader, every mistake reported at once.

Its sections are defined in `r3.config_run`, `config_rollout` and `config_trainer`; here they are put together, checked
against each other and loaded. Import them from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from pydantic import model_validator

from r3._loading import apply_override, read_tree, validate
from r3.config_rollout import OnDefect as OnDefect
from r3.config_rollout import RolloutConfig as RolloutConfig
from r3.config_rollout import RoutingConfig as RoutingConfig
from r3.config_run import MetricsConfig as MetricsConfig
from r3.config_run import ModelConfig as ModelConfig
from r3.config_run import RunConfig as RunConfig
from r3.config_run import TaskConfig as TaskConfig
from r3.config_run import TrackingConfig as TrackingConfig
from r3.config_section import EntryPoint as EntryPoint
from r3.config_section import HttpUrl as HttpUrl
from r3.config_section import Section as Section
from r3.config_trainer import GrpoConfig as GrpoConfig
from r3.config_trainer import ReplayConfig as ReplayConfig
from r3.config_trainer import TrainerConfig as TrainerConfig
from r3.config_trainer import WeightsConfig as WeightsConfig
from r3.errors import ConfigError

PACKAGED = Path(__file__).parent / "configs"
# What engine and trainer on one GPU may take of it together.
SHARED_GPU_LIMIT = 0.9
# A bare text in the place of a section stands for this key of it.
_SHORTHANDS = {"model": "path"}


# Whole objects are fetched: the more layers in one, the more of its neighbours' a pipeline stage gets.
_STAGED_BLOCK_LAYERS = 8


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

    @property
    def block_layers(self) -> int | None:
        """MoE layers per object of a record, None for all: without a pipeline every rank needs all of them."""
        return self.routing.block_layers or (_STAGED_BLOCK_LAYERS if self.trainer.pipeline_parallel > 1 else None)

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
