"""What a run will need: bytes of weights, optimizer, KV, routing and object store, from the headers of files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r3.builtin import PREFIX, Recipe, is_built, plan_model
from r3.config import Config
from r3.errors import ConfigError
from r3.trainer.architecture import Architecture
from r3.types import DENSE, ModelSpec

# Prompt lengths are not known before a tokenizer is loaded; sizes that depend on them are given for this many tokens.
PROMPT_TOKENS = 512
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A token id (int32) and its log-prob (float32).
_TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The facts of a checkpoint that decide memory; `directory` is None for a built-in model that is not made yet.

    `counted`: the parameters are those of the weight files; otherwise they follow from `config.json` alone.
    """

    arch: Architecture
    parameters: int
    directory: Path | None
    counted: bool = True

    @property
    def spec(self) -> ModelSpec:
        """The part of the architecture that engine and trainer must agree on."""
        return self.arch.spec


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a run will take. Per trainer rank, per rollout worker, per step, and for the object store of Ray.

    `kv` and `capture` are None where the engine sizes its KV pool itself. `object_store` holds one step's batch and,
    unless they are streamed, the weights of two steps: the old ones are let go only once the new ones are there.
    `engine_ranks`: GPUs of one engine, over which its weights are divided, `kv_ranks` of them its KV. `buckets`: on a
    trainer's GPU, of weights on their way to the engines.
    """

    parameters: int
    trainer_weights: int
    gradients: int
    optimizer: int
    reference: int
    engine_weights: int
    kv: int | None
    capture: int | None
    routing_per_token: int
    samples_per_step: int
    tokens_per_step: int
    routing_per_step: int
    object_store: int
    engine_ranks: int = 1
    kv_ranks: int = 1
    buckets: int = 0

    @property
    def engine(self) -> int:
        """Bytes of weights and named KV on one GPU (or the CPU) of an engine."""
        return math.ceil(self.engine_weights / self.engine_ranks + (self.kv or 0) / self.kv_ranks)

    @property
    def trainer(self) -> int:
        """Bytes of one trainer rank, activations aside."""
        return self.trainer_weights + self.gradients + self.optimizer + self.reference + self.buckets


def model_size(config: Config, *, planned: bool = False) -> ModelSize:
    """Read the facts of the run's model; raise `ConfigError` for one that is not there or not complete.

    `planned`: a `config.json` without any weight file beside it is enough.
    """
    name, model = config.model.path, config.model
    if not name.startswith(PREFIX):
        return _size_of_directory(Path(name).expanduser().absolute(), planned=planned)
    recipe, folder = plan_model(name, target_reward=model.warm_start_reward, seed=config.run.seed)
    return _size_of_directory(folder) if is_built(folder) else _size_of_recipe(recipe)


def plan(config: Config, size: ModelSize) -> Plan:
    """Return the memory that a run of this config will take with this model."""
    trainer, rollout, count = config.trainer, config.rollout, size.parameters
    held, updated = rank_parameters(config, size)
    compute, engine = _BYTES[trainer.dtype], _BYTES[rollout.dtype]
    slots = rollout.max_total_tokens
    samples = rollout.prompts_per_step * config.grpo.group_size
    tokens = samples * (PROMPT_TOKENS + rollout.max_new_tokens)
    routing = size.spec.routing_bytes(tokens) if config.routing.capture else 0
    ranks = max(1, math.ceil(rollout.gpus_per_worker))
    return Plan(
        parameters=count,
        trainer_weights=compute * held,
        # Megatron's DDP reduces gradients in fp32; AdamW keeps two fp32 moments, and fp32 weights beside bf16 ones.
        gradients=4 * held,
        optimizer=(8 if compute == 4 else 12) * updated,
        reference=compute * held if config.grpo.kl_coef > 0 else 0,
        engine_weights=engine * count,
        kv=slots and slots * size.spec.num_layers * 2 * size.arch.groups * size.arch.head_dim * engine,
        # SGLang's host buffer: int32 for every KV slot, layer (dense ones too) and choice.
        capture=slots and slots * size.spec.num_layers * size.spec.top_k * 4 * config.routing.capture,
        routing_per_token=size.spec.routing_bytes(1) if config.routing.capture else 0,
        samples_per_step=samples,
        tokens_per_step=tokens,
        routing_per_step=routing,
        object_store=(0 if streams_weights(config) else 2 * engine * count) + routing + tokens * _TOKEN_BYTES,
        engine_ranks=ranks,
        # Beyond the number of key-value heads SGLang keeps copies of them.
        kv_ranks=min(ranks, size.arch.groups),
        buckets=bucket_bytes(config),
    )


def streams_weights(config: Config) -> bool:
    """Tell whether weights go to the engines in buckets and not as a whole set through the object store.

    See `r3.weights.choose`, which knows the GPUs; two engines may share one only where each takes a part of it.
    """
    rollout, wanted = config.rollout, config.weights.transport
    if wanted != "auto":
        return wanted != "object_store"
    apart = rollout.workers == 1 or rollout.gpus_per_worker >= 1
    # Of the engines, ours in process alone is known to take buckets before it has been started.
    return rollout.engine == "sglang" and rollout.gpus_per_worker > 0 and config.trainer.gpus_per_process > 0 and apart


def bucket_bytes(config: Config) -> int:
    """Return the bytes that weights on their way to the engines take on a trainer's GPU.

    Two buckets, and where other ranks hold shards two batches of them. On a CPU only what is written takes memory.
    """
    trainer = config.trainer
    if not trainer.gpus_per_process or not streams_weights(config):
        return 0
    sharded = trainer.tensor_parallel * trainer.pipeline_parallel * trainer.expert_parallel * trainer.expert_tensor > 1
    return (4 if sharded else 2) * config.weights.bucket_mib * 2**20


def rank_parameters(config: Config, size: ModelSize) -> tuple[int, int]:
    """Return how many parameters a trainer rank holds, and of how many it keeps the optimizer's state.

    The mean over ranks: the first and last pipeline stage also hold the embeddings, which are spread evenly here.
    """
    trainer, spec = config.trainer, size.spec
    experts = len(spec.moe_layers) * spec.num_experts * 3 * spec.hidden_size * size.arch.expert_ffn_size
    dense_parts = trainer.tensor_parallel * trainer.pipeline_parallel
    expert_parts = trainer.expert_tensor * trainer.expert_parallel * trainer.pipeline_parallel
    held = math.ceil((size.parameters - experts) / dense_parts + experts / expert_parts)
    if not trainer.distributed_optimizer:
        return held, held
    return held, math.ceil(size.parameters / trainer.processes)


def render(config: Config, size: ModelSize, found: Plan) -> list[str]:
    """Return the plan as lines of text."""
    spec, trainer, rollout = size.spec, config.trainer, config.rollout
    made = "" if size.directory else " (made on the first run; sizes are upper bounds)"
    made = made if size.counted else " (no weights there; sizes follow from config.json)"
    dtype = "uint8" if spec.num_experts <= 256 else "uint16"
    kv = "as much as rollout.mem_fraction leaves" if found.kv is None else human(found.kv)
    capture = "" if not found.capture else f", capture buffer {human(found.capture)} (host)"
    return [
        f"model {config.model.path}{made}: {found.parameters:,} parameters, {len(spec.moe_layers)} of "
        f"{spec.num_layers} layers with {spec.num_experts} experts, top-{spec.top_k}",
        f"each of {trainer.processes} trainer rank(s): {human(found.trainer)} and activations: weights "
        f"{human(found.trainer_weights)}, gradients {human(found.gradients)}, optimizer {human(found.optimizer)}"
        + (f", reference {human(found.reference)}" if found.reference else "")
        + (f", buckets {human(found.buckets)}" if found.buckets else ""),
        f"each of {rollout.workers} rollout worker(s): weights {human(found.engine_weights)}, KV {kv}{capture}",
        f"routing: {found.routing_per_token} B per token ({dtype} [{len(spec.moe_layers)}, {spec.top_k}]), at most "
        f"{human(found.routing_per_step)} per step ({found.samples_per_step} samples of {PROMPT_TOKENS} prompt and "
        f"{rollout.max_new_tokens} answer tokens)",
        f"Ray object store: {human(found.object_store)} "
        + ("(one batch)" if streams_weights(config) else "(weights of two steps, and one batch)"),
        *_render_gpus(config, found),
    ]


def human(number: int) -> str:
    """Return a byte count in the largest binary unit that leaves at least 1."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def gpu_faults(config: Config, found: Plan) -> list[str]:
    """Return what does not fit the GPUs of `run.gpu_memory_gib`; nothing where it is not stated."""
    stated, rollout, trainer = config.run.gpu_memory_gib, config.rollout, config.trainer
    if stated is None:
        return []
    sides = [
        ("rollout worker", "rollout.mem_fraction", rollout.gpus_per_worker, rollout.mem_fraction, found.engine),
        ("trainer rank", "trainer.mem_fraction", trainer.gpus_per_process, trainer.mem_fraction, found.trainer),
    ]
    return [
        f"a {side} needs {human(needed)} on each of its GPUs, {key}={fraction:g} of run.gpu_memory_gib={stated:g} are "
        f"{human(int(stated * fraction * 2**30))}; divide the model over more GPUs, or state larger ones"
        for side, key, gpus, fraction, needed in sides
        if gpus and needed > stated * fraction * 2**30
    ]


def _render_gpus(config: Config, found: Plan) -> Iterator[str]:
    stated, rollout, trainer = config.run.gpu_memory_gib, config.rollout, config.trainer
    if stated is None:
        return
    total = stated * 2**30
    if rollout.gpus_per_worker:
        room = int(total * rollout.mem_fraction)
        rest = "more KV" if found.kv is None else "the engine's activations"
        yield (
            f"a rollout GPU of {stated:g} GiB: {human(found.engine)} of {human(room)} (rollout.mem_fraction), "
            f"{human(max(0, room - found.engine))} for {rest}"
        )
    if trainer.gpus_per_process:
        room = int(total * trainer.mem_fraction)
        yield (
            f"a trainer GPU of {stated:g} GiB: {human(found.trainer)} of {human(room)} (trainer.mem_fraction), "
            f"{human(max(0, room - found.trainer))} for activations, logits and NCCL"
        )


def _size_of_directory(directory: Path, *, planned: bool = False) -> ModelSize:
    arch = Architecture.from_directory(directory)
    if planned and not any(directory.glob("*.safetensors")):
        return ModelSize(arch, shape_parameters(arch), directory, counted=False)
    return ModelSize(arch, count_parameters(directory), directory)


def shape_parameters(arch: Architecture) -> int:
    """Return the number of parameters that follow from the shapes in a `config.json`."""
    spec, hidden, width = arch.spec, arch.spec.hidden_size, arch.head_dim
    attention = 2 * hidden * width * (arch.heads + arch.groups) + (2 * width if arch.qk_norm else 0)
    layers = spec.num_layers * (attention + 2 * hidden)
    experts = len(spec.moe_layers) * spec.num_experts * (hidden + 3 * hidden * arch.expert_ffn_size)
    dense = (spec.num_layers - len(spec.moe_layers)) * 3 * hidden * arch.ffn_size
    return layers + experts + dense + ((1 if arch.tied else 2) * spec.vocab_size + 1) * hidden


def count_parameters(directory: Path) -> int:
    """Return the number of elements in a checkpoint's safetensors files, from their headers alone.

    A header is 8 bytes of little-endian length and that much JSON. Raises `ConfigError` for a file that is missing or
    shorter than its header promises.
    """
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return sum(_count_in_file(directory / name) for name in names)


def _count_in_file(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is the checkpoint complete?") from None
    except (struct.error, ValueError, OSError, MemoryError, OverflowError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from error
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    end = max((entry["data_offsets"][1] for entry in tensors), default=0)
    if size != 8 + length + end:
        raise ConfigError(f"{path} has {size} bytes, its header promises {8 + length + end}; fetch it again")
    return sum(math.prod(entry["shape"]) for entry in tensors)


def _size_of_recipe(recipe: Recipe) -> ModelSize:
    """Return the size of a built-in model before it is made; its tokenizer may turn out smaller than the recipe's."""
    config = {
        "model_type": "qwen3_moe" if recipe.experts else DENSE,
        "num_hidden_layers": recipe.layers,
        "num_experts": recipe.experts,
        "num_experts_per_tok": recipe.top_k,
        "hidden_size": recipe.hidden_size,
        "vocab_size": recipe.tokenizer_vocab,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": recipe.max_positions,
        "moe_intermediate_size": recipe.expert_size,
        "intermediate_size": recipe.dense_size,
        "rms_norm_eps": 1e-6,
    }
    arch = Architecture.from_hf_config(config, "the recipe")
    return ModelSize(arch, shape_parameters(arch), None)
