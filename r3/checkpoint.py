"""The state of a run on disk: whole or not at all.

    RUN/checkpoints/step-00000020/   one file per trainer rank, and `manifest.json` with the sha256 of each
    RUN/checkpoints/LATEST           name of the newest one, written last

A checkpoint is written under a hidden name, synchronised, and renamed when complete, so a name that can be seen holds
everything; what a crash, a full disk or an editor did to it later shows in the checksums.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r3.errors import CheckpointError

log = logging.getLogger("r3")

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "LATEST"
LOCK = ".lock"
_FORMAT = 1
_NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands, apart from what the trainer ranks hold.

    `step`: completed steps; it is the position in the data and, with the seed, the state of the engine's random
    numbers. `skipped`: steps in a row, up to this one, without a finite gradient. `ranks`: trainer ranks that wrote.
    `fingerprint`: of the model (`ModelSpec`).
    """

    step: int
    weight_version: int
    skipped: int
    ranks: int
    seed: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: name inside its directory, size in bytes, hex sha256."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """Synchronise a finished file with the disk and describe it."""
        sync(file)
        return cls(file.name, file.stat().st_size, _sha256(file))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its directory and the state that its manifest holds."""

    path: Path
    state: RunState

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read and verify a checkpoint directory; raise `CheckpointError` that says what is wrong with it."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no {MANIFEST}: it is no checkpoint, or was never completed") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
        if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
            raise CheckpointError(f"{path / MANIFEST} was changed after it was written")
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}; this release reads format {_FORMAT}")
        for entry in manifest["files"]:
            _require_intact(path, FileRecord(**entry))
        return cls(path, RunState(**manifest["state"]))


class CheckpointStore:
    """The checkpoints of one run directory, of which the newest `keep` are kept."""

    def __init__(self, run: Path, keep: int) -> None:
        self._folder = run / FOLDER
        self._keep = keep

    def save(self, state: RunState, write: Callable[[Path], Sequence[FileRecord]]) -> Path:
        """Save `state` and the files that `write` puts into the directory that it is given; return their place.

        Raises `CheckpointError` when anything cannot be written; the checkpoints before are then untouched.
        """
        target = self._folder / f"step-{state.step:08d}"
        staging = self._folder / f".{target.name}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            files = write(staging)
            _write_manifest(staging, state, files)
            self._hide(target)
            staging.rename(target)
            sync(self._folder)
            replace_text(self._folder / LATEST, target.name + "\n")
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {target} cannot be written: {error}; earlier checkpoints are untouched"
            ) from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._prune()
        return target

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None; every incomplete one on the way is warned of."""
        for path in self._visible():
            try:
                return Checkpoint.open(path)
            except CheckpointError as error:
                log.warning("skipping an incomplete checkpoint: %s", error)
        return None

    def leave_behind(self, step: int) -> list[Path]:
        """Rename checkpoints after `step` out of sight, for a run that goes back to it; return where they are now."""
        return [self._hide(path) for path in self._visible() if _step(path) > step]

    def _visible(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.match(path.name)]
        return sorted(found, key=_step, reverse=True)

    def _hide(self, path: Path) -> Path:
        """Rename a directory, if it is there, so that it is no candidate any more."""
        hidden = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
        return hidden

    def _prune(self) -> None:
        for path in self._visible()[self._keep :]:
            # Out of sight first: a deletion that is interrupted leaves no half checkpoint.
            shutil.rmtree(self._hide(path), ignore_errors=True)
        for leftover in self._folder.glob(".step-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)


def run_of(path: Path) -> Path:
    """Return the run directory of a path that is one, or one of its checkpoints."""
    path = path.absolute()
    return path.parent.parent if path.parent.name == FOLDER else path


def find(path: Path) -> Checkpoint:
    """Return the checkpoint that a path means: itself, or the newest complete one of a run directory.

    Raises `CheckpointError` when that is not there or not complete.
    """
    if not path.is_dir():
        raise CheckpointError(f"--resume {path}: no such directory; name a run directory or one of its checkpoints")
    if run_of(path) != path.absolute():
        return Checkpoint.open(path.absolute())
    found = CheckpointStore(path.absolute(), keep=1).newest()
    if found is None:
        raise CheckpointError(f"{path} holds no complete checkpoint; start again with --overwrite")
    return found


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run directory for this process alone; raise `CheckpointError` that names the holder if it is taken.

    The lock goes with its process, however that ends.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise CheckpointError(f"run.dir={run} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CheckpointError(f"run.dir={run} is in use by {holder}; stop it or choose another run.dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def replace_text(file: Path, text: str) -> None:
    """Write a small file whole: under another name, synchronised, renamed."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    sync(part)
    os.replace(part, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(directory: Path, state: RunState, files: Sequence[FileRecord]) -> None:
    manifest = {"format": _FORMAT, "state": asdict(state), "files": [asdict(file) for file in files]}
    replace_text(directory / MANIFEST, json.dumps(manifest | {"digest": _digest(manifest)}, indent=1) + "\n")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _require_intact(directory: Path, record: FileRecord) -> None:
    file = directory / record.name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    size = file.stat().st_size
    if size != record.size:
        raise CheckpointError(f"{file} has {size} bytes, {record.size} were written")
    if _sha256(file) != record.sha256:
        raise CheckpointError(f"{file} was changed after it was written (sha256 differs)")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _step(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match
    return int(match[1])
