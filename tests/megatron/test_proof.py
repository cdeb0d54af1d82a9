"""`python -m r3.doctor replay` as people run it, on a cluster of its own; and that it can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r3.metrics import RouterCounts
from r3.proof import LIMITS, compare
from r3.trainer.outcome import Rehearsal
from tests.command import ROOT, refused, run_module
from tests.tiny_model import write_files

pytestmark = [pytest.mark.megatron, pytest.mark.ray]
LEFT_OUT = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "r3.trainer.replay":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.ReplayContext._enter_backward = lambda *_: None
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Only its `config.json` is read."""
    return write_files(tmp_path / "model")


def rehearsal() -> Rehearsal:
    counts = replace(RouterCounts.zero(2, 8), required=9, replayed=9, compared=9)
    tensors = {"a": np.ones(4000, np.float32), "b": np.full(3, 2, np.float32)}
    return Rehearsal(1.0, np.zeros(5), np.zeros((5, 2), np.bool_), 3.0, tensors, tensors, counts, False, 0.0)


def failed(found: Rehearsal, copies: float = 1) -> list[str]:
    return [check.name for check in compare(found, rehearsal(), LIMITS["float32"], copies) if check.state == "FAIL"]


def test_every_difference_fails_its_own_check() -> None:
    same = rehearsal()
    assert failed(same) == []
    assert failed(same, copies=2) == ["memory"]
    for fault in ({"replayed": 8}, {"mismatched_ids": 1}, {"missing": 1}, {"required": 10, "replayed": 10}):
        assert failed(replace(same, counts=replace(same.counts, **fault))) == ["ids replayed"]
    assert failed(replace(same, counts=replace(same.counts, disagree_any=1))) == ["own choice"]
    assert failed(replace(same, loss=1.0 + 1e-5)) == ["loss"]
    assert failed(replace(same, logprobs=np.full(5, 1e-4))) == ["log-probs"]
    assert failed(replace(same, grad_norm=3.1)) == ["gradient norm"]
    changed = same.gradients | {"b": np.array([2, 2, 2.001], np.float32)}
    assert failed(replace(same, gradients=changed)) == ["gradients"]
    assert failed(replace(same, gradients={}, sharded=True)) == []
    assert failed(replace(same, weights=same.weights | {"a": same.weights["a"] + 1e-3})) == ["weights"]


def test_replay_is_proven_in_two_layouts(model: Path) -> None:
    result = run_module(
        "r3.doctor", "replay", "--json", "--layout", "tp2,ep2,etp1", "--layout", "pp2,full", f"model={model}"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert [proof["layout"] for proof in found["layouts"]] == ["tp2,ep2,etp1,packed", "pp2,full,packed"]
    for proof in found["layouts"]:
        names = [check["name"] for check in proof["checks"]]
        assert names == [
            "ids replayed",
            "own choice",
            "loss",
            "log-probs",
            "gradients",
            "gradient norm",
            "weights",
            "memory",
            "state",
        ]


@pytest.mark.slow
def test_a_recompute_without_the_record_is_found(tmp_path: Path, model: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEFT_OUT)
    result = run_module("r3.doctor", "replay", "--layout", "dp1,full", f"model={model}", path=(ROOT, tmp_path))
    assert result.returncode == 3, result.stdout + result.stderr
    assert "FAIL  gradients" in result.stdout
    assert "ok    loss" in result.stdout, "the loss does not notice"
    assert "replay is NOT exact in: dp1,full,packed" in result.stdout


def test_what_cannot_be_proven_is_refused(tmp_path: Path, model: Path) -> None:
    refused(run_module("r3.doctor", "replay", "--layout", "tp2,xp3"), 2, "'xp3' is unknown")
    refused(run_module("r3.doctor", "replay", "model=/no/such/model"), 2, "/no/such/model")
    refused(
        run_module("r3.doctor", "replay", "--scratch", tmp_path / "nowhere", f"model={model}"), 2, "is no directory"
    )
