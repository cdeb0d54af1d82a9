"""HF -> Megatron gives the same logits, Megatron -> HF gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from r3.errors import CheckpointError, ConfigError
from r3.trainer.convert import export_weights, load_weights
from r3.trainer.megatron import GPTModel
from r3.trainer.model import Architecture, build_model, transformer_config
from r3.trainer.weights import save_checkpoint, weight_buckets
from r3.weights import WeightBuckets
from tests.megatron.toys import VOCAB, write_model

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("single_rank")]
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "dense first layer": {"mlp_only_layers": [0]},
    "every second layer": {"decoder_sparse_step": 2},
    "softmax over all experts": {"norm_topk_prob": False},
    "one query head a group": {"num_key_value_heads": 4},
}


def load(directory: Path) -> tuple[GPTModel, Architecture]:
    arch = Architecture.from_directory(directory)
    model = build_model(arch, transformer_config(arch, dtype=torch.float32), replay=True).eval()
    load_weights(model, arch, directory)
    return model, arch


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def some_tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_hf_and_export_is_bit_exact(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = write_model(tmp_path / "model", **changes)
    model, arch = load(directory)
    expected = hf_logits(directory, some_tokens())
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits(model, some_tokens()), expected, atol=1e-5, rtol=0)
    stored, exported = load_file(directory / "model.safetensors"), dict(export_weights(model, arch))
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


def test_fused_experts_and_sharded_files_are_read(model_dir: Path, tmp_path: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    fused = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for layer in range(4):
        base = f"model.layers.{layer}.mlp.experts."
        parts = {p: [stored[f"{base}{e}.{p}_proj.weight"] for e in range(16)] for p in ("gate", "up", "down")}
        fused[base + "gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        )
        fused[base + "down_proj"] = torch.stack(parts["down"])
    names = sorted(fused)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: fused[name].contiguous() for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in halves.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    exported = dict(export_weights(*load(tmp_path)))
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


def test_a_missing_tensor_is_named(model_dir: Path, tmp_path: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    del stored["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json promises"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ],
)
def test_features_that_would_compute_something_else_are_refused(
    model_dir: Path, tmp_path: Path, key: str, value: object
) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError, match="not supported"):
        Architecture.from_directory(tmp_path)


def unflatten(weights: WeightBuckets) -> dict[str, torch.Tensor]:
    found = {}
    for bucket in weights.buckets:
        for slot in bucket.slots:
            data = torch.from_numpy(bucket.data[slot.begin : slot.end])
            found[slot.name] = data.view(getattr(torch, slot.dtype)).reshape(slot.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_hold_every_tensor(model_dir: Path, dtype: torch.dtype) -> None:
    model, arch = load(model_dir)
    weights = weight_buckets(export_weights(model, arch), dtype, 100_000, version=7)
    assert weights.version == 7
    assert len(weights.buckets) > 5
    largest = max(tensor.numel() for _, tensor in export_weights(model, arch)) * dtype.itemsize
    assert max(bucket.data.nbytes for bucket in weights.buckets) <= max(largest, 100_000)
    found = unflatten(weights)
    stored = load_file(model_dir / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].to(dtype)) for name in stored)


def test_saved_checkpoint_loads_in_transformers(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, arch = load(model_dir)
    target = tmp_path / "run" / "hf"
    for _ in range(2):
        save_checkpoint(export_weights(model, arch), model_dir, target, torch.float32)
    assert [path.name for path in target.parent.iterdir()] == ["hf"]
    torch.testing.assert_close(hf_logits(target, some_tokens()), hf_logits(model_dir, some_tokens()), atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(target).encode("ab") == AutoTokenizer.from_pretrained(model_dir).encode("ab")


def test_large_checkpoints_are_sharded(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3.trainer.weights.SHARD_BYTES", 200_000)
    model, arch = load(model_dir)
    save_checkpoint(export_weights(model, arch), model_dir, tmp_path / "hf", torch.float32)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    np.testing.assert_array_equal(hf_logits(tmp_path / "hf", some_tokens()), hf_logits(model_dir, some_tokens()))


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    model, arch = load(model_dir)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(export_weights(model, arch), model_dir, blocked / "hf", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
