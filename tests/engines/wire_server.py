"""An HTTP server in a thread that answers from a table of functions; there is no model behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from r3.types import ModelSpec

Body = dict[str, Any]
Reply = tuple[int, Any]


class WireServer:
    """`answer(method, path, body)` returns status and JSON; `seen` collects every request."""

    def __init__(self, answer: Callable[[str, str, Body], Reply]) -> None:
        self.seen: list[tuple[str, str, Body]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._reply("GET")

            def do_POST(self) -> None:
                self._reply("POST")

            def _reply(self, method: str) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                with lock:
                    outer.seen.append((method, self.path, body))
                status, content = answer(method, self.path, body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                with suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def bodies(self, path: str) -> list[Body]:
        """Bodies of the requests to a path, in order of arrival."""
        return [body for _, where, body in self.seen if where == path]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(answer: Callable[[str, str, Body], Reply]) -> Iterator[WireServer]:
    server = WireServer(answer)
    try:
        yield server
    finally:
        server.close()


def made_up_experts(tokens: np.ndarray, layers: tuple[int, ...] | range, model: ModelSpec) -> np.ndarray:
    """Rows `[S-1, layers, k]` int64: distinct experts that are a function of token, position and layer."""
    first = tokens[:-1].astype(np.int64)[:, None] * 7 + np.arange(len(tokens) - 1)[:, None] + np.array(layers) * 3
    return (first[:, :, None] + np.arange(model.top_k)) % model.num_experts
