"""Megatron-core's `GPTModel` for a Hugging Face Qwen3-MoE or Mixtral checkpoint directory."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F

from r3.config import TrainerConfig
from r3.errors import ConfigError
from r3.trainer.architecture import Architecture as Architecture
from r3.trainer.dispatch import dispatch_locally
from r3.trainer.experts import GroupedExperts
from r3.trainer.megatron import (
    GPTModel,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    parallel_state,
)
from r3.trainer.modules import RMSNorm, SdpaAttention
from r3.trainer.replay import ReplayRouter, refuse_unsupported_router

Recompute = Literal["none", "full", "selective"]
_RECOMPUTE: Mapping[Recompute, Mapping[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def transformer_config(
    arch: Architecture, *, dtype: torch.dtype, recompute: Recompute = "none", **changes: Any
) -> TransformerConfig:
    """Return Megatron's configuration of `arch`; `changes` override single fields (parallel sizes, dispatcher)."""
    layers = range(arch.spec.num_layers)
    settings: dict[str, Any] = {
        "num_layers": arch.spec.num_layers,
        "hidden_size": arch.spec.hidden_size,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.groups,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn_size,
        "moe_ffn_hidden_size": arch.expert_ffn_size or None,
        "num_moe_experts": arch.spec.num_experts or None,
        "moe_router_topk": arch.spec.top_k or 1,
        "moe_layer_freq": [int(layer in arch.spec.moe_layers) for layer in layers],
        # Softmax over the chosen logits equals softmax over all, chosen and renormalised (norm_topk_prob).
        "moe_router_pre_softmax": not arch.normalise_top_k,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "qk_layernorm": arch.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Every weight is read from the checkpoint, see `r3.trainer.convert`.
        "perform_initialization": False,
        "transformer_impl": "local",
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        **_RECOMPUTE[recompute],
    }
    with warnings.catch_warnings():
        # 0.16.1 deprecates the default of a CUDA graph option that is not in use.
        warnings.simplefilter("ignore")
        return TransformerConfig(**(settings | changes))


def layout_changes(trainer: TrainerConfig) -> dict[str, Any]:
    """Return the fields of Megatron's configuration that say how the model is spread over the ranks."""
    stages = trainer.pipeline_parallel
    return {
        "tensor_model_parallel_size": trainer.tensor_parallel,
        # Megatron-core refuses to train MoE layers under tensor parallelism without it.
        "sequence_parallel": trainer.tensor_parallel > 1,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": trainer.virtual_pipeline if trainer.virtual_pipeline > 1 else None,
        "context_parallel_size": trainer.context_parallel,
        "expert_model_parallel_size": trainer.expert_parallel,
        "expert_tensor_parallel_size": trainer.expert_tensor,
        "moe_token_dispatcher_type": trainer.dispatcher,
        # The allgather dispatcher refuses it, and the interleaved schedule of two stages mixes up the shapes that go to
        # and come from the same neighbour; their microbatches are padded to one shape, see `equal_shapes`.
        "variable_seq_lengths": stages > 1 and trainer.dispatcher != "allgather" and trainer.virtual_pipeline == 1,
        "batch_p2p_comm": trainer.virtual_pipeline == 1,
    }


def engine_changes(trainer: TrainerConfig) -> dict[str, Any]:
    """Return the fields that ask for Transformer Engine's layers; raise `ConfigError` where they cannot be had."""
    if not trainer.transformer_engine:
        return {}
    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        raise ConfigError(
            "trainer.transformer_engine is true, but there is no transformer_engine, or no GPU, on this host; install "
            "it (pip install 'transformer-engine[pytorch]') and let `python -m r3.doctor replay` pass with it before a "
            "run, or set trainer.transformer_engine: false"
        )
    return {"transformer_impl": "transformer_engine", "moe_grouped_gemm": trainer.experts != "sequential"}


def build_model(
    arch: Architecture, config: TransformerConfig, *, replay: bool, grouped: bool = False, vp_stage: int | None = None
) -> GPTModel:
    """Return the model with uninitialised weights; `replay` puts `ReplayRouter` into its layer spec, `grouped` experts
    as grouped matrix products.

    Needs Megatron's parallel state; load weights with `r3.trainer.convert.load_weights` before use. Raises
    `ConfigError` for a router that cannot be replayed.
    """
    if replay:
        refuse_unsupported_router(config)
    kind = {} if vp_stage is None else {"vp_stage": vp_stage}
    first = get_transformer_layer_offset(config, **kind)
    built = range(first, first + get_num_layers_to_build(config, **kind))
    if config.transformer_impl == "transformer_engine":
        spec, grouped = engine_layer_spec, bool(config.moe_grouped_gemm)
    else:
        spec = layer_spec
    layers = [spec(arch, moe=layer in arch.spec.moe_layers, replay=replay, grouped=grouped) for layer in built]
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm(config)),
        vocab_size=arch.spec.vocab_size,
        max_sequence_length=arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **kind),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **kind),
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        share_embeddings_and_output_weights=arch.tied,
        **kind,
    )
    if grouped and config.transformer_impl != "transformer_engine":
        dispatch_locally(model)
    return model


def layer_spec(arch: Architecture, *, moe: bool, replay: bool, grouped: bool = False) -> ModuleSpec:
    """Return Megatron's local spec of one decoder layer with R3's norm, attention, router and `grouped` experts."""
    layer = get_gpt_layer_local_spec(
        num_experts=arch.spec.num_experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=arch.qk_norm,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = SdpaAttention
    if moe and replay:
        _moe_parts(layer).router = ReplayRouter
    if moe and grouped:
        _moe_parts(layer).experts = GroupedExperts
    return layer


def engine_layer_spec(arch: Architecture, *, moe: bool, replay: bool, grouped: bool = False) -> ModuleSpec:
    """Return Transformer Engine's spec of one decoder layer with R3's router; norms and attention are its own."""
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=arch.spec.num_experts if moe else None,
        moe_grouped_gemm=grouped,
        qk_layernorm=arch.qk_norm,
    )
    if moe and replay:
        _moe_parts(layer).router = ReplayRouter
    return layer


def _moe_parts(layer: ModuleSpec) -> Any:
    # 0.16 describes the layer by a ModuleSpec, 0.19 by functools.partial(MoELayer, submodules=...).
    mlp = layer.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]


def _final_norm(config: TransformerConfig) -> Any:
    if config.transformer_impl != "transformer_engine":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
