"""The doctor names what is wrong with a machine, with a fix, and says so in its exit code."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections import namedtuple
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from r3 import doctor
from r3.config import Config, load_config
from tests.command import ROOT, refused, run_module

QUICK = ("r3.doctor", "--quick")


def usage(free: int):
    return lambda path: namedtuple("usage", "total used free")(free, 0, free)


def test_quick_checks_pass_in_the_environment_of_the_tests() -> None:
    result = run_module(*QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert all(re.match(r"(ok|warn|skip) +\S", line) for line in lines[:-1]), result.stdout
    assert lines[-1] == "all is well"
    for name in ("python", "ray", "sglang", "megatron-core", "gpu", "disk", "shared memory"):
        assert any(line[6:].startswith(name) for line in lines), name


def test_json_holds_every_check_and_a_failure_has_a_fix_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['megatron'] = None\n")
    result = run_module(*QUICK, "--json", "model=/no/such", path=(tmp_path, ROOT))
    assert result.returncode == 4
    found = json.loads(result.stdout)
    assert found["ok"] is False
    failed = {check["name"]: check for check in found["checks"] if check["state"] == "FAIL"}
    assert set(failed) == {"installation", "config"}
    assert "megatron.core" in failed["installation"]["detail"]
    assert "/no/such" in failed["config"]["detail"]
    assert all(check["fix"] for check in failed.values())
    assert [c["name"] for c in found["checks"] if c["state"] == "skip"] == ["ray", "engine"]


def test_a_wrong_config_is_a_usage_error() -> None:
    refused(run_module(*QUICK, "trainer.lrr=1"), 2, "did you mean trainer.lr?")


def test_foreign_packages_end_the_examination(tmp_path: Path) -> None:
    package = shutil.copytree(ROOT / "r3", tmp_path / "r3", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "trainer" / "__init__.py").write_text("")
    result = run_module(*QUICK, cwd=tmp_path, path=(tmp_path,))
    assert result.returncode == 4
    assert "trainer/__init__.py belongs to a foreign package" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 of 2 checks failed: r3"


@pytest.mark.parametrize(("version", "state"), [((3, 10), "FAIL"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "FAIL")])
def test_pythons_outside_the_range_fail(version: tuple[int, int], state: str) -> None:
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(
    ("name", "installed", "state", "fix"),
    [
        ("sglang", "0.5.23", "ok", ""),
        ("sglang", "0.5.16", "FAIL", "pip install 'sglang<0.5.24,>=0.5.17'"),
        ("megatron-core", "0.20.0", "FAIL", "megatron-core<0.20"),
        ("ray", None, "FAIL", "pip install 'rollout-router-replay'"),
        ("sglang", None, "FAIL", "pip install 'rollout-router-replay[sglang]'"),
        ("wandb", None, "warn", "pip install 'rollout-router-replay[wandb]'"),
    ],
)
def test_packages_are_compared_with_the_metadata(monkeypatch, name, installed, state, fix) -> None:
    from importlib import metadata

    def version(wanted: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(wanted)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    found = doctor.check_package(name)
    assert (found.state, fix in found.fix) == (state, True), found


def test_untested_versions_inside_the_range_say_what_is_tested(monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.20")
    assert doctor.check_package("sglang").detail == "0.5.20 (tested: 0.5.23)"


def test_a_full_or_read_only_disk_fails(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(2**30))
    assert {check.state for check in doctor.check_disk()} == {"FAIL"}
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40))
    assert {check.state for check in doctor.check_disk()} == {"ok"}
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = list(doctor.check_disk())
    assert {check.state for check in found} == {"FAIL"}
    assert any("R3_CACHE" in check.fix for check in found)


def test_small_shared_memory_warns_and_names_the_need(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(2**20))
    found = doctor.check_shared_memory(Config())
    assert (found.state, "--shm-size" in found.fix) == ("warn", True)
    assert doctor.check_shared_memory(Config(), tmp_path / "none").state == "warn"
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40))
    assert doctor.check_shared_memory(Config()).state == "ok"


def test_a_config_that_asks_for_gpus_fails_without_any(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_GPU_PROBE", """print('{"torch": "2.13.0+cpu", "gpus": []}')""")
    assert doctor.check_gpu(Config()).state == "ok"
    found = doctor.check_gpu(load_config(None, ["rollout.gpus_per_worker=1"]))
    assert (found.state, "CUDA build of torch" in found.fix) == ("FAIL", True)


def test_a_torch_that_takes_the_interpreter_down_is_reported(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_GPU_PROBE", "import os; os.abort()")
    assert doctor.check_gpu(Config()).state == "FAIL"
    monkeypatch.setattr(doctor, "_GPU_PROBE", "raise ImportError('libcudart.so.13: no such file')")
    assert "libcudart.so.13" in doctor.check_gpu(Config()).detail


def test_a_package_has_one_range_in_every_extra() -> None:
    """The doctor names the range of a package, so there must be one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted: dict[str, set[str]] = {}
    extras = project["optional-dependencies"].values()
    for line in chain(project["dependencies"], *extras):
        requirement = Requirement(line)
        wanted.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: ranges for name, ranges in wanted.items() if len(ranges) > 1} == {}
