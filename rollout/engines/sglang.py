"""SGLang inside the rollout process: stock `sglang.Engine` on a GPU, the same engine over our platform on a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from r3.config import Config
from r3.errors import ConfigError, EngineError
from r3.rollout.early import EarlyLook
from r3.rollout.engine import EngineSpec, Generation, Recorded, Request, Sampling
from r3.rollout.engines.sglang_answers import read_answer, sampling_params
from r3.rollout.engines.sglang_args import check_environment, check_output_layer, check_release, engine_kwargs
from r3.rollout.engines.sglang_watch import Watch, watch_engine
from r3.rollout.engines.sglang_weights import WeightLoader
from r3.rollout.segment import Owner, Ticket
from r3.rollout.sglang_plugin.client import copies, open_returns, switch
from r3.rollout.wire.sglang import STOCK_DTYPE
from r3.routing import Provenance, RowsSeen
from r3.types import ModelSpec, WeightVersion
from r3.weights import STREAMED, BroadcastGroup, WeightPart, WeightSource


class SglangEngine:
    """Adapter of one in-process SGLang engine (0.5.17 to 0.5.23; on a CPU 0.5.23).

    `generate` and `load_weights` run the engine's own event loop, so they must be called from the thread that made it.
    """

    def __init__(self, config: Config, model_dir: str | Path, index: int) -> None:
        """Start the engine with the weights of `model_dir` as version 0; raise `ConfigError` or `EngineError`."""
        self._config = config
        self._model = ModelSpec.from_directory(model_dir)
        arguments = engine_kwargs(config, str(model_dir), index)
        check_environment()
        check_output_layer(model_dir)
        on_gpu = config.rollout.gpus_per_worker > 0
        make, release = _gpu_engine() if on_gpu else _cpu_engine()
        self._name = f"sglang {release}"
        self._ranks = int(arguments.get("tp_size", 1))
        self._shares_prefixes = not arguments.get("disable_radix_cache", False)
        self._version: WeightVersion | None = 0
        self._coming: WeightVersion = 0
        try:
            self._engine = make(**arguments)
        except TypeError as error:
            raise ConfigError(f"rollout.engine_args: {self._name} does not take them ({error})") from error
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            raise EngineError(f"{self._name} did not start: {error}") from error
        self._watch: Watch | None = None
        self._segment: Owner | None = None
        try:
            # First: what follows waits for the engine's processes.
            self._watch = watch_engine(self._engine, self._name)
            self._provenance, self._unstamped = self._switch_stamps()
            self._segment, self._unshared = self._open_segment(on_gpu)
            self._loader = WeightLoader(
                self._engine, self._name, self._model, self._ranks, verify=config.weights.verify
            )
        except BaseException:
            self.close()
            raise

    def spec(self) -> EngineSpec:
        """Describe the engine that is running."""
        config, model = self._config, self._model
        recorded = Recorded(model.moe_layers, model.num_experts, model.top_k, cached_rows=True)
        return EngineSpec(
            model, self._name, config.routing.capture, config.rollout.dtype, recorded,
            provenance=self._provenance, unstamped=self._unstamped,
            shared_memory=self._segment is not None, unshared=self._unshared,
            copies=copies(self._engine) if config.routing.capture else "",
            transports=("object_store", *STREAMED), ranks=self._ranks, unverified=self._loader.unverified,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, capture: bool) -> list[Generation]:
        """Answer every request in one batch, in order.

        A record that cannot be decoded is returned as `Generation.defect`. Raises `EngineError` where SGLang refuses
        the batch, or tokens, log-probs or weight version are not what they must be.
        """
        if self._version is None:
            raise EngineError(f"{self._name} holds half-loaded weights; load a full set first")
        if not requests:
            return []
        prompts = [request.tokens.tolist() for request in requests]
        if self._config.run.deterministic:
            # Which part of a prompt is computed and which comes from the cache decides the order of sums.
            self.flush_cache()
        if sampling.seed is not None and hasattr(self._engine, "reseed"):
            self._engine.reseed(sampling.seed)
        self._warm_cache(prompts)
        # SGLang takes one start for a batch (0.5.23, `GenerateReqInput`), so what some requests do not want is cut.
        start = min(request.routing_start for request in requests)
        options = {"routed_experts_start_len": start} if start else {}
        try:
            with self._looking(capture) as sound:
                outputs = self._call(prompts, sampling, return_logprob=True, return_routed_experts=capture, **options)
            if len(outputs) != len(requests):
                raise EngineError(f"{self._name} returned {len(outputs)} answers to {len(requests)} requests")
            pairs = zip(requests, outputs, strict=True)
            return [
                self._generation(i, request, output, capture, start, sound) for i, (request, output) in enumerate(pairs)
            ]
        finally:
            if self._segment is not None:
                self._segment.abandon()  # what nobody read has no other owner

    def load_weights(self, source: WeightSource, version: WeightVersion) -> None:
        """Replace all weights from flattened buckets, or from a checkpoint directory, then flush the prefix cache.

        Raises `EngineError` with the engine's own message; until a full load succeeds the engine refuses to generate.
        """
        self._version = None
        self._loader.load(source, version)
        self.flush_cache()
        self._version = version

    def begin_weights(self, version: WeightVersion) -> None:
        """Begin an update whose buckets come one by one; until `end_weights` the engine refuses to generate."""
        self._version, self._coming = None, version
        self._loader.begin(version)

    def load_part(self, part: WeightPart) -> None:
        """Load one bucket by its handles or from the broadcast group; raise `EngineError`."""
        self._loader.load_part(part)

    def end_weights(self, checksums: Sequence[int]) -> None:
        """End the update: compare checksums, flush the prefix cache, and answer with the new version from now on.

        Raises `EngineError` for bytes that arrived changed.
        """
        self._loader.end(checksums)
        self.flush_cache()
        self._version = self._coming

    def join_group(self, group: BroadcastGroup, offset: int) -> None:
        """Let every rank join a broadcast group, from rank `offset` on; raise `EngineError`."""
        self._loader.join(group, offset)

    def leave_group(self, name: str) -> None:
        """Leave a broadcast group; raise `EngineError`."""
        self._loader.leave(name)

    def flush_cache(self) -> None:
        """Drop the prefix cache and wait until SGLang confirms it, at most `weights.flush_timeout_s`.

        SGLang refuses a flush while its scheduler still holds the last batch, which it may for a moment after its
        answers came back. Rows and KV of old weights must not outlive an update, so a refusal is never accepted.
        """
        limit = self._config.weights.flush_timeout_s
        deadline = time.monotonic() + limit
        while not self._engine.flush_cache().success:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self._name} refused to flush its cache for {limit:g} s (weights.flush_timeout_s): "
                    "requests are pending"
                )
            time.sleep(0.005)

    def close(self) -> None:
        """Stop SGLang's processes."""
        if self._watch is not None:
            self._watch.stop()
        self._engine.shutdown()
        if self._segment is not None:
            self._segment.close()

    def _warm_cache(self, prompts: Sequence[list[int]]) -> None:
        """Compute prompts that repeat (a group's samples share theirs) once, instead of once per sample.

        SGLang prefills equal prompts that arrive together side by side; after a weight update, when its cache is empty,
        that is most of the work of a step. The one token that this samples is thrown away.
        """
        repeated = {tuple(prompt) for prompt in prompts} if self._shares_prefixes else set()
        if 0 < len(repeated) < len(prompts):
            self._call([list(prompt) for prompt in sorted(repeated)], Sampling(1.0, 1))

    def _call(self, prompts: Sequence[list[int]], sampling: Sampling, **options: bool | int) -> list[dict[str, Any]]:
        try:
            outputs: list[dict[str, Any]] = self._engine.generate(
                input_ids=prompts, sampling_params=sampling_params(sampling, len(prompts)), **options
            )
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"{self._name} refused {len(prompts)} requests: {error}") from error
        return outputs

    def _looking(self, capture: bool) -> AbstractContextManager[Mapping[Ticket, RowsSeen]]:
        """Look at rows in the segment as they come; not at those of a model with dense layers, which are cut out."""
        if not capture or self._segment is None or len(self._model.moe_layers) < self._model.num_layers:
            return nullcontext({})
        return EarlyLook(self._segment, self._model)

    def _generation(
        self,
        index: int,
        request: Request,
        output: dict[str, Any],
        capture: bool,
        start: int = 0,
        sound: Mapping[Ticket, RowsSeen] = MappingProxyType({}),
    ) -> Generation:
        assert self._version is not None
        return read_answer(
            index, request, output, self._model,
            version=self._version, engine=self._name, capture=capture, start=start, provenance=self._provenance,
            segment=self._segment, sound=sound,
            # Narrow ids come from the plugin alone, where a record finds no room in its segment.
            dtype=STOCK_DTYPE if self._segment is None else None,
        )  # fmt: skip

    def _open_segment(self, on_gpu: bool) -> tuple[Owner | None, str]:
        routing = self._config.routing
        if not routing.capture:
            return None, "routing.capture is off"
        # On a CPU the memory is taken when it is first used: a page fault there is nothing beside a pass.
        return open_returns(self._engine, routing.shared_memory, routing.shared_mib << 20, prefault=on_gpu)

    def _switch_stamps(self) -> tuple[Provenance, str]:
        if not self._config.routing.capture:
            return "unknown", "routing.capture is off"
        return switch(self._engine, self._config.routing.provenance)


def _gpu_engine() -> tuple[Any, str]:
    """Return stock `sglang.Engine` and its release."""
    try:
        import sglang
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine=sglang: {error}; pip install 'rollout-router-replay[sglang]', or set "
            "rollout.gpus_per_worker=0 to run on the CPU"
        ) from error
    check_release(sglang.__version__)
    return sglang.Engine, sglang.__version__


def _cpu_engine() -> tuple[Any, str]:
    """Return the engine over the CPU platform and its release."""
    if not [e for e in entry_points(group="sglang.srt.platforms") if e.name == "r3_cpu"]:
        raise ConfigError(
            "the SGLang platform r3_cpu is not registered; install this package (pip install --no-deps -e .), "
            "running from the source tree alone is not enough for the CPU engine"
        )
    try:
        from r3.rollout.sglang_cpu.engine import CpuEngine
    except ImportError as error:
        raise ConfigError(f"rollout.engine=sglang: {error}; scripts/quickstart.sh installs the CPU engine") from error
    import sglang
    import torch

    check_release(sglang.__version__)
    if torch.cuda.is_available():
        raise ConfigError(
            "rollout.gpus_per_worker is 0 but CUDA is visible; set it to 1, or CUDA_VISIBLE_DEVICES to ''"
        )
    return CpuEngine, sglang.__version__
