"""The real SGLang engine of the test session: its config, and the actor that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r3.config import Config
from r3.rollout.engine import EngineSpec
from r3.rollout.pool import Actor
from tests import plugin_entry


def engine_config(routing: dict[str, Any] | None = None, **rollout: Any) -> Config:
    """Config of a float32 CPU engine; keyword arguments are keys of `rollout`."""
    return Config.model_validate(
        {
            "task": {
                "kind": "custom",
                "prompts": "tests.fake_engine:make_prompt",
                "reward": "tests.fake_engine:length_reward",
            },
            "rollout": {"dtype": "float32", "max_new_tokens": 8, "max_total_tokens": 16_384, "max_running_requests": 64}
            | rollout,
            "routing": routing or {},
        }
    )


class Host(Actor):
    """The pool's actor, with a way to reach the adapter and SGLang itself under the worker."""

    def engine(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the adapter."""
        return getattr(self._worker._engine, method)(*arguments, **options)

    def play(self, scenario: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a test, in this process, with the adapter and `arguments`."""
        return scenario(self._worker._engine, *arguments)

    def raw(self, **options: Any) -> Any:
        """Call SGLang's own `generate`."""
        return self._worker._engine._engine.generate(**options)

    def decode_error(self, lengths: list[int], slots_at_once: int) -> float:
        """Largest difference between our batched decode attention and SGLang's loop over sequences."""
        import torch
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from r3.rollout.sglang_cpu import attention

        generator = torch.Generator().manual_seed(0)
        heads, kv_heads, dim, slots = 4, 2, 32, 1 + sum(lengths)
        query = torch.randn(len(lengths), heads, dim, generator=generator)
        keys, values = (torch.randn(slots, kv_heads, dim, generator=generator) for _ in range(2))
        free = (1 + torch.randperm(slots - 1, generator=generator)).int()
        # What lies behind a sequence in the table must not matter, so it points at slots of others.
        table = torch.randint(1, slots, (2 * len(lengths), max(lengths)), generator=generator, dtype=torch.int32)
        owners = torch.randperm(2 * len(lengths), generator=generator)[: len(lengths)]
        for owner, own in zip(owners.tolist(), free.split(lengths), strict=True):
            table[owner, : len(own)] = own
        shared = (keys, values, table, owners, torch.tensor(lengths))
        options = {"scaling": dim**-0.5, "enable_gqa": True, "causal": False, "sliding_window_size": None}
        ours, theirs = torch.empty_like(query), torch.empty_like(query)
        attention._SLOTS = slots_at_once
        batched = object.__new__(attention.BatchedDecodeBackend)
        batched._run_sdpa_forward_decode(query, ours, *shared, **options)
        TorchNativeAttnBackend._run_sdpa_forward_decode(batched, query, theirs, *shared, **options)
        return float((ours - theirs).abs().max())


class StampingHost(Host):
    """An engine with the plugin that stamps routing rows."""

    def start(self) -> EngineSpec:
        """Start the engine."""
        plugin_entry.show()
        return super().start()


class StockHost(Host):
    """An engine without it, as SGLang comes."""

    def start(self) -> EngineSpec:
        """Start the engine."""
        plugin_entry.hide()
        return super().start()


@contextmanager
def running(host: type[Host], config: Config, model: Path, gpus: float = 0) -> Iterator[Callable[..., Any]]:
    """Start an engine in an actor of kind `host`; yield a function `(method, *args, **kwargs)` that calls it."""
    import ray

    actor = ray.remote(host).options(num_cpus=1, num_gpus=gpus).remote(config, str(model), 0)

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        return ray.get(getattr(actor, method).remote(*arguments, **options), timeout=400)

    call("start")
    yield call
    call("close")
    ray.kill(actor)
