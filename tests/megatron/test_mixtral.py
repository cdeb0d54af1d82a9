"""Mixtral: the same logits as Hugging Face, the same bytes back, and exact replay in every kind of layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from r3.errors import CheckpointError, ConfigError
from r3.trainer import parallel
from r3.trainer.convert import export_weights
from r3.trainer.model import Architecture
from r3.trainer.weights import save_checkpoint
from r3.types import Batch, ModelSpec
from tests.gloo_pool import GlooPool, arranged
from tests.megatron.layouts import Outcome, layout_config, run_layout
from tests.megatron.test_convert import hf_logits, load, logits, some_tokens
from tests.megatron.test_layouts import assert_equal
from tests.megatron.toys import make_batch, make_config, write_mixtral

pytestmark = pytest.mark.megatron
alone = pytest.mark.usefixtures("single_rank")
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "one query head a group, top-3": {"num_key_value_heads": 4, "num_experts_per_tok": 3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "ep2": {"expert_parallel": 2},
    "tp2+ep2": {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    "pp2": {"pipeline_parallel": 2},
}


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("models") / "mixtral")


@alone
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_hf_and_export_is_bit_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = write_mixtral(tmp_path / "model", **changes)
    model, arch = load(directory)
    expected = hf_logits(directory, some_tokens())
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits(model, some_tokens()), expected, atol=1e-5, rtol=0)
    stored, exported = load_file(directory / "model.safetensors"), dict(export_weights(model, arch))
    assert stored.keys() == exported.keys()
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in exported
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


@alone
def test_a_saved_checkpoint_loads_in_transformers(mixtral_dir: Path, tmp_path: Path) -> None:
    model, arch = load(mixtral_dir)
    save_checkpoint(export_weights(model, arch), mixtral_dir, tmp_path / "hf", torch.float32)
    torch.testing.assert_close(
        hf_logits(tmp_path / "hf", some_tokens()), hf_logits(mixtral_dir, some_tokens()), atol=0, rtol=0
    )


@alone
def test_names_that_transformers_holds_in_memory_are_read(mixtral_dir: Path, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    MixtralForCausalLM.from_pretrained(mixtral_dir).save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / "model.safetensors")
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 64)
    stored, exported = load_file(mixtral_dir / "model.safetensors"), dict(export_weights(*load(tmp_path)))
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


@alone
def test_a_missing_tensor_is_named_as_the_checkpoint_names_it(mixtral_dir: Path, tmp_path: Path) -> None:
    stored = load_file(mixtral_dir / "model.safetensors")
    del stored["model.layers.2.block_sparse_moe.experts.5.w3.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((mixtral_dir / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.block_sparse_moe\.experts\.5\.w3\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("sliding_window", 4096), ("router_jitter_noise", 0.1), ("hidden_act", "gelu")]
)
def test_features_that_would_compute_something_else_are_refused(
    mixtral_dir: Path, tmp_path: Path, key: str, value: object
) -> None:
    config = json.loads((mixtral_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError, match=f"{key}.*not supported"):
        Architecture.from_directory(tmp_path)


def test_the_spec_of_a_mixtral(mixtral_dir: Path) -> None:
    config = json.loads((mixtral_dir / "config.json").read_text())
    expected = ModelSpec("mixtral", 4, (0, 1, 2, 3), 8, 2, 64, 320)
    assert ModelSpec.from_hf_config(config) == expected
    # Keys of other families mean nothing here.
    assert ModelSpec.from_hf_config(config | {"mlp_only_layers": [0], "decoder_sparse_step": 2}) == expected
    arch = Architecture.from_hf_config({k: v for k, v in config.items() if k != "rope_parameters"})
    assert (arch.rope_theta, arch.head_dim, arch.expert_ffn_size) == (1e6, 16, 32)
    assert (arch.normalise_top_k, arch.qk_norm) == (True, False)
    del config["rms_norm_eps"]
    with pytest.raises(ConfigError, match="has no 'rms_norm_eps', which a Mixtral model needs"):
        Architecture.from_hf_config(config)


def converted(config: Any, directory: Path) -> tuple[dict[str, Any], int]:
    """What a rank of the layout holds, exported to rank 0; and how many numbers this rank holds of it."""
    from r3.trainer.build import build_chunks, build_layout

    with arranged(config.trainer):
        arch = Architecture.from_directory(directory)
        chunks = build_chunks(config, arch, build_layout(config, arch), directory, replay=True)
        held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        return {name: tensor.numpy().copy() for name, tensor in export_weights(chunks, arch)}, held


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_hold_their_parts_and_export_the_whole(
    gloo_pool: GlooPool, mixtral_dir: Path, layout: str
) -> None:
    found = gloo_pool.run(converted, layout_config(LAYOUTS[layout], 2), mixtral_dir)
    stored = load_file(mixtral_dir / "model.safetensors")
    whole = sum(tensor.numel() for tensor in stored.values())
    assert all(held < 0.75 * whole for _, held in found)
    exported = found[0][0]
    assert exported.keys() == stored.keys()
    assert all(torch.equal(stored[name], torch.from_numpy(exported[name])) for name in stored)


@pytest.fixture(scope="module")
def batch(mixtral_dir: Path) -> Batch:
    return make_batch(ModelSpec.from_directory(mixtral_dir))


@pytest.fixture(scope="module")
def expected(mixtral_dir: Path, batch: Batch) -> Outcome:
    parallel.join(dist.HashStore(), 0, 1, seed=0, timeout_s=60)
    try:
        return run_layout(make_config(trainer={"packed": False, "micro_batch_size": 64}), mixtral_dir, batch)
    finally:
        parallel.leave()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_replay_like_one(
    gloo_pool: GlooPool, mixtral_dir: Path, batch: Batch, expected: Outcome, layout: str
) -> None:
    config = layout_config(LAYOUTS[layout], 2, trainer={"recompute": "full"})
    found: Any = gloo_pool.run(run_layout, config, mixtral_dir, batch)[0]
    assert_equal(found, expected, batch, config)
