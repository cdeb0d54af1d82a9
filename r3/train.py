"""The command: `python -m r3.train --config FILE [key.path=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r3._identity import require_own_packages
from r3.checkpoint import FOLDER, Checkpoint, CheckpointStore, find, run_lock, run_of
from r3.config import Config, describe, load_config, run_directory
from r3.errors import CheckpointError, ConfigError, R3Error
from r3.interrupt import Sigterm
from r3.run import RESOLVED, RunDirectory, read_rows, require_unused
from r3.summary import summarise

USAGE = "python -m r3.train --config FILE [key.path=value ...] [--resume [PATH] | --overwrite] [--dry-run]"
EPILOG = (
    "exit codes: 0 done, 2 usage or config, 3 routing, 4 engine or cluster, 5 checkpoint, 6 diverged, "
    "130/143 interrupted"
)


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for; `resume` is the run directory or checkpoint to go on from."""

    config: Config
    run: Path
    resume: Path | None
    overwrite: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    options, sigterm = _options(arguments), Sigterm()
    try:
        require_own_packages()
        if options.dry_run:
            return _dry_run(_config(options))
        with sigterm.raised():
            return _run(_job(options), sigterm)
    except BaseException as error:
        code = sigterm.exit_code(error)
        if isinstance(error, R3Error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif code < 128:
            raise
        return code


def _dry_run(config: Config) -> int:
    """Print the resolved config, and the memory plan as comments, so that the output is a config file still."""
    from r3.plan import plan, render
    from r3.preflight import check

    print(config.to_yaml(), end="", flush=True)
    size = check(config, planned=True)
    print("# memory plan", *render(config, size, plan(config, size)), sep="\n#   ")
    return 0


def _config(options: argparse.Namespace) -> Config:
    """Load the configuration: FILE, or what the run to resume was started with."""
    file = options.config
    if file is None and options.resume not in (None, ""):
        file = run_of(Path(options.resume)) / RESOLVED
        if not file.is_file():
            raise CheckpointError(f"--resume {options.resume}: no run there ({file} is missing)")
    if file is None:
        raise ConfigError("--config FILE is missing; only --resume PATH knows the configuration")
    return load_config(file, options.overrides)


def _job(options: argparse.Namespace) -> Job:
    """Decide the run directory; raise `ConfigError` or `CheckpointError` when there is nothing to resume."""
    config = _config(options)
    if options.resume is None:
        return Job(config, run_directory(config, time.strftime("%Y%m%d-%H%M%S")), None, options.overwrite)
    resume = Path(options.resume) if options.resume else _newest_run(config)
    run = run_of(resume)
    if options.config is not None and config.run.dir is not None and config.run.dir.absolute() != run:
        raise ConfigError(f"--resume {resume} continues {run}, but run.dir={config.run.dir}; drop one of the two")
    return Job(config, run, resume, overwrite=False)


def _newest_run(config: Config) -> Path:
    """Return `run.dir`, or the newest `runs/<run.name>-*` that has checkpoints."""
    if config.run.dir is not None:
        return config.run.dir
    pattern = f"{config.run.name}-*/{FOLDER}"
    found = sorted(Path("runs").glob(pattern), key=lambda folder: folder.stat().st_mtime)
    if not found:
        raise CheckpointError(f"--resume: nothing matches {Path('runs').absolute() / pattern}; name the run directory")
    return found[-1].parent


def _run(job: Job, sigterm: Sigterm) -> int:
    """Train and leave `status.json` with the outcome, whatever it is."""
    if job.resume is not None and not (job.run / RESOLVED).is_file():
        raise CheckpointError(f"--resume {job.resume}: no run there ({job.run / RESOLVED} is missing)")
    if job.resume is None and not job.overwrite:
        require_unused(job.run)  # before the lock, which leaves a file
    with run_lock(job.run):
        checkpoint = None
        if job.resume is None:
            run = RunDirectory.create(job.run, job.config, overwrite=job.overwrite)
        else:
            checkpoint = find(job.resume)
            run = RunDirectory.reopen(job.run, job.config, checkpoint.state.step)
            hidden = CheckpointStore(job.run, job.config.run.keep_checkpoints).leave_behind(checkpoint.state.step)
            print(f"resuming after step {checkpoint.state.step} from {checkpoint.path}", flush=True)
            print("".join(f"left behind {path}\n" for path in hidden), end="", flush=True)
        print(f"run directory {run.path}", flush=True)
        with _outcome(run, sigterm):
            _train(job.config, run, checkpoint, sigterm)
        run.write_status("done", exit_code=0, step=job.config.run.steps)
    return 0


@contextmanager
def _outcome(run: RunDirectory, sigterm: Sigterm) -> Iterator[None]:
    """Record how the work inside failed, if it does."""
    try:
        yield
    except BaseException as error:
        code = sigterm.exit_code(error)
        run.write_status("interrupted" if code > 128 else "failed", exit_code=code, error=sigterm.name(error))
        raise


def _train(config: Config, run: RunDirectory, checkpoint: Checkpoint | None, sigterm: Sigterm) -> None:
    # Imported here: `--help`, `--dry-run` and every mistake in the configuration answer without torch, Ray or SGLang.
    from r3.builtin import resolve_model
    from r3.preflight import check, check_installed
    from r3.tasks import open_task

    check(config)
    if not os.environ.get("RAY_ADDRESS"):
        check_installed(config)
    task = open_task(config.task)
    model = resolve_model(config.model.path, target_reward=config.model.warm_start_reward, seed=config.run.seed)

    import ray

    from r3.cluster import ray_cluster
    from r3.environment import environment
    from r3.loop import Actors, train
    from r3.rollout.pool import RolloutPool
    from r3.sync import WeightSync
    from r3.tracking import Tracker
    from r3.trainer.group import TrainerGroup

    tracker = Tracker(config, run)
    code = 1
    try:
        # `ray.init` puts a handler of its own in the place of ours.
        with ray_cluster(config) as places, sigterm.raised():
            run.log_event("environment", **environment(ray.nodes()))
            print(
                f"starting {config.rollout.workers} rollout and {config.trainer.processes} trainer actors", flush=True
            )
            with (
                RolloutPool(config, model, on_event=run.log_event, place=places.rollout) as pool,
                TrainerGroup(config, model, place=places.trainer) as trainers,
                # Here too, before anything is closed: `ray job stop` kills the driver seconds after SIGTERM.
                _outcome(run, sigterm),
                WeightSync(config, pool, trainers, run.log_event) as weights,
            ):
                engines = pool.describe_engines()
                run.log_event("engines", found=engines)
                print(*engines, sep="\n", flush=True)
                train(config, task, Actors(pool, trainers, weights), run, tracker, checkpoint)
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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `--resume key=value` is `--resume` without PATH, followed by an override."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume and not os.path.exists(options.resume):
        options.overrides.append(options.resume)
        options.resume = ""
    if options.config is None and not options.resume:
        parser.error("the following arguments are required: --config")
    return options


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(f"  {key} (default {default})\n      {text}" for key, default, text in describe())
    parser = argparse.ArgumentParser(
        prog="r3.train",
        usage=USAGE,
        description="Train a Mixture-of-Experts model with GRPO and rollout router replay.",
        epilog=f"configuration keys:\n{keys}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a path, a name in ./configs, or a shipped name")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint: of the run directory PATH, PATH itself, or of the newest run of this "
        "configuration; with PATH, --config may be left out",
    )
    start.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in run.dir")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, model and engine arguments, print the resolved config and a memory plan, and stop",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change single keys")
    return parser


if __name__ == "__main__":
    sys.exit(main())
