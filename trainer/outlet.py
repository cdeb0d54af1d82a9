"""One trainer rank's part in streaming weights: rank 0 fills buckets and sends them, the others send it their parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from r3.config import Config
from r3.errors import EngineError
from r3.trainer.broadcast import SendGroup
from r3.trainer.stream import Bucket, BucketStream, gpu_uuid
from r3.weights import BroadcastGroup, SentWeights, WeightPart

Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class WeightOutlet:
    """Weights of one rank on their way to engines.

    `export`: begins a collective walk over the named tensors of the model, which only rank 0 gets to see; `version`: of
    the weights that it yields; `gathering`: most bytes that the walk itself holds on rank 0. `r3.sync` calls, on rank
    0, `open`, then `fill` and `send` in turn, then `close`, and meanwhile `send_parts` on the others.
    """

    def __init__(
        self,
        config: Config,
        export: Export,
        version: Callable[[], int],
        device: torch.device,
        gathering: Callable[[], int] = lambda: 0,
    ) -> None:
        self._config, self._export, self._version, self._device = config, export, version, device
        self._gathering = gathering
        self._stream: BucketStream | None = None
        self._bucket: Bucket | None = None
        self._group: SendGroup | None = None
        self._send_s = 0.0

    def gpus(self) -> tuple[str, ...]:
        """Return the UUID of this rank's GPU, nothing on a CPU."""
        return (gpu_uuid(self._device),) if self._device.type == "cuda" else ()

    def open(self, shared: bool) -> int:
        """Begin a stream and return the version of its weights; `shared`: its buckets will be opened by others."""
        weights = self._config.weights
        self._send_s = 0.0
        self._stream = BucketStream(
            self._export(),
            getattr(torch, self._config.rollout.dtype),
            weights.bucket_mib * 2**20,
            self._device,
            shared=shared,
            verify=weights.verify,
        )
        return self._version()

    def fill(self, released: int, readers: int) -> WeightPart:
        """Free buckets up to `released`, fill the next one and return what the driver needs of it.

        `readers`: processes that will open it. The part names the broadcast group if there is one.
        """
        stream = self._opened()
        self._bucket = bucket = stream.fill(released)
        begin = time.perf_counter()
        handles = stream.share(bucket, readers)
        self._send_s += time.perf_counter() - begin
        name = self._group.facts.name if self._group else ""
        return WeightPart(bucket.number, bucket.last, bucket.slots, bucket.flat.numel(), handles, name)

    def send(self) -> None:
        """Broadcast the bucket that was filled last. Raises `EngineError`."""
        assert self._bucket is not None
        assert self._group is not None
        begin = time.perf_counter()
        self._group.send(self._bucket.flat)
        self._send_s += time.perf_counter() - begin

    def close(self) -> SentWeights:
        """Free the last buckets, which every reader has copied, and return what was sent."""
        stream, self._bucket = self._opened(), None
        stream.drain()
        self._stream = None
        return SentWeights(
            self._version(),
            tuple(stream.checksums),
            stream.nbytes,
            stream.seconds,
            self._send_s,
            stream.extra_bytes + self._gathering(),
        )

    def abandon(self, handed: int, unread: Sequence[int]) -> None:
        """End a stream that nobody new reads; harmless without one. See `BucketStream.take_back`."""
        stream, self._stream, self._bucket = self._stream, None, None
        if stream is not None:
            stream.take_back(handed, unread)
            stream.drain()

    def send_parts(self) -> None:
        """Send this rank's parts to rank 0 for one stream; of ranks other than 0."""
        for _ in self._export():
            pass

    def open_group(self, name: str, world: int, host: str) -> BroadcastGroup:
        """Open the rendezvous of a new broadcast group."""
        self._group = SendGroup(name, world, host, self._config.weights.timeout_s, self._device)
        return self._group.facts

    def join_group(self) -> None:
        """Wait for the engines in the group that was opened. Raises `EngineError`."""
        assert self._group is not None
        self._group.join()

    def close_group(self, abort: bool) -> None:
        """Leave the broadcast group, if there is one."""
        group, self._group = self._group, None
        if group is not None:
            group.close(abort=abort)

    def _opened(self) -> BucketStream:
        if self._stream is None:
            raise EngineError("no stream of weights is open")
        return self._stream
