"""Hugging Face <-> Megatron-core weights of Qwen3-MoE and Mixtral, in any layout.

The map is driven by Megatron's *local* parameter names: each becomes a global one (layer and expert numbers of the
whole model) that names the Hugging Face tensors it is made of; a rank therefore reads only what its own layers and
experts need, and keeps its tensor-parallel part of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from r3.errors import CheckpointError
from r3.trainer import parallel
from r3.trainer.gather import BATCH_BYTES, Shard, ShardGather
from r3.trainer.megatron import GPTModel, parallel_state
from r3.trainer.model import Architecture

Tensors = tuple[torch.Tensor, ...]
Cut = Literal["none", "rows", "columns", "halves"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter as a function of Hugging Face tensors, and back.

    `pattern` is matched against the whole global Megatron name; its groups fill `sources`. `cut`: how tensor
    parallelism (expert tensor parallelism for experts) divides the merged tensor: by `rows`, by `columns`, by rows of
    both `halves`, or not at all.
    """

    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    merge: Callable[[Architecture, Tensors], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], Tensors]
    cut: Cut = "none"


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
    cut: Cut = "none",
) -> Rule:
    return Rule(re.compile(re.escape(megatron).replace(r"\#", r"(\d+)")), sources, merge, split, cut)


_LAYER, _HF = "decoder.layers.#.", "model.layers.{0}."
RULES = (
    _rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", cut="rows"),
    _rule("output_layer.weight", "lm_head.weight", cut="rows"),
    _rule("decoder.final_layernorm.weight", "model.norm.weight"),
    _rule(_LAYER + "input_layernorm.weight", _HF + "input_layernorm.weight"),
    _rule(_LAYER + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight"),
    _rule(
        _LAYER + "self_attention.linear_qkv.weight",
        *(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv"),
        merge=_merge_qkv,
        split=_split_qkv,
        cut="rows",
    ),
    _rule(_LAYER + "self_attention.linear_proj.weight", _HF + "self_attn.o_proj.weight", cut="columns"),
    _rule(_LAYER + "self_attention.q_layernorm.weight", _HF + "self_attn.q_norm.weight"),
    _rule(_LAYER + "self_attention.k_layernorm.weight", _HF + "self_attn.k_norm.weight"),
    _rule(_LAYER + "mlp.router.weight", _HF + "mlp.gate.weight"),
    _rule(
        _LAYER + "mlp.experts.local_experts.#.linear_fc1.weight",
        _HF + "mlp.experts.{1}.gate_proj.weight",
        _HF + "mlp.experts.{1}.up_proj.weight",
        merge=_stack,
        split=_halves,
        cut="halves",
    ),
    _rule(
        _LAYER + "mlp.experts.local_experts.#.linear_fc2.weight",
        _HF + "mlp.experts.{1}.down_proj.weight",
        cut="columns",
    ),
    _rule(
        _LAYER + "mlp.linear_fc1.weight",
        _HF + "mlp.gate_proj.weight",
        _HF + "mlp.up_proj.weight",
        merge=_stack,
        split=_halves,
        cut="halves",
    ),
    _rule(_LAYER + "mlp.linear_fc2.weight", _HF + "mlp.down_proj.weight", cut="columns"),
)


# The sources above are Qwen3-MoE's; other models keep the same tensors under other names. The names are those of
# checkpoint files: transformers 5 holds Mixtral's under Qwen3-MoE's names in memory and writes the published ones.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {
        _HF + "mlp.gate.weight": _HF + "block_sparse_moe.gate.weight",
        _HF + "mlp.experts.{1}.gate_proj.weight": _HF + "block_sparse_moe.experts.{1}.w1.weight",
        _HF + "mlp.experts.{1}.up_proj.weight": _HF + "block_sparse_moe.experts.{1}.w3.weight",
        _HF + "mlp.experts.{1}.down_proj.weight": _HF + "block_sparse_moe.experts.{1}.w2.weight",
    }
}


def find_rule(name: str, model_type: str) -> tuple[Rule, tuple[str, ...]]:
    """Return the rule of a global Megatron parameter name and the Hugging Face names that it is made of."""
    names = _NAMES.get(model_type, {})
    for rule in RULES:
        found = rule.pattern.fullmatch(name)
        if found:
            return rule, tuple(names.get(source, source).format(*found.groups()) for source in rule.sources)
    raise CheckpointError(f"no conversion rule for the Megatron parameter {name!r}")


_ENGINE_NAMES = (
    (r"(\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)$", r"\1.local_experts.\3.\2.weight"),
    (r"\.self_attention\.linear_qkv\.layer_norm_weight$", ".input_layernorm.weight"),
    (r"\.mlp\.linear_fc1\.layer_norm_weight$", ".pre_mlp_layernorm.weight"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One weight of this rank: its global Megatron name, and which of how many tensor-parallel parts it is.

    `index`: where it is one expert's of a parameter that holds several (`r3.trainer.experts`), which of them.
    """

    name: str
    parameter: torch.nn.Parameter
    rule: Rule
    sources: tuple[str, ...]
    part: int
    parts: int
    index: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this weight's share of a tensor that is shaped like the parameter; a view."""
        return tensor if self.index is None else tensor[self.index]


def named_weights(chunks: torch.nn.Module | Sequence[torch.nn.Module], arch: Architecture) -> Iterator[Weight]:
    """Yield the parameters of a model, or of the chunks that a pipeline stage holds of it, wrapped or not."""
    for chunk in [chunks] if isinstance(chunks, torch.nn.Module) else chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        for name, parameter in chunk.named_parameters():
            for whole, index in _global_names(chunk, name, parameter):
                if arch.tied and whole == "output_layer.weight":
                    # The last stage's copy of the embedding, which Megatron keeps equal.
                    whole = "embedding.word_embeddings.weight"
                rule, sources = find_rule(whole, arch.spec.model_type)
                part, parts = (0, 1) if rule.cut == "none" else _tensor_rank(expert=".local_experts." in whole)
                yield Weight(whole, parameter, rule, sources, part, parts, index)


def _global_names(chunk: GPTModel, name: str, parameter: torch.nn.Parameter) -> Iterator[tuple[str, int | None]]:
    """Yield the weights that a parameter holds, and where: grouped experts answer to the names of single ones."""
    name = local_name(name)
    grouped = re.fullmatch(r"(.+\.mlp\.experts)\.fc([12])", name)
    if not grouped:
        yield _global_name(chunk, name), None
        return
    for index in range(len(parameter)):
        yield _global_name(chunk, f"{grouped[1]}.local_experts.{index}.linear_fc{grouped[2]}.weight"), index


def local_name(name: str) -> str:
    """Return the name that Megatron's local modules give to a parameter of Transformer Engine's; others as they are.

    It numbers the weights of grouped experts, and a norm belongs to the product behind it.
    """
    for pattern, local in _ENGINE_NAMES:
        name = re.sub(pattern, local, name)
    return name


def _global_name(chunk: GPTModel, name: str) -> str:
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not found:
        return name
    layer, rest = chunk.decoder.layers[int(found[1])], found[2]
    expert = re.match(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", rest)
    if expert:
        first = layer.mlp.local_expert_indices[0]
        rest = f"mlp.experts.local_experts.{first + int(expert[1])}.{expert[2]}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def _tensor_rank(*, expert: bool) -> tuple[int, int]:
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    return group.rank(), group.size()


def cut_weight(whole: torch.Tensor, cut: Cut, part: int, parts: int) -> torch.Tensor:
    """Return part `part` of `parts` of a merged tensor."""
    if parts == 1 or cut == "none":
        return whole
    if cut == "halves":
        return torch.cat([half.chunk(parts)[part] for half in whole.chunk(2)])
    return whole.chunk(parts, 0 if cut == "rows" else 1)[part]


def join_weight(pieces: Sequence[torch.Tensor], cut: Cut) -> torch.Tensor:
    """Undo `cut_weight`."""
    if len(pieces) == 1:
        return pieces[0]
    if cut == "halves":
        return torch.cat([torch.cat(halves) for halves in zip(*(piece.chunk(2) for piece in pieces), strict=True)])
    return torch.cat(tuple(pieces), 0 if cut == "rows" else 1)


@torch.no_grad()
def load_weights(
    chunks: torch.nn.Module | Sequence[torch.nn.Module], arch: Architecture, directory: str | Path
) -> None:
    """Fill every parameter of this rank from the safetensors files in `directory`, cast to the parameter's dtype.

    A parameter of which another tensor rank holds another part is marked as such. Megatron-core takes unmarked ones of
    all tensor ranks but the first for copies and leaves them out of the gradient norm; it marks them when it
    initialises them, which a loaded model skips, and never marks the experts under `expert_tensor_parallel: 1`, which
    differ from rank to rank all the same.

    Raises `CheckpointError` for a tensor that is missing or has another shape.
    """
    with HfTensors(Path(directory)) as tensors:
        for weight in named_weights(chunks, arch):
            whole = weight.rule.merge(arch, tuple(tensors.read(source) for source in weight.sources))
            value = cut_weight(whole, weight.rule.cut, weight.part, weight.parts)
            mine = weight.of(weight.parameter)
            if value.shape != mine.shape:
                raise CheckpointError(
                    f"{directory}: {' + '.join(weight.sources)} gives shape {tuple(value.shape)}, "
                    f"config.json promises {tuple(mine.shape)}"
                )
            mine.copy_(value)
            if weight.rule.cut != "none":
                weight.parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


class WeightExport:
    """The walk over a model's weights to rank 0, under Hugging Face names; made once, walked for every push.

    `value` picks what is exported of a parameter; `batch_bytes`: see `r3.trainer.gather`. Every walk is collective: all
    ranks must exhaust it. Rank 0 gets `(name, tensor)` of every weight, one expert a name, as checkpoint files have
    them, on the device of the model; the others get nothing and send their parts. Experts, layers and parts that rank 0
    does not hold come behind its own, rank by rank.
    """

    def __init__(
        self,
        chunks: torch.nn.Module | Sequence[torch.nn.Module],
        arch: Architecture,
        value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._arch, self._value = arch, value
        self._held = {(weight.name, weight.part): weight for weight in named_weights(chunks, arch)}
        mine = [
            Shard(name, part, weight.parts, tuple(found.shape), found.dtype)
            for (name, part), weight in self._held.items()
            for found in (self._local(name, part),)
        ]
        self._gather = ShardGather(mine, batch_bytes, parallel.device())

    @property
    def extra_bytes(self) -> int:
        """See `ShardGather`."""
        return self._gather.extra_bytes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parts in self._gather.walk(self._local):
            weight = self._held.get((name, 0))
            rule, sources = (weight.rule, weight.sources) if weight else find_rule(name, self._arch.spec.model_type)
            yield from zip(sources, rule.split(self._arch, join_weight(parts, rule.cut)), strict=True)

    def _local(self, name: str, part: int) -> torch.Tensor:
        weight = self._held[name, part]
        return weight.of(self._value(weight.parameter))


def export_weights(
    chunks: torch.nn.Module | Sequence[torch.nn.Module],
    arch: Architecture,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk over the weights of a model once; see `WeightExport`."""
    return iter(WeightExport(chunks, arch, value))


@dataclass(slots=True)
class HfTensors:
    """Tensors of a checkpoint directory by name, from one `model.safetensors` or a sharded index; a context manager.

    Experts may be stored one by one or fused (`mlp.experts.gate_up_proj` `[E, 2 I, H]`, `mlp.experts.down_proj`
    `[E, H, I]`, a Mixtral's gate then as `mlp.gate`); `read` answers to the name that `find_rule` gives in both cases.
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
        alias = _in_memory_name(name)
        if alias in self._where:
            return self._files[self._where[alias]].get_tensor(alias)
        fused = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", alias)
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


def _in_memory_name(name: str) -> str:
    """Return the name under which transformers 5 holds a published Mixtral tensor, others as they are."""
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"\.(w[123])\.weight$", lambda found: f".{parts[found[1]]}.weight", name)
