"""What a Qwen3-MoE, Mixtral or (as a control) dense Qwen3 checkpoint is made of, and what of it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3.config import TrainerConfig
from r3.errors import ConfigError
from r3.types import DENSE, ModelSpec


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a `config.json` says about shapes; `heads` are query heads, `groups` key-value heads.

    `qk_norm`: queries and keys are normalised per head (Qwen3-MoE). `normalise_top_k`: the gate weights of the chosen
    experts sum to one.
    """

    spec: ModelSpec
    heads: int
    groups: int
    head_dim: int
    ffn_size: int
    expert_ffn_size: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied: bool
    normalise_top_k: bool
    qk_norm: bool = True

    @classmethod
    def from_directory(cls, directory: str | Path) -> Architecture:
        """Read `config.json`; raise `ConfigError` for a model, or a feature of it, that is not supported."""
        ModelSpec.from_directory(directory)  # says what is wrong with a file that cannot be read
        path = Path(directory) / "config.json"
        return cls.from_hf_config(json.loads(path.read_text()), source=str(path))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """Do the same with the contents of a `config.json`."""
        spec = ModelSpec.from_hf_config(config, source)
        _refuse(config, source)
        mixtral = spec.model_type == "mixtral"
        try:
            heads = config["num_attention_heads"]
            return cls(
                spec=spec,
                heads=heads,
                groups=config["num_key_value_heads"],
                head_dim=config.get("head_dim") or spec.hidden_size // heads,
                ffn_size=config["intermediate_size"],
                expert_ffn_size=_expert_size(config, spec),
                rope_theta=float(_rope(config)["rope_theta"]),
                norm_eps=config["rms_norm_eps"],
                max_positions=config["max_position_embeddings"],
                tied=config.get("tie_word_embeddings", False),
                normalise_top_k=mixtral or config.get("norm_topk_prob", False),
                qk_norm=not mixtral,
            )
        except KeyError as error:
            family = {"mixtral": "Mixtral", DENSE: "Qwen3"}.get(spec.model_type, "Qwen3-MoE")
            raise ConfigError(f"{source} has no {error.args[0]!r}, which a {family} model needs") from None


def require_layout(arch: Architecture, trainer: TrainerConfig) -> None:
    """Raise `ConfigError` when the model cannot be cut as `trainer` asks."""
    tensor, expert_tensor = trainer.tensor_parallel, trainer.expert_tensor
    chunks = trainer.pipeline_parallel * trainer.virtual_pipeline
    moe, spec = arch.spec.moe_layers, arch.spec
    cuts = [
        ("tensor_parallel", tensor, "key-value heads", arch.groups),
        ("tensor_parallel", tensor, "query heads", arch.heads),
        ("tensor_parallel", tensor, "vocabulary entries", spec.vocab_size),
        ("expert_tensor_parallel", expert_tensor, "columns of an expert", arch.expert_ffn_size),
        ("expert_parallel", trainer.expert_parallel, "experts", spec.num_experts),
        ("pipeline_parallel x virtual_pipeline", chunks, "layers", spec.num_layers),
    ]
    if len(moe) < spec.num_layers:
        cuts.append(("tensor_parallel", tensor, "columns of a dense layer", arch.ffn_size))
    for key, size, what, count in cuts:
        if count % size:
            raise ConfigError(f"trainer.{key}={size} does not divide the model's {count} {what}; choose a divisor")


def _expert_size(config: Mapping[str, Any], spec: ModelSpec) -> int:
    if spec.model_type == DENSE:
        return 0
    size: int = config["intermediate_size" if spec.model_type == "mixtral" else "moe_intermediate_size"]
    return size


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # Transformers 5 nests what earlier versions kept at the top level.
    return config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta", 1e6 if config.get("model_type") == "mixtral" else 1e4),
    }


def _refuse(config: Mapping[str, Any], source: str) -> None:
    rope = _rope(config)
    unsupported = {
        "attention_bias": config.get("attention_bias", False) is not False,
        "use_sliding_window": config.get("use_sliding_window", False) is not False,
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if config["model_type"] == "mixtral":
        # Qwen3-MoE carries a window that `use_sliding_window` switches; a Mixtral's is in force whenever it is set.
        unsupported["sliding_window"] = config.get("sliding_window") is not None
        unsupported["router_jitter_noise"] = bool(config.get("router_jitter_noise"))
    for key, found in unsupported.items():
        if found:
            raise ConfigError(f"{source}: {key}={config.get(key, rope.get(key))!r} is not supported by the trainer")
