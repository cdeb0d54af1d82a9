"""The memory plan adds up, and its file readers see what is there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from r3.builtin import RECIPES
from r3.config import Config, load_config
from r3.errors import ConfigError
from r3.plan import count_parameters, human, model_size, plan, render
from r3.preflight import check
from tests.tiny_model import write_files
from tests.tiny_weights import write_weights

MIB = 2**20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A directory whose facts are those of a large model and whose weights are small."""
    changes = {
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 2,
    }
    return write_weights(write_files(tmp_path / "large", **changes), {"a": [1024, 1024], "b": [1024, 2048]})


def test_every_part_follows_from_shapes_and_dtypes(large: Path) -> None:
    config = load_config(None, [f"model={large}", "trainer.dtype=bfloat16", "grpo.kl_coef=0.1", "grpo.group_size=4",
                                "rollout.prompts_per_step=2", "rollout.max_new_tokens=8",
                                "rollout.max_total_tokens=1024", "rollout.dtype=float32"])  # fmt: skip
    found = plan(config, model_size(config))
    count = 3 * MIB
    assert found.parameters == count
    assert (found.trainer_weights, found.gradients, found.optimizer) == (2 * count, 4 * count, 12 * count)
    assert found.reference == 2 * count
    assert found.trainer == 20 * count
    assert found.engine_weights == 4 * count
    assert found.kv == 1024 * 48 * 2 * 2 * 32 * 4
    assert found.capture == 1024 * 48 * 8 * 4
    assert found.routing_per_token == 24 * 8, "24 of 48 layers have experts, uint8"
    assert found.tokens_per_step == 2 * 4 * (512 + 8)
    assert found.routing_per_step == found.tokens_per_step * 24 * 8
    assert found.object_store == 2 * 4 * count + found.routing_per_step + found.tokens_per_step * 8


@pytest.mark.parametrize(
    ("overrides", "streamed", "buckets"),
    [
        ([], False, 0),
        (["weights.transport=ipc"], True, 0),
        (["rollout.gpus_per_worker=1", "trainer.gpus_per_process=1"], True, 2),
        (["rollout.gpus_per_worker=1", "trainer.gpus_per_process=1", "weights.transport=object_store"], False, 0),
        (["rollout.gpus_per_worker=0.25", "trainer.gpus_per_process=0.5", "rollout.workers=2",
          "rollout.mem_fraction=0.2", "trainer.mem_fraction=0.4"], False, 0),
    ],
)  # fmt: skip
def test_streamed_weights_take_buckets_and_others_the_object_store(
    large: Path, overrides: list[str], streamed: bool, buckets: int
) -> None:
    config = load_config(None, [f"model={large}", "weights.bucket_mib=64", *overrides])
    size = model_size(config)
    found = plan(config, size)
    weights = found.object_store - found.routing_per_step - found.tokens_per_step * 8
    assert weights == (0 if streamed else 2 * found.engine_weights)
    assert found.buckets == buckets * 64 * MIB
    assert ("weights of two steps" in "\n".join(render(config, size, found))) != streamed


def test_no_capture_and_no_pool_size_take_nothing(large: Path) -> None:
    config = load_config(None, [f"model={large}", "replay.mode=none", "routing.capture=false",
                                "rollout.gpus_per_worker=1", "rollout.max_total_tokens=null"])  # fmt: skip
    size = model_size(config)
    found = plan(config, size)
    assert (found.kv, found.capture, found.routing_per_step, found.reference) == (None, None, 0, 0)
    assert "KV as much as rollout.mem_fraction leaves" in "\n".join(render(config, size, found))


def test_models_with_more_than_256_experts_take_two_bytes_an_id(tmp_path: Path) -> None:
    model = write_weights(write_files(tmp_path / "m", num_experts=257))
    config = load_config(None, [f"model={model}"])
    assert plan(config, model_size(config)).routing_per_token == 2 * 4 * 4


def test_the_plan_of_a_model_that_is_not_built_bounds_the_built_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    monkeypatch.setenv("R3_CACHE", str(tmp_path))
    recipe = RECIPES["tiny-qwen3moe"]
    planned = model_size(Config())
    assert planned.directory is None
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=recipe.tokenizer_vocab, hidden_size=recipe.hidden_size, num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads, head_dim=recipe.head_dim,
            num_experts=recipe.experts, num_experts_per_tok=recipe.top_k, moe_intermediate_size=recipe.expert_size,
            decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
        )
    )  # fmt: skip
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert count_parameters(tmp_path / "saved") == planned.parameters
    model.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert count_parameters(tmp_path / "sharded") == planned.parameters
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="is the checkpoint complete"):
        count_parameters(tmp_path / "sharded")


def test_a_config_without_a_needed_key_is_named(large: Path) -> None:
    text = (large / "config.json").read_text().replace('"num_key_value_heads"', '"other"')
    (large / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="has no 'num_key_value_heads'"):
        model_size(load_config(None, [f"model={large}"]))


QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip


@pytest.fixture
def only_a_config(tmp_path: Path) -> Path:
    """The published config.json of Qwen3-30B-A3B, and nothing else."""
    written = write_files(tmp_path / "whole", **QWEN3_30B_A3B) / "config.json"
    (tmp_path / "bare").mkdir()
    return written.rename(tmp_path / "bare" / "config.json").parent


def test_a_config_alone_gives_the_published_number_of_parameters(only_a_config: Path) -> None:
    config = load_config("grpo_qwen3_30b_a3b.yaml", [f"model={only_a_config}"])
    size = check(config, planned=True)
    assert size.parameters == 30_532_122_624
    found = plan(config, size)
    # Three stages; experts over two ranks, the rest of a stage on both.
    experts = 48 * 128 * 3 * 2048 * 768
    assert found.trainer_weights == 2 * math.ceil((size.parameters - experts) / 3 + experts / 6)
    assert found.optimizer == 12 * math.ceil(size.parameters / 6)
    assert found.engine == (2 * size.parameters + 2**20 * 48 * 2 * 4 * 128 * 2) / 2
    assert found.buckets == 4 * config.weights.bucket_mib * MIB, "two buckets, two batches of the other ranks' shards"
    assert found.object_store < 2 * size.parameters, "the weights are streamed"
    lines = render(config, size, found)
    assert any("a rollout GPU of 139 GiB: 76.4 GiB of 111.2 GiB (rollout.mem_fraction)" in line for line in lines)
    assert any("a trainer GPU of 139 GiB: 87.7 GiB of 132.0 GiB (trainer.mem_fraction)" in line for line in lines)


def test_a_plan_that_does_not_fit_the_stated_gpus_is_refused(only_a_config: Path) -> None:
    config = load_config("grpo_qwen3_30b_a3b.yaml", [f"model={only_a_config}", "run.gpu_memory_gib=80"])
    with pytest.raises(ConfigError) as caught:
        check(config, planned=True)
    text = str(caught.value)
    assert "a rollout worker needs 76.4 GiB on each of its GPUs, rollout.mem_fraction=0.8" in text
    assert "a trainer rank needs 87.7 GiB on each of its GPUs, trainer.mem_fraction=0.95" in text


@pytest.mark.parametrize(("name", "ranks"), [("1gpu", 1), ("2gpu", 1), ("4gpu", 2)])
def test_the_shipped_configs_for_gpus_pass_their_checks(
    name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R3_CACHE", str(tmp_path))
    config = load_config(f"grpo_qwen3moe_{name}.yaml", ["run.gpu_memory_gib=80"])
    size = check(config, planned=True)
    assert config.trainer.processes == ranks
    assert 0.5e9 < size.parameters < 1.5e9
    row = size.arch.groups * size.arch.head_dim * 2
    assert row in (256, 512, 1024, 2048)
    assert size.arch.head_dim in (64, 128)


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")])
def test_bytes_are_shown_in_the_largest_unit(number: int, text: str) -> None:
    assert human(number) == text
