"""The command: `python -m r3.train --config FILE [key.path=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from r3._identity import require_own_packages
from r3.config import Config, describe, load_config, run_directory
from r3.errors import R3Error
from r3.run import RunDirectory, read_rows
from r3.summary import summarise

USAGE = "python -m r3.train --config FILE [key.path=value ...] [--dry-run]"
EPILOG = (
    "exit codes: 0 done, 2 usage or config, 3 routing, 4 engine or cluster, 5 checkpoint, 6 diverged, "
    "130/143 interrupted"
)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that every actor is closed on the way out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    options = _parser().parse_args(arguments)
    try:
        require_own_packages()
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            return _dry_run(config)
        with _sigterm_as_exception():
            return _run(config)
    except R3Error as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143


def _dry_run(config: Config) -> int:
    """Print the resolved config, and the memory plan as comments, so that the output is a config file still."""
    from r3.plan import plan, render
    from r3.preflight import check

    print(config.to_yaml(), end="", flush=True)
    size = check(config)
    print("# memory plan", *render(config, size, plan(config, size)), sep="\n#   ")
    return 0


def _run(config: Config) -> int:
    """Train and leave `status.json` with the outcome, whatever it is."""
    run = RunDirectory.create(run_directory(config, time.strftime("%Y%m%d-%H%M%S")), config)
    print(f"run directory {run.path}", flush=True)
    try:
        _train(config, run)
    except BaseException as error:
        code = {KeyboardInterrupt: 130, Terminated: 143}.get(type(error), getattr(error, "exit_code", 1))
        run.write_status(
            "interrupted" if code > 128 else "failed", exit_code=code, error=f"{type(error).__name__}: {error}"
        )
        raise
    run.write_status("done", exit_code=0, step=config.run.steps)
    return 0


def _train(config: Config, run: RunDirectory) -> None:
    # Imported here: `--help`, `--dry-run` and every mistake in the configuration answer without torch, Ray or SGLang.
    from r3.builtin import resolve_model
    from r3.preflight import check, check_installed
    from r3.tasks import open_task

    check(config)
    if not os.environ.get("RAY_ADDRESS"):
        check_installed(config)
    task = open_task(config.task)
    model = resolve_model(config.model.path, target_reward=config.model.warm_start_reward, seed=config.run.seed)

    from r3.cluster import ray_cluster
    from r3.loop import Actors, train
    from r3.rollout.pool import RolloutPool
    from r3.tracking import Tracker
    from r3.trainer.group import TrainerGroup

    tracker = Tracker(config, run)
    code = 1
    try:
        with ray_cluster(config):
            print(
                f"starting {config.rollout.workers} rollout and {config.trainer.processes} trainer actors", flush=True
            )
            with (
                RolloutPool(config, model, on_event=run.log_event) as pool,
                TrainerGroup(config, model) as trainers,
            ):
                train(config, task, Actors(pool, trainers), run, tracker)
        code = 0
    finally:
        tracker.close(code)
    _close(run)


def _close(run: RunDirectory) -> None:
    """Print the closing summary and draw the curves."""
    from r3.curves import draw_curves

    rows = read_rows(run.metrics)
    final_eval = run.final_evaluation()
    lines = summarise(rows, final_eval)
    width = max(len(line.name) for line in lines)
    print("\n".join(f"  {line.name:<{width}}  {line.value}" for line in lines), flush=True)
    draw_curves(rows, run.curves, final_eval)
    print(f"trained model {run.hf}\ncurves {run.curves}", flush=True)


def _fail(error: R3Error) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    def raise_terminated(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  {key} (default {default})\n      {text}" for key, default, text in describe())
    parser = argparse.ArgumentParser(
        prog="r3.train",
        usage=USAGE,
        description="Train a Mixture-of-Experts model with GRPO and rollout router replay.",
        epilog=f"configuration keys:\n{keys}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a path, a name in ./configs, or a shipped name"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, model and engine arguments, print the resolved config and a memory plan, and stop",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change single keys")
    return parser


if __name__ == "__main__":
    sys.exit(main())
