"""`sglang.Engine` for the CPU platform.

Importing this module installs the stand-ins, which is what makes SGLang's child processes work: they are spawned, and a
spawned process imports the module of its target function before anything else.
"""

from __future__ import annotations

from typing import Any

from r3.rollout.sglang_cpu import standins

standins.install()

from sglang.srt.entrypoints.engine import Engine  # noqa: E402  (needs the stand-ins)


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """Run SGLang's scheduler in a process that has the stand-ins."""
    from sglang.srt.managers import scheduler

    scheduler.Scheduler.reseed = reseed
    scheduler.run_scheduler_process(*args, **kwargs)


def reseed(self: Any, seed: int) -> None:
    """Restart the sampler's random numbers; the scheduler's method that `CpuEngine.reseed` calls."""
    import torch

    torch.manual_seed(seed)


def run_detokenizer_process(*args: Any, **kwargs: Any) -> None:
    """Run SGLang's detokenizer in a process that has the stand-ins."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as run

    run(*args, **kwargs)


class CpuEngine(Engine):
    """SGLang's engine with process functions that install the stand-ins first."""

    run_scheduler_process_func = staticmethod(run_scheduler_process)
    run_detokenizer_process_func = staticmethod(run_detokenizer_process)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # SGLang's CPU platform collects garbage on every cache flush: 0.4 s over imported modules, 2 ms without them.
        self.freeze_gc()

    def reseed(self, seed: int) -> None:
        """Restart the sampler's random numbers.

        SGLang's own way, a `sampling_seed` per request under `enable_deterministic_inference`, is not for this
        platform: it needs Triton for its matrix products and sgl_kernel for its hash.
        """
        self.collective_rpc("reseed", seed=seed)

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, server_args: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], list[str]]:
        # Token ids in, token ids out: the scheduler answers the tokenizer manager directly, so the detokenizer would
        # never get a message, and it costs 0.5 GB and a third of the start-up time on two cores.
        if server_args.skip_tokenizer_init:
            return [], []
        return super()._launch_detokenizer_subprocesses(server_args, *args, **kwargs)
