"""Buckets of weights on their way: order, bounded memory, handles that another process opens, checksums, groups."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from r3.config import Config  # noqa: E402
from r3.errors import ConfigError, EngineError  # noqa: E402
from r3.rollout.engines.sglang_weights import _Handle, _payload  # noqa: E402
from r3.rollout.gpus import visible_gpus  # noqa: E402
from r3.rollout.sglang_plugin.weights import difference  # noqa: E402
from r3.trainer.broadcast import SendGroup, within  # noqa: E402
from r3.trainer.outlet import WeightOutlet  # noqa: E402
from r3.trainer.stream import Bucket, BucketStream, give_up, handle  # noqa: E402
from r3.weights import MemoryHandle, Site, WeightPart, choose  # noqa: E402
from r3.weightsum import weight_checksum  # noqa: E402

CPU = torch.device("cpu")
SHAPES = ((3, 5), (40,), (7, 2), (2, 2, 2), (1,), (10,))


def tensors(taken: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(SHAPES):
        if taken is not None:
            taken.append(f"w{number}")
        yield f"w{number}", torch.randn(shape, generator=generator)


def stream(bucket_bytes: int = 80, dtype: torch.dtype = torch.float32, shared: bool = False) -> BucketStream:
    return BucketStream(tensors(), dtype, bucket_bytes, CPU, shared=shared)


def contents(bucket: Bucket) -> dict[str, torch.Tensor]:
    return {
        slot.name: bucket.flat[slot.begin : slot.end].view(getattr(torch, slot.dtype)).reshape(slot.shape)
        for slot in bucket.slots
    }


def every(source: BucketStream) -> list[Bucket]:
    found = [source.fill(-1)]
    while not found[-1].last:
        found.append(source.fill(found[-1].number - 1))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_hold_every_tensor_once_in_order(dtype: torch.dtype) -> None:
    buckets = every(stream(dtype=dtype))
    found = {name: tensor for bucket in buckets for name, tensor in contents(bucket).items()}

    assert [bucket.number for bucket in buckets] == list(range(len(buckets)))
    assert [bucket.last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
    assert list(found) == [name for name, _ in tensors()]
    for name, tensor in tensors():
        assert torch.equal(found[name], tensor.to(dtype))


def test_a_larger_tensor_has_a_bucket_of_its_own() -> None:
    assert [[slot.name for slot in bucket.slots] for bucket in every(stream())] == [
        ["w0"], ["w1"], ["w2"], ["w3", "w4", "w5"],
    ]  # fmt: skip


def test_a_third_bucket_waits_until_the_first_was_read() -> None:
    source = stream()
    first, second = source.fill(-1), source.fill(-1)
    with pytest.raises(EngineError, match=r"buckets \[0, 1\] of the weights are still being read"):
        source.fill(-1)
    assert source.fill(first.number).number == second.number + 1
    assert source.live == 2
    assert source.extra_bytes == 80 + 160, "the second one is larger than a bucket"


def test_nothing_is_gathered_ahead_of_the_bucket_that_is_filled() -> None:
    taken: list[str] = []
    source = BucketStream(tensors(taken), torch.float32, 80, CPU)
    assert taken == ["w0"]
    source.fill(-1)
    assert taken == ["w0", "w1"], "one tensor tells that the bucket is full"
    source.drain()
    assert (taken, source.live) == ([f"w{i}" for i in range(len(SHAPES))], 0)
    with pytest.raises(EngineError, match="have been handed out"):
        source.fill(-1)


READER = """
import pickle, sys
import torch
flat = pickle.load(sys.stdin.buffer)["flattened_tensor"]
sys.stdout.write(str(flat.view(torch.int32).sum().item()) + "\\n")
sys.stdout.flush()
sys.stdin.buffer.read()
sys.stdout.write(str(flat.view(torch.int32).sum().item()))
"""


def test_another_process_opens_a_bucket_by_its_handle_and_keeps_it() -> None:
    source = stream(shared=True)
    bucket = source.fill(-1)
    name = Path("/dev/shm") / handle(bucket).facts[1].decode().lstrip("/")  # a handle that nobody opens
    payload = _payload(_Handle(handle(bucket), len(bucket.flat)), [])
    sent = str(bucket.flat.view(torch.int32).sum().item())

    with subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(payload)
        reader.stdin.flush()
        assert reader.stdout.readline().decode().strip() == sent
        assert name.exists()
        del bucket
        source.release(0)
        source.fill(0)  # would overwrite what it reads, if it took the same memory
        reader.stdin.close()
        assert reader.stdout.read().decode() == sent


def outlet(bucket_mib: int = 1) -> WeightOutlet:
    config = Config.model_validate({"rollout": {"dtype": "float32"}, "weights": {"bucket_mib": bucket_mib}})
    large = [(f"w{number}", torch.full((2**18,), float(number))) for number in range(4)]
    return WeightOutlet(config, lambda: iter(large), lambda: 1, CPU)


def file_of(part: WeightPart) -> Path:
    return Path("/dev/shm") / bytes(part.handles[0].facts[1]).decode().lstrip("/")  # type: ignore[arg-type]


def test_nothing_is_left_of_an_abandoned_stream_whose_reader_died() -> None:
    sender = outlet()
    sender.open(shared=True)
    parts = [sender.fill(-1, 3), sender.fill(-1, 3)]
    read = pickle.loads(_payload(_Handle(parts[0].handles[1], parts[0].nbytes), []))["flattened_tensor"]
    assert all(file_of(part).exists() for part in parts)
    # The second bucket was filled ahead. Of the first, one reader has died; two live, and one has yet to open it.
    sender.abandon(0, [0])
    assert [file_of(part).exists() for part in parts] == [True, False]
    del read
    assert file_of(parts[0]).exists(), "one reader is to come"
    last = pickle.loads(_payload(_Handle(parts[0].handles[2], parts[0].nbytes), []))["flattened_tensor"]
    assert last.view(torch.float32).unique().tolist() == [0.0]
    del last
    assert not file_of(parts[0]).exists()


def test_counts_on_a_gpu_are_taken_back_by_what_the_handle_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        torch.UntypedStorage, "_release_ipc_counter", lambda *one, device: given.append((*one, device)), raising=False
    )
    flat = SimpleNamespace(is_cuda=True, device="gpu")
    facts = (b"memory", 4096, 512, b"counter", 3, b"event", True)
    give_up(SimpleNamespace(flat=flat), MemoryHandle("uuid", facts))  # type: ignore[arg-type]
    assert given == [(b"counter", 3, "gpu")]


class Shown(pickle.Unpickler):
    """Gives the arguments of torch's function for CUDA handles by their names, instead of calling it."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name != "rebuild_cuda_tensor":
            return found
        return lambda *given: inspect.signature(found).bind(*given).arguments


def test_a_handle_of_a_gpu_becomes_the_arguments_that_torch_takes_with_the_uuid_for_the_device() -> None:
    # What `UntypedStorage._share_cuda_` returns behind the device, in its order.
    facts = (b"memory", 4096, 512, b"counter", 3, b"event", True)
    payload = _payload(_Handle(MemoryHandle("uuid", facts), 80), [])
    given = Shown(io.BytesIO(payload)).load()["flattened_tensor"]

    assert list(given).index("storage_device") == 6, "where SGLang looks for a UUID"
    shown = {key: given[key] for key in given if not isinstance(given[key], type)}
    assert shown == {
        "tensor_size": (80,), "tensor_stride": (1,), "tensor_offset": 0, "dtype": torch.uint8,
        "storage_device": "uuid", "storage_handle": b"memory", "storage_size_bytes": 4096,
        "storage_offset_bytes": 512, "requires_grad": False, "ref_counter_handle": b"counter",
        "ref_counter_offset": 3, "event_handle": b"event", "event_sync_required": True,
    }  # fmt: skip


class Driver:
    """The CUDA driver with two GPUs."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 10 + index
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        uuid._obj[:] = [device.value] * 16
        return 0


def test_gpus_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3.rollout.gpus.ctypes.CDLL", lambda name: Driver())
    assert visible_gpus() == ("0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a", "0b0b0b0b-0b0b-0b0b-0b0b-0b0b0b0b0b0b")
    monkeypatch.setattr(Driver, "cuInit", lambda *_: 100)
    with pytest.raises(EngineError, match="answers cuInit with error 100"):
        visible_gpus()


def test_the_checksum_sees_every_byte_and_its_place() -> None:
    flat = torch.arange(251, dtype=torch.int32).repeat(9).to(torch.uint8)[:2047]
    found = {int(weight_checksum(flat))}
    for place in (0, 1, 1000, 2043, 2044, 2046):
        changed = flat.clone()
        changed[place] ^= 1
        found.add(int(weight_checksum(changed)))
    swapped = flat.clone()
    swapped[:4], swapped[4:8] = flat[4:8], flat[:4]
    found |= {int(weight_checksum(swapped)), int(weight_checksum(flat[:-1])), int(weight_checksum(flat[4:]))}
    zeros = torch.zeros(8, dtype=torch.uint8)
    assert int(weight_checksum(zeros)) != int(weight_checksum(zeros[:4]))
    assert len(found) == 10


def test_the_checksum_is_the_sum_that_it_says_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randint(0, 256, (43,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("r3.weightsum._CHUNK", 4)
    words = flat[:40].view(torch.int32).tolist()
    total = 43
    for begin in range(0, 10, 4):
        part = sum(word * place for place, word in enumerate(words[begin : begin + 4], start=1))
        total = total * 6364136223846793005 + part
    total = total * 6364136223846793005 + sum(byte * place for place, byte in enumerate(flat[40:].tolist(), start=1))
    assert int(weight_checksum(flat)) % 2**64 == total % 2**64


def test_a_changed_or_lost_bucket_is_named() -> None:
    assert difference([1, 2, 3], [1, 2, 3], 7) == ""
    assert "bucket 1 of 3 of version 7 has checksum 0x5, 0x2 was sent" in difference([1, 5, 3], [1, 2, 3], 7)
    assert "2 of 3 buckets of version 7 arrived" in difference([1, 2], [1, 2, 3], 7)


def test_engines_that_do_not_join_are_a_named_error() -> None:
    group = SendGroup("r3-test", 2, "127.0.0.1", 1.0, CPU)
    assert (group.facts.backend, group.facts.world) == ("gloo", 2)
    with pytest.raises(EngineError, match=r"not all 1 engine ranks joined .* within 1 s \(weights.timeout_s\)"):
        group.join()
    group.close(abort=True)


def test_engines_that_never_meet_a_broadcast_are_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    group, end = SendGroup("r3-test", 3, "127.0.0.1", 0.2, CPU), threading.Event()
    group.facts = replace(group.facts, backend="nccl")
    monkeypatch.setattr("r3.trainer.broadcast.dist.broadcast", lambda *_, **__: end.wait())
    with pytest.raises(EngineError, match=r"not all 2 engine ranks met .* r3-test within 0.2 s \(weights.timeout_s\)"):
        group.send(torch.zeros(8, dtype=torch.uint8))
    end.set()


def test_what_a_bounded_call_returns_or_raises_comes_out() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_torch_does_not_end_the_process_of_this_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []
    monkeypatch.delenv(name, raising=False)

    def made(*_: Any, **__: Any) -> Any:
        seen.append(os.environ.get(name))
        raise RuntimeError("enough")

    monkeypatch.setattr("r3.trainer.broadcast.distributed_c10d._new_process_group_helper", made)
    for wanted in (None, "2"):
        if wanted:
            monkeypatch.setenv(name, wanted)
        with pytest.raises(EngineError, match="enough"):
            SendGroup("r3-test", 2, "127.0.0.1", 1.0, CPU).join()
        assert os.environ.get(name) == wanted
    assert seen == ["0", "2"]


GPU_A, GPU_B, GPU_C, HOST = Site("n1", ("a",)), Site("n1", ("b",)), Site("n1", ("c",)), Site("n1")


@pytest.mark.parametrize(
    ("wanted", "trainer", "engines", "ways"),
    [
        ("auto", HOST, [HOST], ("object_store",)),
        ("auto", GPU_A, [HOST], ("object_store",)),
        ("auto", GPU_A, [GPU_A], ("ipc",)),
        ("auto", GPU_A, [GPU_B, GPU_C], ("broadcast", "broadcast")),
        ("auto", GPU_A, [GPU_B, GPU_B], ("object_store", "object_store")),
        ("auto", GPU_A, [Site("n1", ("b", "a")), GPU_B], ("ipc", "broadcast")),
        ("ipc", HOST, [HOST], ("ipc",)),
        ("broadcast", HOST, [HOST, Site("n2")], ("broadcast", "broadcast")),
        ("object_store", GPU_A, [GPU_A], ("object_store",)),
    ],
)
def test_the_way_follows_the_device(wanted: str, trainer: Site, engines: Sequence[Site], ways: tuple[str, ...]) -> None:
    found, reason = choose(wanted, trainer, engines)
    assert found == ways
    assert reason


@pytest.mark.parametrize(
    ("wanted", "trainer", "engine", "message"),
    [
        ("ipc", HOST, Site("n2"), "worker 0 does not share the host"),
        ("ipc", GPU_A, GPU_B, "worker 0 does not share GPU a"),
        ("broadcast", GPU_A, GPU_A, "NCCL takes a GPU once"),
        ("broadcast", GPU_A, HOST, "not both on a GPU"),
    ],
)
def test_a_way_that_cannot_be_had_is_refused(wanted: str, trainer: Site, engine: Site, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(wanted, trainer, [engine])


def test_engines_on_one_gpu_cannot_be_reached_by_a_broadcast() -> None:
    with pytest.raises(ConfigError, match=r"engines share a GPU with each other.*gpus_per_worker=1"):
        choose("broadcast", GPU_A, [GPU_B, GPU_B])


JOINER = """
import sys
import torch
import torch.distributed as dist
from tests.streamed_engine import joined
from r3.weights import BroadcastGroup
group = joined(BroadcastGroup("r3-test", "127.0.0.1", int(sys.argv[1]), 2, "gloo"), 1)
for _ in range(int(sys.argv[2])):
    flat = torch.empty(64, dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=group)
    print(int(flat.sum()), flush=True)
"""


def joiner(port: int, buckets: int) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", JOINER, str(port), str(buckets)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})


def test_a_group_sends_in_order_and_names_a_peer_that_is_gone() -> None:
    group = SendGroup("r3-test", 2, "127.0.0.1", 60.0, CPU)
    with joiner(group.facts.port, 2) as engine:
        group.join()
        for value in (1, 2):
            group.send(torch.full((64,), value, dtype=torch.uint8))
        assert engine.stdout is not None
        assert engine.stdout.read().split() == [b"64", b"128"]
    with pytest.raises(EngineError, match="the broadcast of weights failed"):
        group.send(torch.zeros(64, dtype=torch.uint8))
    group.close(abort=True)
