"""Is this machine right? `python -m r3.doctor [--config FILE] [key.path=value ...] [--quick] [--json]`.

One line per check and a fix per failure. The last checks start the parts for real: Ray, and in a rollout actor the
engine of the config, which must return a routing record that holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from r3._identity import require_own_packages
from r3.config import Config, load_config
from r3.crc import IMPLEMENTATION
from r3.errors import ConfigError, EngineError, R3Error

State = Literal["ok", "warn", "FAIL", "skip"]
DISTRIBUTION = "rollout-router-replay"
PYTHONS = ((3, 11), (3, 12))
# What the test suite covers; the ranges are those of the distribution's own metadata.
TESTED = {"sglang": "0.5.23", "megatron-core": "0.16.1", "torch": "2.13.0", "transformers": "5.19.0", "ray": "2.60"}
PACKAGES = ("ray", "torch", "sglang", "megatron-core", "transformers", "safetensors", "wandb", "reasoning-gym")
_FREE_DISK = 2 * 2**30
_PROBE_TIMEOUT_S = 300
# Runs in a process of its own: a broken CUDA installation may take the interpreter down with it.
_GPU_PROBE = """
import json, torch
import torch.distributed as dist
found = {"torch": torch.__version__, "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
if torch.cuda.is_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    value = torch.ones(1, device="cuda")
    dist.all_reduce(value)
    found["reduced"] = value.item()
    dist.destroy_process_group()
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check; `fix` says what to do unless all is well."""

    name: str
    state: State
    detail: str
    fix: str = ""

    def line(self) -> str:
        """Return the check as one line of text."""
        return f"{self.state:<4}  {self.name:<14}  {self.detail}" + (f" -> {self.fix}" if self.fix else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and return 0 when none failed, 4 when one did, 2 for a wrong config."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["replay"]:
        from r3 import proof

        return proof.main(arguments[1:])
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    try:
        config = load_config(options.config, options.overrides)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = []
    for outcome in examine(config, quick=options.quick):
        found.append(outcome)
        if not options.json:
            print(outcome.line(), flush=True)
    failed = [outcome.name for outcome in found if outcome.state == "FAIL"]
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(outcome) for outcome in found]}, indent=1))
    else:
        print(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}" if failed else "all is well")
    return EngineError.exit_code if failed else 0


def examine(config: Config, *, quick: bool) -> Iterator[Check]:
    """Yield every check as it is done; `quick` leaves out those that start Ray and the engine."""
    yield check_python()
    own = _attempt("r3", _own_packages)
    yield own
    if own.state == "FAIL":
        return  # whatever follows would fail at an import
    for package in PACKAGES:
        yield check_package(package)
    yield _attempt("installation", lambda: _installed(config))
    yield _attempt("config", lambda: _config(config))
    yield check_gpu(config)
    yield from check_disk()
    yield check_shared_memory(config)
    yield from check_parts(config, quick=quick)


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Compare the interpreter with the supported ones."""
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if version in PYTHONS and platform.system() == "Linux":
        return Check("python", "ok", detail)
    return Check("python", "FAIL", detail, "use Python 3.11 or 3.12 on Linux")


def check_package(name: str) -> Check:
    """Compare the installed version of a package with the range that the distribution's metadata asks for."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return Check(name, "FAIL", f"{DISTRIBUTION} is not installed", "pip install -e . in the repository")
    (needed,) = {str(r.specifier): r for r in wanted if r.name == name}.values()
    try:
        installed = version(name)
    except PackageNotFoundError:
        extra = str(needed.marker).partition('"')[2].rstrip('"') if needed.marker else ""
        target = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
        optional = name in ("wandb", "reasoning-gym")
        return Check(name, "warn" if optional else "FAIL", "not installed", f"pip install '{target}'")
    tested = TESTED.get(name)
    note = f" (tested: {tested})" if tested and not installed.startswith(tested) else ""
    if needed.specifier.contains(installed, prereleases=True):
        return Check(name, "ok", installed + note)
    return Check(
        name, "FAIL", f"{installed}, supported: {needed.specifier}", f"pip install '{needed.name}{needed.specifier}'"
    )


def check_gpu(config: Config) -> Check:
    """Look for CUDA devices and let NCCL reduce one number where there are any."""
    wanted = config.rollout.gpus_per_worker > 0 or config.trainer.gpus_per_process > 0
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU_PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("gpu", "FAIL", f"torch did not answer in {_PROBE_TIMEOUT_S} s", "look at nvidia-smi and dmesg")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check("gpu", "FAIL", reason, "reinstall torch for this machine's driver (nvidia-smi shows it)")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["gpus"]:
        names = ", ".join(sorted(set(found["gpus"])))
        return Check("gpu", "ok", f"{len(found['gpus'])} x {names}, NCCL {found['nccl']} reduces")
    if wanted:
        return Check(
            "gpu", "FAIL", f"torch {found['torch']} sees none, the config asks for some",
            "set rollout.gpus_per_worker=0 trainer.gpus_per_process=0, or install a CUDA build of torch",
        )  # fmt: skip
    return Check("gpu", "ok", f"none; torch {found['torch']} runs on {os.cpu_count()} CPU cores")


def check_disk() -> Iterator[Check]:
    """Look for room where runs, built-in models and Ray's sessions are written."""
    from r3.builtin import cache_dir
    from r3.plan import human

    places = {"runs": (Path.cwd(), "change directory or set run.dir"), "cache": (cache_dir(), "set R3_CACHE"),
              "ray sessions": (Path(os.environ.get("RAY_TMPDIR", "/tmp")), "set RAY_TMPDIR")}  # fmt: skip
    for name, (folder, fix) in places.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        detail = f"{human(free)} free for {name} in {folder}"
        if not os.access(there, os.W_OK):
            yield Check("disk", "FAIL", f"{there} is not writable ({name})", fix)
        elif free < _FREE_DISK:
            yield Check("disk", "FAIL", detail, f"free {human(_FREE_DISK)}, or {fix}")
        else:
            yield Check("disk", "ok", detail)


def check_shared_memory(config: Config, folder: Path = Path("/dev/shm")) -> Check:
    """Compare /dev/shm, where Ray keeps objects, with what the config needs; Ray falls back to the disk, slowly."""
    from r3.plan import human, plan
    from r3.preflight import check

    try:
        needed = plan(config, check(config)).object_store
    except ConfigError:
        needed = 0
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}", "mount a tmpfs there; Ray uses the disk instead")
    free = shutil.disk_usage(folder).free
    detail = f"{human(free)} free in {folder}, the run needs {human(needed)}"
    if free < needed:
        return Check("shared memory", "warn", detail, "enlarge it (docker run --shm-size); Ray spills to disk instead")
    return Check("shared memory", "ok", detail)


def check_parts(config: Config, *, quick: bool) -> Iterator[Check]:
    """Start Ray, and on it the engine, for real; unless `quick`."""
    if quick:
        yield Check("ray", "skip", "not started (--quick)")
        yield Check("engine", "skip", "not started (--quick)")
        return
    with ExitStack() as stack:
        parts = _Parts(config, stack)
        started = _attempt("ray", parts.start_ray)
        yield started
        if started.state == "FAIL":
            yield Check("engine", "skip", "not started, because Ray was not")
        else:
            yield _attempt("engine", parts.start_engine)


class _Parts:
    """The parts of a run that the doctor starts, one after the other."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self._config = config
        self._stack = stack

    def start_ray(self) -> str:
        """Start or join the cluster as a run does, reserve room for its actors and run a task."""
        import ray

        from r3.cluster import ray_cluster

        self._places = self._stack.enter_context(ray_cluster(self._config))

        @ray.remote(num_cpus=0)
        def look() -> int:
            return os.getpid()

        pid = ray.get(look.remote(), timeout=_PROBE_TIMEOUT_S)
        return f"{ray.__version__} with {ray.cluster_resources().get('CPU', 0):g} CPUs ran a task in process {pid}"

    def start_engine(self) -> str:
        """Start one rollout actor and let it prove its capture, as a run does before its first step."""
        import ray

        from r3.builtin import PREFIX, is_built, plan_model, resolve_model
        from r3.rollout.pool import RolloutPool
        from r3.tasks import open_task

        config = self._config
        task = open_task(config.task)
        name, reward, seed = config.model.path, config.model.warm_start_reward, config.run.seed
        if name.startswith(PREFIX) and not is_built(plan_model(name, target_reward=reward, seed=seed)[1]):
            reward = 0  # random weights route as well as trained ones, and are made in seconds
        model = resolve_model(name, target_reward=reward, seed=seed)
        one = config.model_copy(update={"rollout": config.rollout.model_copy(update={"workers": 1})})
        with RolloutPool(one, model, place=self._places.rollout) as pool:
            spec = pool.spec()
            if not spec.capture:
                raise EngineError(
                    f"{spec.engine} runs without routing capture; start it with enable_return_routed_experts"
                )
            batch = ray.get(pool.canary([task.heldout_prompt(i) for i in range(4)]).core)
            rows = batch.stored.rows
            return (
                f"{spec.engine} started, capture on: {rows} rows, the same from a cold and a warm cache; "
                f"{spec.describe_rows()}"
            )


def _own_packages() -> str:
    require_own_packages()
    return f"this package, in {Path(__file__).parent}; checksums by {IMPLEMENTATION}"


def _installed(config: Config) -> str:
    from r3.preflight import check_installed

    check_installed(config)
    return "every package that this config needs can be imported"


def _config(config: Config) -> str:
    from r3.preflight import check

    size = check(config)
    return f"{config.model.path} with {size.parameters:,} parameters"


def _attempt(name: str, attempt: Callable[[], str]) -> Check:
    """Turn what a check raises into its outcome; the messages of `R3Error` end with their own fix."""
    fix = "docs/troubleshooting.md explains the message"
    try:
        return Check(name, "ok", attempt())
    except R3Error as error:
        return Check(name, "FAIL", " ".join(str(error).split()), fix)
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever goes wrong in what it examines
        return Check(name, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}", fix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3.doctor",
        usage="python -m r3.doctor [--config FILE] [key.path=value ...] [--quick] [--json]\n"
        "       python -m r3.doctor replay --help    (is replay exact in the trainer's layout?)",
        description="Check this machine: Python, packages, GPU, disk, memory, Ray, and the engine with capture on.",
        epilog="exit codes: 0 all is well, 2 usage or config, 4 a check failed",
    )
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="check for this config, not the default"
    )
    parser.add_argument("--quick", action="store_true", help="do not start Ray and the engine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change single keys")
    return parser


if __name__ == "__main__":
    sys.exit(main())
