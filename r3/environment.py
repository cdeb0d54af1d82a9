"""What a run is made with: versions, commit and machines, for the event `environment` in `events.jsonl`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from r3 import __version__

# Distributions whose versions decide what a run does.
PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "ray", "wandb", "numpy")
_GPU_KIND = "accelerator_type:"


def environment(nodes: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return, as JSON, versions, commit and the live ones of the cluster's `nodes`, as `ray.nodes()` lists them.

    `nodes`: of each kind of node how many there are (`count`), and the CPUs and GPUs of one, as Ray counts them;
    `gpu_kind` is what Ray calls its GPUs, None where it cannot see what they are.
    """
    kinds = Counter(_kind(node["Resources"]) for node in nodes if node["Alive"])
    return {
        "versions": versions(),
        "commit": commit(),
        "driver": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "nodes": [
            {"count": count, "cpus": cpus, "gpus": gpus, "gpu_kind": kind}
            for (cpus, gpus, kind), count in kinds.most_common()
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "r3": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit that this code is of: `R3_COMMIT`, else that of the checkout it lies in; None without either.

    A checkout with changes that are not committed is named `COMMIT, changed`.
    """
    if os.environ.get("R3_COMMIT"):
        return os.environ["R3_COMMIT"]
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    return f"{head}, changed" if head and _git(root, "status", "--porcelain", "--untracked-files=no") else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system that hangs
        return None
    return done.stdout.strip() or None


def _kind(resources: Mapping[str, float]) -> tuple[float, float, str | None]:
    names = [key.removeprefix(_GPU_KIND) for key in resources if key.startswith(_GPU_KIND)]
    return resources.get("CPU", 0), resources.get("GPU", 0), names[0] if names else None
