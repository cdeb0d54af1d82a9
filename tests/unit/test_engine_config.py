"""Keys of engines that are running servers: what cannot work is refused, with the reason, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from r3.config import load_config
from r3.errors import ConfigError
from r3.preflight import check, needs
from tests.tiny_model import write_files
from tests.tiny_weights import write_weights

ONE = "rollout.urls=[http://127.0.0.1:30000]"
HTTP = ["rollout.engine=sglang_http", ONE]

REFUSED = {
    "no urls": (["rollout.engine=sglang_http"], "rollout.engine=sglang_http needs rollout.urls"),
    "no urls, vllm": (["rollout.engine=vllm_http"], "rollout.engine=vllm_http needs rollout.urls"),
    "urls of an engine in process": ([ONE], "rollout.engine=sglang starts its own engines; use sglang_http"),
    "no url": (["rollout.engine=sglang_http", "rollout.urls=[localhost]"], "not of the form 'http://host:port'"),
    "one twice": (
        ["rollout.engine=sglang_http", "rollout.urls=[http://127.0.0.1:1/, http://127.0.0.1:1]"],
        "names a server twice",
    ),
    "workers without a server": ([*HTTP, "rollout.workers=2"], "rollout.workers=2 exceeds the 1 rollout.urls"),
    "a GPU of its own": ([*HTTP, "rollout.gpus_per_worker=1"], "the servers of rollout.engine=sglang_http hold the"),
    "engine arguments": ([*HTTP, "rollout.engine_args={pp_size: 2}"], "put them on its command line"),
    "another host without a shared directory": (
        ["rollout.engine=sglang_http", "rollout.urls=[http://node7:30000]"],
        "weights.exchange_dir must name a directory",
    ),
    "no time": ([*HTTP, "rollout.http_timeout_s=0"], "greater than 0"),
    "negative retries": ([*HTTP, "rollout.http_retries=-1"], "greater than or equal to 0"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_servers_here_and_elsewhere() -> None:
    assert load_config(None, HTTP).rollout.urls == ("http://127.0.0.1:30000",)
    elsewhere = ["rollout.engine=sglang_http", "rollout.urls=[http://node7:30000/, http://node8:30000]"]
    config = load_config(None, [*elsewhere, "weights.exchange_dir=/shared", "rollout.workers=2"])
    assert config.rollout.urls == ("http://node7:30000", "http://node8:30000")
    own = load_config(None, ["rollout.engine=my.module:Engine", ONE])
    assert own.rollout.urls == ("http://127.0.0.1:30000",)


def test_a_config_with_urls_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load_config(None, [*HTTP, "weights.exchange_dir=/shared"])
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model={write_weights(write_files(tmp_path / 'model'))}"


@pytest.mark.parametrize("engine", ["lightllm_http", "vllm_http"])
def test_training_with_a_generation_only_engine_is_refused(model: str, engine: str) -> None:
    config = load_config(None, [model, f"rollout.engine={engine}", ONE])
    with pytest.raises(ConfigError, match=f"rollout.engine={engine} is generation only: .* train with sglang"):
        check(config)
    check(config, trains=False)


def test_training_over_http_passes_and_needs_its_own_packages(model: str) -> None:
    config = load_config(None, [model, *HTTP])
    check(config)
    assert {need.package for need in needs(config) if need.extra == "http"} == {"httpx", "tenacity"}
    assert "sglang" not in {need.package for need in needs(config)}


def test_an_unknown_engine_is_named_with_those_that_exist(model: str) -> None:
    with pytest.raises(ConfigError, match=r"'sglang_htpp' is unknown; use 'sglang', 'sglang_http', 'lightllm_http'"):
        check(load_config(None, [model, "rollout.engine=sglang_htpp"]))
