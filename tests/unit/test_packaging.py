"""One import name, `r3`, however the code reaches a process: wheel, editable install, source tree, Ray upload."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED_TOP_LEVEL = ("rollout", "trainer", "configs", "tests", "scripts")
IMPORT_ALL = "import r3, r3.rollout, r3.trainer; "
NONE_AT_TOP_LEVEL = (
    f"import importlib.util as u; found = [n for n in {SHARED_TOP_LEVEL} if u.find_spec(n)]; assert not found, found; "
)


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Runs a command without the caller's Python settings and returns its stdout; a failure shows all output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "RAY_"))}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(target: str, source: Path, out: Path) -> Path:
    run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out], cwd=source)
    (built,) = out.iterdir()
    return built


def new_environment(folder: Path) -> tuple[Path, Path]:
    """Returns the interpreter and the site-packages of an environment with nothing in it."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
    (site,) = folder.glob("lib/python3*/site-packages")
    return folder / "bin" / "python", site


def install(wheel: Path, site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    run(pip, cwd=site, PIP_DISABLE_PIP_VERSION_CHECK="1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", REPO, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    python, site = new_environment(tmp_path_factory.mktemp("installed") / "venv")
    install(wheel, site)
    return python, site


def sources(package: str) -> set[str]:
    """Returns what the wheel must hold of one folder of the repository, as paths inside the wheel."""
    prefix = "r3" if package == "r3" else f"r3/{package}"
    files = (path for suffix in ("*.py", "*.yaml") for path in (REPO / package).rglob(suffix))
    return {f"{prefix}/{path.relative_to(REPO / package)}" for path in files}


def test_wheel_holds_every_source_under_r3_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"r3"}
    for package in ("r3", "rollout", "trainer", "configs"):
        expected = sources(package)
        assert expected, f"{package}/ has no source"
        assert expected <= names, f"missing of {package}/: {sorted(expected - names)}"
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_from_sdist_equals_wheel_from_tree(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", REPO, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # Python 3.11 has the filter from 3.11.4 on.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "source", **safe)
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_installed_wheel_imports_and_brings_no_other_name(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = installed
    run([python, "-c", IMPORT_ALL + NONE_AT_TOP_LEVEL + f"assert r3.__file__.startswith({str(site)!r})"], cwd=tmp_path)
    shipped = {path.name for path in (site / "r3" / "configs").glob("*.yaml")}
    assert shipped == {path.name for path in (REPO / "configs").glob("*.yaml")}
    assert shipped


def test_wheel_announces_the_sglang_platform(installed: tuple[Path, Path]) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed[1])])
    assert distribution.name == "rollout-router-replay"
    (entry,) = distribution.entry_points.select(group="sglang.srt.platforms")
    assert entry.value == "r3.rollout.sglang_cpu.platform:activate"
    assert (REPO / "rollout" / "sglang_cpu" / "platform.py").is_file()


def test_own_trainer_module_in_current_directory_is_not_picked_up(installed: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("trainer", "rollout", "configs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user was imported by r3')\n")
    run([installed[0], "-c", IMPORT_ALL], cwd=tmp_path)


def test_editable_install_maps_r3_alone(tmp_path: Path) -> None:
    editables = pytest.importorskip("editables")
    python, site = new_environment(tmp_path / "venv")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable", "-d", tmp_path / "out"], cwd=REPO)
    (wheel,) = (tmp_path / "out").iterdir()
    install(wheel, site)
    shutil.copytree(Path(editables.__file__).parent, site / "editables")
    same = f"assert r3.trainer.__file__ == {str(REPO / 'r3' / 'trainer' / '__init__.py')!r}, r3.trainer.__file__"
    run([python, "-c", IMPORT_ALL + NONE_AT_TOP_LEVEL + same], cwd=tmp_path)


def test_source_tree_runs_without_installation() -> None:
    assert "--config" in run([sys.executable, "-m", "r3.train", "--help"], cwd=REPO)


RAY_JOB = """
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         runtime_env={"working_dir": WORKING_DIR})

@ray.remote
def look():
    import r3, r3.rollout, r3.trainer
    from pathlib import Path
    folder = Path(r3.__file__).parent
    return str(folder), r3.trainer.__file__, sorted(path.name for path in (folder / "configs").glob("*.yaml"))

print(*ray.get(look.remote()), sep="\\n")
ray.shutdown()
"""


@pytest.mark.ray
def test_ray_worker_imports_the_uploaded_working_dir(tmp_path: Path) -> None:
    upload, elsewhere = tmp_path / "upload", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("r3", "rollout", "trainer", "configs"):
        shutil.copytree(REPO / name, upload / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    script = f"WORKING_DIR = {str(upload)!r}\n{RAY_JOB}"
    folder, trainer, configs = run([sys.executable, "-c", script], cwd=elsewhere).strip().splitlines()[-3:]
    assert "working_dir_files" in folder, "the worker imported another r3 than the one that was uploaded"
    assert trainer == f"{folder}/trainer/__init__.py"
    assert configs == str(sorted(path.name for path in (REPO / "configs").glob("*.yaml")))
