"""A tiny Qwen3-MoE checkpoint directory with a trivial tokenizer, for tests that need real files."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 320
EOS = 1
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}


def write_files(directory: Path, **changes: object) -> Path:
    """Write config, generation config and a tokenizer of one token per printable character; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    # top_k and top_p are what a released model ships: nothing of it may reach the training rollouts.
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": EOS, "do_sample": True, "temperature": 0.6, "top_k": 2, "top_p": 0.5})
    )
    vocab = {"<pad>": 0, "<eos>": EOS} | {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"})
    )
    return directory


def write_model(directory: Path, seed: int) -> Path:
    """Write such a directory with random float32 weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).float()
    model.save_pretrained(directory)
    return write_files(directory)
