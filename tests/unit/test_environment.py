"""What a run says it was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from r3 import __version__, environment

GPU_NODE = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "memory": 1e9}}
CPU_NODE = {"Alive": True, "Resources": {"CPU": 4.0, "node:10.0.0.1": 1.0}}


def made(*nodes: dict[str, Any]) -> dict[str, Any]:
    """What the event holds once it was written and read."""
    found: dict[str, Any] = json.loads(json.dumps(environment.environment(nodes)))
    return found


def test_nodes_of_a_kind_are_counted_and_dead_ones_are_not() -> None:
    found = made(CPU_NODE, GPU_NODE, GPU_NODE, CPU_NODE | {"Alive": False})
    assert found["nodes"] == [
        {"count": 2, "cpus": 16, "gpus": 2, "gpu_kind": "H200"},
        {"count": 1, "cpus": 4, "gpus": 0, "gpu_kind": None},
    ]


def test_gpus_that_ray_does_not_know_by_name_are_counted() -> None:
    found = made({"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0}})
    assert found["nodes"] == [{"count": 1, "cpus": 1, "gpus": 1, "gpu_kind": None}]


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "a-package-that-nobody-has"))
    assert environment.versions() == {
        "python": platform.python_version(),
        "r3": __version__,
        "numpy": version("numpy"),
    }


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=r3", "-c", "user.email=r3@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_says_that_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("R3_COMMIT", raising=False)
    source = tmp_path / "r3" / "environment.py"
    source.parent.mkdir()
    source.write_text("one")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None, "an installed package is part of no checkout"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Begin")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "untracked").write_text("a run")
    assert environment.commit() == head
    source.write_text("other")
    assert environment.commit() == f"{head}, changed"
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None, "no git to ask"
    monkeypatch.setenv("R3_COMMIT", "abc1234")
    assert environment.commit() == "abc1234"
