"""A real SGLang server on the CPU platform, as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests import plugin_entry

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 400.0


class RunningServer:
    """The server's address, and its process group."""

    def __init__(self, model: Path, log: Path, options: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "r3.rollout.sglang_cpu.server", f"--model-path={model}", f"--port={port}"]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", ""), plugin_entry.folder()]))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [*command, "--dtype=float32", "--log-level=warning", "--random-seed=0", *options],
            env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Return once the server answers; raise with the end of its log when it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End the server and its children at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


@contextmanager
def running(model: Path, log: Path, *options: str) -> Iterator[RunningServer]:
    """Start a server, wait until it answers, and end it with the block."""
    server = RunningServer(model, log, options)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
