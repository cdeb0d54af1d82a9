"""What crosses a process seam: frozen dataclasses of numpy arrays and plain values, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r3.audit import Alarm
from r3.errors import ConfigError, RoutingError
from r3.prefixes import BlockRows, StoredRows
from r3.routing import ExpertIds, Provenance, RoutingTrace, Span, TokenIds, checksum, expert_dtype
from r3.tokens import TokenReport

Finish = Literal["stop", "length", "abort"]
WeightVersion = int
# The model type of the one dense family that is supported, as a control.
DENSE = "qwen3"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The facts of a checkpoint that engine and trainer must agree on.

    `moe_layers`: global index of every layer that has a router, ascending. A dense Qwen3, the control of a
    Mixture-of-Experts model, has none, 0 experts and a top-k of 0. `fingerprint`: sha256 over all other fields; it
    travels with every trajectory.
    """

    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """Hex digest (16 digits) over all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelSpec:
        """Read `config.json` of a Hugging Face checkpoint directory; raise `ConfigError` when it is not a known MoE."""
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist; model.path must be a Hugging Face checkpoint directory"
            ) from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        return cls.from_hf_config(config, source=str(path))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, object], source: str = "config.json") -> ModelSpec:
        """Derive the spec from a Hugging Face `config.json`; raise `ConfigError` unless Qwen3(-MoE) or Mixtral."""
        model_type = config.get("model_type")
        if model_type not in ("qwen3_moe", "mixtral", DENSE):
            raise ConfigError(
                f"{source}: model_type is {model_type!r}; supported: 'qwen3_moe', 'mixtral', and as a dense control "
                f"without routing {DENSE!r}"
            )

        def integer(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if not isinstance(value, int):
                raise ConfigError(f"{source}: {key} is {value!r}; an integer is required")
            return value

        num_layers = integer("num_hidden_layers")
        if model_type == DENSE:
            return cls(DENSE, num_layers, (), 0, 0, integer("hidden_size"), integer("vocab_size"))
        # Every layer of a Mixtral is an MoE layer, whatever keys of other models its config carries.
        sparse_step = integer("decoder_sparse_step", 1) if model_type == "qwen3_moe" else 1
        dense = (config.get("mlp_only_layers") or []) if model_type == "qwen3_moe" else []
        if not isinstance(dense, list):
            raise ConfigError(f"{source}: mlp_only_layers is {dense!r}; a list is required")
        # Mixtral and Transformers 5 say `num_local_experts`; published Qwen3-MoE checkpoints say `num_experts`.
        num_experts = integer("num_local_experts" if "num_local_experts" in config else "num_experts")
        moe_layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % sparse_step == 0)
        if not moe_layers or num_experts < 1:
            raise ConfigError(f"{source} has no MoE layer; router replay needs a Mixture-of-Experts model")
        return cls(
            model_type=model_type,
            num_layers=num_layers,
            moe_layers=moe_layers,
            num_experts=num_experts,
            top_k=integer("num_experts_per_tok"),
            hidden_size=integer("hidden_size"),
            vocab_size=integer("vocab_size"),
        )

    def routing_bytes(self, tokens: int) -> int:
        """Bytes of routing record for `tokens` rows."""
        return tokens * len(self.moe_layers) * self.top_k * expert_dtype(max(self.num_experts, 1)).itemsize

    def require_routers(self, model: str) -> None:
        """Raise `ConfigError` for a dense model, which has no routing to capture."""
        if not self.moe_layers:
            raise ConfigError(
                f"model {model} is dense: there is no routing to capture; name a Mixture-of-Experts model, or run it "
                "as a control with routing.capture=false replay.mode=none"
            )

    def require_same(self, other: ModelSpec, ours: str, theirs: str) -> None:
        """Raise `ConfigError` that lists every differing field unless `other` describes the same model."""
        mine, yours = asdict(self), asdict(other)
        differing = [f"{key}: {ours} {mine[key]!r}, {theirs} {yours[key]!r}" for key in mine if mine[key] != yours[key]]
        if differing:
            raise ConfigError(f"{ours} and {theirs} hold different models ({'; '.join(differing)})")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `payload` is the task's own entry as JSON, which its verifier may need."""

    index: int
    text: str
    answer: str
    payload: str = ""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled answer with everything that training needs of it.

    `tokens`: int32 `[S]`, prompt and response through the stop token. `logprobs`: float32 `[S - prompt_len]`, nats, of
    the distribution that was sampled (temperature applied). `group`: index of the prompt within the step; `member`: of
    the sample within the group. `routing` is None for evaluation, which is never trained on.
    """

    group: int
    member: int
    tokens: TokenIds
    prompt_len: int
    logprobs: NDArray[np.float32]
    routing: RoutingTrace | None
    reward: float
    finish: Finish
    weight_version: WeightVersion
    fingerprint: str

    @property
    def response_len(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - self.prompt_len


class SampleFacts(NamedTuple):
    """What the driver keeps of a trajectory; the heavy part stays in the object store."""

    group: int
    member: int
    reward: float
    finish: Finish
    prompt_tokens: int
    response_tokens: int
    weight_version: WeightVersion


@dataclass(frozen=True, slots=True)
class RoutingBlock:
    """The records of a `Batch` in a few MoE layers, an object of its own in the object store.

    `layers`: global index of each; `rows` `[rows, layers, k]` in the order of the batch, prompt rows of a group once;
    `crc32` uint32 `[n]` over each trajectory's rows of this block and its tokens.

    A block of all layers has an array of each trajectory's rows, which is the record as the engine left it: pickle
    (protocol 5) hands it to the object store as a buffer of its own, and the copy into that store is the only one. Some
    layers of a record do not lie together, so a block of them is one array into which they are copied.
    """

    layers: tuple[int, ...]
    rows: BlockRows
    crc32: NDArray[np.uint32]

    @property
    def stored(self) -> list[ExpertIds]:
        """The arrays that have rows."""
        arrays = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return [array for array in arrays if array is not None and len(array)]

    @property
    def nbytes(self) -> int:
        """Bytes of routing in it."""
        return sum(int(array.nbytes) for array in self.stored)


@dataclass(frozen=True, slots=True)
class Record:
    """One trajectory's routing record as far as it is at hand: its `spans`, and a view per block of layers."""

    spans: tuple[Span, ...]
    blocks: tuple[RoutingTrace, ...]

    def joined(self, tokens: TokenIds) -> RoutingTrace | None:
        """Return a copy in which the blocks are one again, None without any; raise `RoutingError` for a wrong one."""
        if len(self.blocks) < 2:
            return self.blocks[0] if self.blocks else None
        for block in self.blocks:
            block.verify(tokens)
        experts = np.concatenate([block.experts for block in self.blocks], axis=1)
        experts.flags.writeable = False
        layers = tuple(layer for block in self.blocks for layer in block.layers)
        return replace(self.blocks[0], experts=experts, layers=layers, crc32=checksum(experts, tokens))


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories of one rollout call, packed into flat arrays with offset tables: a few large buffers.

    `tokens` int32 `[sum S]` with `token_offsets` int64 `[n + 1]`; `logprobs` float32 `[sum (S - prompt_len)]`
    with `logprob_offsets`; `spans` of each record. The rows themselves are in `blocks`, all or some: they travel as
    objects of their own, so that a pipeline stage fetches only its layers. `stored` says where in them: prompt rows
    that a group shares are there once. Ray maps the arrays read-only into every reader on the node.
    """

    tokens: TokenIds
    token_offsets: NDArray[np.int64]
    prompt_lens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    logprob_offsets: NDArray[np.int64]
    rewards: NDArray[np.float32]
    groups: NDArray[np.int32]
    members: NDArray[np.int32]
    finishes: tuple[Finish, ...]
    weight_versions: NDArray[np.int32]
    fingerprint: str
    stored: StoredRows
    spans: tuple[tuple[Span, ...], ...]
    num_experts: int
    engine: str
    provenance: Provenance
    blocks: tuple[RoutingBlock, ...]

    @classmethod
    def pack(cls, trajectories: Sequence[Trajectory], block_layers: int | None = None) -> Batch:
        """Pack trajectories of one model and engine, records in blocks of `block_layers` MoE layers (default: all).

        Blocks of all layers view the records that they are made of, which must not change any more. Raises
        `RoutingError` when records do not fit together, and for one that is wrong before it is cut.
        """
        traces = [t.routing for t in trajectories if t.routing is not None]
        kinds = {(r.layers, r.num_experts, r.top_k, r.engine, r.provenance) for r in traces}
        if len(kinds) > 1 or len({t.fingerprint for t in trajectories}) > 1:
            raise RoutingError(
                f"trajectories of different models or engines cannot be packed together: {sorted(kinds)}"
            )
        layers, num_experts, _, engine, provenance = kinds.pop() if kinds else ((), 1, 0, "", "unknown")
        stored = StoredRows.of(
            [t.routing.experts if t.routing else None for t in trajectories],
            [t.group for t in trajectories],
            [t.prompt_len for t in trajectories],
        )
        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *(t.tokens for t in trajectories)]),
            token_offsets=_offsets([len(t.tokens) for t in trajectories]),
            prompt_lens=np.array([t.prompt_len for t in trajectories], dtype=np.int32),
            logprobs=np.concatenate([np.empty(0, np.float32), *(t.logprobs for t in trajectories)]),
            logprob_offsets=_offsets([t.response_len for t in trajectories]),
            rewards=np.array([t.reward for t in trajectories], dtype=np.float32),
            groups=np.array([t.group for t in trajectories], dtype=np.int32),
            members=np.array([t.member for t in trajectories], dtype=np.int32),
            finishes=tuple(t.finish for t in trajectories),
            weight_versions=np.array([t.weight_version for t in trajectories], dtype=np.int32),
            fingerprint=trajectories[0].fingerprint if trajectories else "",
            stored=stored,
            spans=tuple(t.routing.spans if t.routing else () for t in trajectories),
            num_experts=num_experts,
            engine=engine,
            provenance=provenance,
            blocks=_split(trajectories, stored, layer_blocks(layers, block_layers)),
        )

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def routing_bytes(self) -> int:
        """Bytes of routing in the blocks."""
        return sum(block.nbytes for block in self.blocks)

    def record(self, i: int) -> Record | None:
        """Return the record of trajectory `i`, None when it has none.

        Its arrays are those of the blocks, or copies where it shares prompt rows with an earlier one and has others.
        """
        if not self.stored.count(i):
            return None
        rows = [self.stored.take(i, block.rows) for block in self.blocks]
        return self._record(i, rows, [int(block.crc32[i]) for block in self.blocks])

    def records(self) -> tuple[Record | None, ...]:
        """Return the record of every trajectory, as `record` does one by one; with short ones that takes longer."""
        rows = [self.stored.all(block.rows) for block in self.blocks]
        sums = [block.crc32.tolist() for block in self.blocks]
        return tuple(
            self._record(i, [part[i] for part in rows], [part[i] for part in sums]) if count else None
            for i, count in enumerate(self.stored.counts.tolist())
        )

    def _record(self, i: int, rows: Sequence[ExpertIds | None], sums: Sequence[int]) -> Record:
        spans = self.spans[i]
        blocks = []
        for block, experts, crc32 in zip(self.blocks, rows, sums, strict=True):
            assert experts is not None
            trace = RoutingTrace(experts, block.layers, self.num_experts, spans, self.engine, self.provenance, crc32)
            blocks.append(trace)
        return Record(spans, tuple(blocks))

    def sample(self, i: int) -> Trajectory:
        """Return trajectory `i` without its record, as views into the packed arrays."""
        begin, end = self.token_offsets[i : i + 2].tolist()
        first, last = self.logprob_offsets[i : i + 2].tolist()
        return Trajectory(
            group=int(self.groups[i]),
            member=int(self.members[i]),
            tokens=self.tokens[begin:end],
            prompt_len=int(self.prompt_lens[i]),
            logprobs=self.logprobs[first:last],
            routing=None,
            reward=float(self.rewards[i]),
            finish=self.finishes[i],
            weight_version=int(self.weight_versions[i]),
            fingerprint=self.fingerprint,
        )

    def trajectory(self, i: int) -> Trajectory:
        """Return trajectory `i` with its record of the layers at hand: a view of one block, a copy of several."""
        sample, record = self.sample(i), self.record(i)
        return sample if record is None else replace(sample, routing=record.joined(sample.tokens))

    def trajectories(self) -> list[Trajectory]:
        """Return every trajectory with its record; see `trajectory`."""
        return [self.trajectory(i) for i in range(len(self))]

    def facts(self) -> tuple[SampleFacts, ...]:
        """Return the small facts that the driver keeps, in packing order."""
        return tuple(
            SampleFacts(t.group, t.member, t.reward, t.finish, t.prompt_len, t.response_len, t.weight_version)
            for t in map(self.sample, range(len(self)))
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step reports: scalars under the keys of docs/metrics.md, and the version of the new weights.

    `alarms`: what the audit found, where `routing.on_alarm` only warns. `loads` int64 `[layers, experts]`: how often
    the records of the step chose each expert, zeros without a record. `tokens`: in steps that look at single tokens.
    """

    step: int
    weight_version: WeightVersion
    metrics: Mapping[str, float]
    alarms: tuple[Alarm, ...] = ()
    loads: NDArray[np.int64] | None = None
    tokens: TokenReport | None = None


def layer_blocks(layers: Sequence[int], size: int | None) -> tuple[tuple[int, ...], ...]:
    """Cut MoE layers into blocks of `size` (None: one of all); the last one may be smaller."""
    size = size or len(layers)
    return tuple(tuple(layers[begin : begin + size]) for begin in range(0, len(layers), size or 1))


def _split(
    trajectories: Sequence[Trajectory], stored: StoredRows, blocks: Sequence[tuple[int, ...]]
) -> tuple[RoutingBlock, ...]:
    """Pack the records block by block; checksums of parts are new, so the whole record is verified before."""
    captured = [(t.routing, t.tokens) for t in trajectories if t.routing is not None]
    if len(blocks) > 1:
        for trace, tokens in captured:
            trace.verify(tokens)
    made, begin = [], 0
    for layers in blocks:
        columns = slice(begin, begin + len(layers))
        crc32 = [
            0 if t.routing is None
            else t.routing.crc32 if len(blocks) == 1
            else checksum(t.routing.experts[:, columns], t.tokens)
            for t in trajectories
        ]  # fmt: skip
        own = [
            None if t.routing is None else t.routing.experts[shared:, columns]
            for t, shared in zip(trajectories, stored.shared[:, 1].tolist(), strict=True)
        ]
        rows = _as_they_lie(own) if len(blocks) == 1 else np.concatenate([part for part in own if part is not None])
        made.append(RoutingBlock(layers, rows, np.array(crc32, dtype=np.uint32)))
        begin = columns.stop
    return tuple(made)


def _as_they_lie(records: Sequence[ExpertIds | None]) -> tuple[ExpertIds | None, ...]:
    """Return views of the rows that nobody can write to; a copy of an array that is not contiguous."""
    kept = []
    for rows in records:
        view = None
        if rows is not None and len(rows):
            view = np.ascontiguousarray(rows).view()
            view.flags.writeable = False
        kept.append(view)
    return tuple(kept)


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
