"""Two real SGLang servers on the CPU, one of them without capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.config import Config
from r3.errors import EngineError
from r3.rollout.engine import Sampling, open_engine
from tests.engines import reference
from tests.engines.sglang_server import RunningServer, running
from tests.engines.test_sglang import requests
from tests.real_engine import engine_config

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def servers(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    logs = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        options = (("--enable-return-routed-experts",), ())
        yield [stack.enter_context(running(model_a, logs / str(i), *given)) for i, given in enumerate(options)]


def config(servers: list[RunningServer], **sections: Any) -> Config:
    config = engine_config(engine="sglang_http", urls=[server.url for server in servers], http_retries=1)
    return Config.model_validate(config.model_dump(exclude_unset=True) | sections)


def test_a_server_without_capture_is_found_before_the_first_rollout(
    servers: list[RunningServer], model_a: Path
) -> None:
    with pytest.raises(
        EngineError, match="runs without routing capture; start it with --enable-return-routed-exp"
    ) as e:
        open_engine(config(servers), model_a, 0)
    assert e.value.exit_code == 4
    assert servers[1].url in str(e.value)
    assert servers[0].url not in str(e.value)


def test_two_servers_share_the_load(servers: list[RunningServer], model_a: Path) -> None:
    engine = open_engine(config(servers, routing={"capture": False}, replay={"mode": "none"}), model_a, 0)
    asked: list[str] = []
    for server in engine._servers:  # type: ignore[attr-defined]
        post = server.post
        server.post = lambda path, body, post=post, url=server.url: (asked.append(url), post(path, body))[1]
    prompts = requests(8, seed=1)
    answers = engine.generate(prompts, Sampling(1.0, 6, greedy=True, ignore_eos=True), capture=False)
    engine.close()

    assert sorted(asked) == sorted([servers[0].url] * 4 + [servers[1].url] * 4)
    for request, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens[answer.prompt_len :], reference.greedy(model_a, request.tokens, 6))
