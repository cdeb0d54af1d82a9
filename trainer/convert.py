"""Hugging Face <-> Megatron-core weights of Qwen3-MoE.

The map is driven by Megatron's *local* parameter names, each of which names the Hugging Face tensors that it is made
of; a rank therefore reads only what its own layers and experts need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from r3.errors import CheckpointError
from r3.trainer.megatron import GPTModel
from r3.trainer.model import Architecture

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter as a function of Hugging Face tensors, and back.

    `pattern` is matched against the whole Megatron name; its groups fill `sources`.
    """

    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    merge: Callable[[Architecture, Tensors], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], Tensors]


def _merge_qkv(arch: Architecture, parts: Tensors) -> torch.Tensor:
    hidden = parts[0].shape[1]
    grouped = [part.reshape(arch.groups, -1, hidden) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def _split_qkv(arch: Architecture, merged: torch.Tensor) -> Tensors:
    """Undo the order [queries of group g, key g, value g] that Megatron stacks over the groups."""
    hidden = merged.shape[1]
    queries = arch.heads // arch.groups * arch.head_dim
    parts = merged.reshape(arch.groups, -1, hidden).split([queries, arch.head_dim, arch.head_dim], dim=1)
    return tuple(part.reshape(-1, hidden) for part in parts)


def _one(_: Architecture, parts: Tensors) -> torch.Tensor:
    return parts[0]


def _same(_: Architecture, merged: torch.Tensor) -> Tensors:
    return (merged,)


def _stack(_: Architecture, parts: Tensors) -> torch.Tensor:
    return torch.cat(parts)


def _halves(_: Architecture, merged: torch.Tensor) -> Tensors:
    return merged.chunk(2)


def _rule(
    megatron: str,
    *sources: str,
    merge: Callable[[Architecture, Tensors], torch.Tensor] = _one,
    split: Callable[[Architecture, torch.Tensor], Tensors] = _same,
) -> Rule:
    return Rule(re.compile(re.escape(megatron).replace(r"\#", r"(\d+)")), sources, merge, split)


_LAYER, _HF = "decoder.layers.#.", "model.layers.{0}."
RULES = (
    _rule("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    _rule("output_layer.weight", "lm_head.weight"),
    _rule("decoder.final_layernorm.weight", "model.norm.weight"),
    _rule(_LAYER + "input_layernorm.weight", _HF + "input_layernorm.weight"),
    _rule(_LAYER + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight"),
    _rule(
        _LAYER + "self_attention.linear_qkv.weight",
        *(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv"),
        merge=_merge_qkv,
        split=_split_qkv,
    ),
    _rule(_LAYER + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight"),
    _rule(_LAYER + "self_attention.q_layernorm.weight", _HF + "self_attn.q_norm.weight"),
    _rule(_LAYER + "self_attention.k_layernorm.weight", _HF + "self_attn.k_norm.weight"),
    _rule(_LAYER + "mlp.router.weight", _HF + "mlp.gate.weight"),
    _rule(
        _LAYER + "mlp.experts.local_experts.#.linear_fc1.weight",
        _HF + "mlp.experts.{1}.gate_proj.weight",
        _HF + "mlp.experts.{1}.up_proj.weight",
        merge=_stack,
        split=_halves,
    ),
    _rule(_LAYER + "mlp.experts.local_experts.#.linear_fc2.weight", _HF + "mlp.experts.{1}.down_proj.weight"),
    _rule(
        _LAYER + "mlp.linear_fc1.weight",
        _HF + "mlp.gate_proj.weight",
        _HF + "mlp.up_proj.weight",
        merge=_stack,
        split=_halves,
    ),
    _rule(_LAYER + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight"),
)


def find_rule(name: str) -> tuple[Rule, tuple[str, ...]]:
    """Return the rule of a global Megatron parameter name and the Hugging Face names that it is made of."""
    for rule in RULES:
        found = rule.pattern.fullmatch(name)
        if found:
            return rule, tuple(source.format(*found.groups()) for source in rule.sources)
    raise CheckpointError(f"no conversion rule for the Megatron parameter {name!r}")


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield `(name, parameter)` of a model without the prefixes of its wrappers (DDP, Float16Module)."""
    for name, parameter in model.named_parameters():
        while name.startswith("module."):
            name = name.removeprefix("module.")
        yield name, parameter


@torch.no_grad()
def load_weights(model: GPTModel, arch: Architecture, directory: str | Path) -> None:
    """Fill every parameter of `model` from the safetensors files in `directory`, cast to the parameter's dtype.

    Raises `CheckpointError` for a tensor that is missing or has another shape.
    """
    with HfTensors(Path(directory)) as tensors:
        for name, parameter in named_weights(model):
            rule, sources = find_rule(name)
            value = rule.merge(arch, tuple(tensors.read(source) for source in sources))
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{directory}: {' + '.join(sources)} gives shape {tuple(value.shape)}, "
                    f"config.json promises {tuple(parameter.shape)}"
                )
            parameter.copy_(value)


def export_weights(model: torch.nn.Module, arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(Hugging Face name, tensor)` of every weight, one expert a name, as checkpoint files have them."""
    for name, parameter in named_weights(model):
        rule, sources = find_rule(name)
        yield from zip(sources, rule.split(arch, parameter.detach()), strict=True)


@dataclass(slots=True)
class HfTensors:
    """Tensors of a checkpoint directory by name, from one `model.safetensors` or a sharded index; a context manager.

    Experts may be stored one by one or fused (`experts.gate_up_proj` `[E, 2 I, H]`, `experts.down_proj` `[E, H, I]`);
    `read` answers to the per-expert name in both cases.
    """

    directory: Path
    _files: dict[str, Any] = field(default_factory=dict)
    _where: dict[str, str] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> HfTensors:
        from safetensors import SafetensorError, safe_open

        for file in self._file_names():
            try:
                opened = self._stack.enter_context(safe_open(str(self.directory / file), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
            self._files[file] = opened
            self._where |= dict.fromkeys(opened.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; raise `CheckpointError` that names it when the directory does not have it."""
        if name in self._where:
            return self._files[self._where[name]].get_tensor(name)
        fused = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if fused:
            base, expert, part = fused.groups()
            stored = f"{base}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
            if stored in self._where:
                weight = self._files[self._where[stored]].get_slice(stored)[int(expert)]
                return weight if part == "down" else weight.chunk(2)[part == "up"]
        raise CheckpointError(f"{self.directory} has no tensor {name!r}; is the checkpoint complete?")

    def _file_names(self) -> Sequence[str]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            return sorted(set(weight_map.values()))
        if (self.directory / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise CheckpointError(f"{self.directory} holds neither model.safetensors nor model.safetensors.index.json")
