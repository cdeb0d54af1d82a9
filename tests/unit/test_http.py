"""Requests over HTTP: what is asked again, what is not, and who is asked."""

from __future__ import annotations

import threading

import pytest

from r3.errors import ConfigError, EngineError
from r3.rollout.engines.http import Refused, Server, fan_out, field_of, open_servers
from tests.engines.wire_server import Body, Reply, serving


def test_json_goes_out_and_comes_back() -> None:
    with serving(lambda method, path, body: (200, [method, path, body])) as wire:
        server = Server(wire.url, 5, 0)
        assert server.post("/a", {"b": [1, 2]}) == ["POST", "/a", {"b": [1, 2]}]
        assert server.get("/c?d=1") == ["GET", "/c?d=1", {}]
        server.close()


def test_only_statuses_from_500_on_are_asked_again() -> None:
    replies = [(500, b""), (502, b""), (200, [])]
    with serving(lambda method, path, body: replies.pop(0)) as wire:
        server = Server(wire.url, 5, 2)
        assert server.get("/") == []
        replies.append((404, b"no  such\n thing"))
        with pytest.raises(Refused, match="status 404: no such thing") as caught:
            server.get("/")
        assert caught.value.status == 404
        assert len(wire.seen) == 4
        server.close()


def test_an_answer_that_takes_too_long_is_not_asked_for_again() -> None:
    arrived, release = threading.Event(), threading.Event()

    def late(method: str, path: str, body: Body) -> Reply:
        arrived.set()
        release.wait(30)
        return 200, []

    with serving(late) as wire:
        server = Server(wire.url, 0.2, 5)
        with pytest.raises(EngineError, match=r"did not answer in time \(rollout\.http_timeout_s\)"):
            server.get("/slow")
        assert arrived.wait(30)
        release.set()
        assert len(wire.seen) == 1
        server.close()


def test_an_answer_that_is_no_json_is_named() -> None:
    with serving(lambda method, path, body: (200, b"<html>")) as wire:
        server = Server(wire.url, 5, 0)
        with pytest.raises(EngineError, match="/x answered with something other than JSON"):
            server.get("/x")
        server.close()


def servers(count: int) -> tuple[Server, ...]:
    return tuple(Server(f"http://127.0.0.1:{number + 1}", 1, 0) for number in range(count))


@pytest.mark.parametrize("items", [0, 1, 5, 7])
def test_servers_take_contiguous_shares_and_answers_keep_their_order(items: int) -> None:
    found = fan_out(servers(3), range(items), 2, lambda server, number, item: (server.url, number, item))
    assert [(number, item) for _, number, item in found] == [(n, n) for n in range(items)]
    urls = [url for url, _, _ in found]
    assert urls == sorted(urls)
    counts = [urls.count(url) for url in set(urls)]
    assert max(counts, default=0) - min(counts, default=0) <= 1


def test_every_server_is_busy_from_the_beginning() -> None:
    both = threading.Barrier(2, timeout=30)

    def ask(server: Server, number: int, item: int) -> None:
        if item in (0, 50):  # the first of each share: neither ends before the other has begun
            both.wait()

    fan_out(servers(2), range(100), 1, ask)


def test_the_first_error_is_raised_and_what_waits_never_begins() -> None:
    begun: list[int] = []

    def ask(server: Server, number: int, item: int) -> None:
        begun.append(item)
        raise EngineError(f"item {item}")

    with pytest.raises(EngineError, match="item 0"):
        fan_out(servers(1), range(1000), 1, ask)
    assert begun == [0]


def test_workers_share_the_servers_out() -> None:
    urls = [f"http://127.0.0.1:{number}" for number in range(1, 6)]
    shares = [[server.url[-1] for server in open_servers(urls, 2, index, 1, 0)] for index in range(2)]
    assert shares == [["1", "3", "5"], ["2", "4"]]
    with pytest.raises(ConfigError, match="5 servers for 6 workers"):
        open_servers(urls, 6, 5, 1, 0)


def test_a_missing_field_is_named_with_those_that_came() -> None:
    with pytest.raises(EngineError, match=r"here answered without 'a': \['b'\]"):
        field_of({"b": 1}, "a", "here")
    with pytest.raises(EngineError, match="here answered without 'a': list"):
        field_of([], "a", "here")
