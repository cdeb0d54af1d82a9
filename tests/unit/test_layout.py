"""Layouts as people write them, and the small model that every one of them can be cut from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3.config import TrainerConfig
from r3.errors import ConfigError
from r3.layout import describe_layout, parse_layout
from r3.shrunk import shrunk_config, trial_advantages, trial_batch
from r3.trainer.architecture import Architecture, require_layout
from r3.types import ModelSpec
from tests.tiny_model import CONFIG


@pytest.mark.parametrize(
    ("text", "processes", "keys"),
    [
        ("dp1", 1, {}),
        ("tp2,pp2", 4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        ("tp2+ep2+etp1", 2, {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1}),
        ("ep4", 4, {"expert_parallel": 4}),
        ("tp2,ep2", 4, {"expert_tensor_parallel": None}),
        ("dp2 cp2 full distopt", 4, {"recompute": "full", "distributed_optimizer": True, "context_parallel": 2}),
        ("pp2,vpp2,padded,allgather", 2, {"virtual_pipeline": 2, "packed": False, "dispatcher": "allgather"}),
    ],
)
def test_a_layout_becomes_keys_of_the_trainer(text: str, processes: int, keys: dict[str, object]) -> None:
    found = parse_layout(TrainerConfig(lr=1e-6), text)
    assert (found.processes, found.lr) == (processes, 1e-6)
    assert {key: getattr(found, key) for key in keys} == keys


def test_what_a_layout_leaves_out_is_one_and_no_layout_is_the_config() -> None:
    trainer = TrainerConfig(processes=2, tensor_parallel=2, recompute="full")
    assert parse_layout(trainer, "pp2").tensor_parallel == 1
    assert parse_layout(trainer, "pp2").recompute == "full"
    assert parse_layout(trainer, None) is trainer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2,xp3", "'xp3' is unknown; a layout is a comma list of dpN, tpN"),
        ("tp0", "'tp0' is unknown"),
        ("tp2,etp1", "would reduce the experts' gradients over the wrong"),
        ("vpp2", "needs pipeline_parallel > 1"),
        ("dp3,ep2", "not divisible by expert_tensor_parallel x expert_parallel"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_layout(TrainerConfig(), text)


SIZES = st.sampled_from([1, 2, 4])


@given(SIZES, SIZES, SIZES, SIZES, st.booleans(), st.sampled_from(["none", "full", "selective"]))
def test_a_described_layout_reads_back(tp: int, pp: int, cp: int, ep: int, packed: bool, recompute: str) -> None:
    form = "packed" if packed else "padded"
    trainer = parse_layout(TrainerConfig(), f"tp{tp},pp{pp},cp{cp},ep{ep},{form},{recompute}")
    assert parse_layout(TrainerConfig(), describe_layout(trainer)) == trainer


@pytest.mark.parametrize("experts", [8, 128, 512])
@pytest.mark.parametrize("layouts", [["dp1"], ["tp4", "pp2,vpp3", "ep3", "tp2,ep2,etp1"]])
def test_the_small_model_can_be_cut_by_every_layout(experts: int, layouts: list[str]) -> None:
    source = CONFIG | {"num_experts": experts, "num_experts_per_tok": 8, "mlp_only_layers": [0, 40]}
    trainers = [parse_layout(TrainerConfig(), text) for text in layouts]
    small = shrunk_config(source, trainers)
    arch = Architecture.from_hf_config(small)
    for trainer in trainers:
        require_layout(arch, trainer)
    assert arch.spec.moe_layers[0] == 1, "the first layer stays dense"
    assert (arch.spec.num_experts > 256) == (experts > 256)
    assert arch.normalise_top_k == source["norm_topk_prob"]


def test_trial_trajectories_are_always_the_same() -> None:
    spec = ModelSpec.from_hf_config(CONFIG)
    blocks, again = trial_batch(spec, 3).blocks, trial_batch(spec, 3).blocks
    assert [block.layers for block in blocks] == [(0, 1, 2), (3,)]
    assert [block.crc32.tolist() for block in blocks] == [block.crc32.tolist() for block in again]
    assert len(trial_batch(spec, 3)) == len(trial_advantages())
