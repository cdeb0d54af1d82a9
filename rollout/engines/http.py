"""JSON over HTTP with bounded retries, and requests spread over several servers; nothing here knows an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar

import httpx
import pydantic_core
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from r3.errors import ConfigError, EngineError

_MAX_THREADS = 256
_MAX_ANSWER_TEXT = 500
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Refused(EngineError):
    """A server answered with a status below 500 that is no success: asking again changes nothing."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Unavailable(Exception):
    """A connection that broke, or a status of 500 and above: worth another attempt."""


class Server:
    """One server. Connections are kept and shared by all threads."""

    def __init__(self, url: str, timeout_s: float, retries: int) -> None:
        """Connect to nothing yet; `retries` is the number of repeats after the first attempt."""
        self.url = url
        self._retries = retries
        self._wait = wait_random_exponential(multiplier=0.2, max=5)  # seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_MAX_THREADS)
        # No proxy from the environment: these are servers of the cluster.
        self._client = httpx.Client(base_url=url, timeout=timeout_s, limits=limits, trust_env=False)

    def get(self, path: str) -> Any:
        """Return the JSON of a GET; see `post`."""
        return self._json(path, self._send("GET", path, None))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST.

        Raises `Refused` with the server's words for a status below 500, and `EngineError` once `retries` repeats have
        met broken connections or statuses of 500 and above. An answer that takes too long is not asked for again.
        """
        return self._json(path, self._send("POST", path, body))

    def order(self, path: str, method: Literal["GET", "POST"] = "POST") -> None:
        """Send a request whose answer is only its status; see `post`."""
        self._send(method, path, {} if method == "POST" else None)

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        attempts = Retrying(
            retry=retry_if_exception_type(_Unavailable),
            stop=stop_after_attempt(self._retries + 1),
            wait=self._wait,
            reraise=True,
        )
        try:
            return attempts(self._attempt, method, path, body)
        except _Unavailable as error:
            raise EngineError(
                f"{self.url}{path} failed {self._retries + 1} times (rollout.http_retries): {error}; is the server "
                "running?"
            ) from error

    def _attempt(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.ConnectTimeout as error:
            raise _Unavailable("connecting took too long") from error
        except httpx.TimeoutException as error:
            raise EngineError(f"{self.url}{path} did not answer in time (rollout.http_timeout_s)") from error
        except httpx.TransportError as error:
            raise _Unavailable(f"{type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            raise _Unavailable(f"status {response.status_code}: {_words(response)}")
        if response.status_code != 200:
            message = f"{self.url}{path} answered with status {response.status_code}: {_words(response)}"
            raise Refused(message, response.status_code)
        return response

    def _json(self, path: str, response: httpx.Response) -> Any:
        try:
            return pydantic_core.from_json(response.content)
        except ValueError as error:
            raise EngineError(f"{self.url}{path} answered with something other than JSON: {error}") from error


def open_servers(urls: Sequence[str], workers: int, index: int, timeout_s: float, retries: int) -> tuple[Server, ...]:
    """Return the servers of worker `index`: every `workers`-th of `urls`; raise `ConfigError` when it gets none."""
    own = urls[index::workers]
    if not own:
        raise ConfigError(f"rollout.urls has {len(urls)} servers for {workers} workers; name one per worker at least")
    return tuple(Server(url, timeout_s, retries) for url in own)


def fan_out(
    servers: Sequence[Server], items: Sequence[Item], at_once: int, ask: Callable[[Server, int, Item], Answer]
) -> list[Answer]:
    """Return `ask(server, number, item)` of every item, in order, with `at_once` per server under way.

    Every server gets a contiguous share, so that equal prompts, which stand together, meet one prefix cache. The first
    error is raised, and what has not begun by then never begins.
    """
    if not items:
        return []
    shares = [number * len(servers) // len(items) for number in range(len(items))]
    # A pool for each, or the first server's share would fill the only one while the others wait.
    threads = max(1, min(len(items), at_once, _MAX_THREADS))
    pools = [ThreadPoolExecutor(threads, thread_name_prefix=f"r3-{server.url}") for server in servers]
    errors: list[BaseException] = []

    def unless_failed(server: Server, number: int, item: Item) -> Answer:
        if errors:
            raise CancelledError
        try:
            return ask(server, number, item)
        except BaseException as error:
            errors.append(error)
            raise

    try:
        futures = [
            pools[share].submit(unless_failed, servers[share], number, item)
            for number, (share, item) in enumerate(zip(shares, items, strict=True))
        ]
        wait(futures, return_when=FIRST_EXCEPTION)
        if errors:
            raise errors[0]
        return [future.result() for future in futures]
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)


def field_of(answer: Any, key: str, where: str) -> Any:
    """Return `answer[key]`; raise `EngineError` that names what came instead."""
    if not isinstance(answer, dict) or key not in answer:
        found = sorted(answer) if isinstance(answer, dict) else type(answer).__name__
        raise EngineError(f"{where} answered without {key!r}: {found}")
    return answer[key]


def _words(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:_MAX_ANSWER_TEXT] or "no text"
