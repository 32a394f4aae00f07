"""Transport over NVLink: copy engines move the parts, so that products keep every multiprocessor.

Memory that all GPUs of a group see comes from `torch.distributed._symmetric_memory`. Two regions of
it, each grown to the largest use so far:

    gather  [n, m, K]: rank r pushes its x into row r on every other GPU; products read from there
    ring    [n - 1, chunks, rows, N]: a rank computes partial sums into its own, the next rank pulls

Copies run on streams of their own, between flags that say "these bytes have arrived" and "this
memory may be written again". A flag is a 32-bit word on the GPU that waits for it:

    stream  the front end of a stream writes and waits (cuStreamWriteValue32, cuStreamBatchMemOp):
            no multiprocessor is needed, so a flag passes while a product fills the GPU
    kernel  PyTorch's own one-block kernels (put_signal, wait_signal)

A flag is 1 from when it is raised until it is waited for, which makes it 0 again: the same values
each time, so that a CUDA graph which holds them can be replayed. It is never raised twice in
between: a sender waits for READ before it raises ARRIVED again, a reader the other way round.

No deadlock, even if streams shared one hardware queue: whatever a wait is for, its rank has queued
before any wait of its own that comes later in the same order of calls.
"""

import ctypes
import socket
import zlib
from math import prod
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flashtrain.parallel.transport import others

WAIT_VALUE, WRITE_VALUE, EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_.._VALUE_32, CU_STREAM_WAIT_VALUE_EQ
READ, ARRIVED = 0, 1  # channels of flags: the memory may be written again; chunk 0, 1, .. is there


def peers_missing(group: ProcessGroup, device: torch.device) -> str:
    """Why the ranks of a group cannot see each other's memory; empty where they can. Collective,
    and the same answer on all of them."""
    if device.type != "cuda":
        return f"{device.type} has no memory that other ranks see"
    host = zlib.crc32(socket.gethostname().encode())
    places = torch.empty(group.size(), 2, dtype=torch.int64, device=device)
    own = torch.tensor([[host, device.index]], dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(places, own, group=group)
    hosts, indices = places.T.tolist()
    if len(set(hosts)) > 1:
        return f"its ranks are on {len(set(hosts))} hosts"
    if len(set(indices)) < len(indices):
        return "each process sees its own GPU only (CUDA_VISIBLE_DEVICES)"
    alone = [i for i in indices if i != device.index and not _sees(device.index, i)]
    blind = torch.tensor(len(alone), device=device)
    dist.all_reduce(blind, group=group)
    return f"{int(blind)} pairs of its GPUs have no peer access" if blind else ""


def _sees(device: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(device, other)


class Flags(Protocol):
    def raise_on(self, peer: int, channel: int) -> None:
        """On the current stream: tell `peer`."""
        ...

    def wait(self, peer: int, channel: int) -> None:
        """On the current stream: wait until `peer` has told, and be ready for the next time."""
        ...


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, a union of 48 bytes, for a 32-bit value waited for or written."""

    _fields_: ClassVar = [
        ("kind", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("how", ctypes.c_uint32),
        ("unused", ctypes.c_uint64 * 2),
    ]


class StreamFlags:
    def __init__(self, handle: Any) -> None:
        self.pads, self.rank, self.size = handle.signal_pad_ptrs, handle.rank, handle.world_size
        driver = ctypes.CDLL("libcuda.so.1")
        self.write, self.batch = driver.cuStreamWriteValue32_v2, driver.cuStreamBatchMemOp_v2
        self.write.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self.batch.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
        self.waits: dict[int, ctypes.Array[_Operation]] = {}  # by the address of the flag

    def raise_on(self, peer: int, channel: int) -> None:
        word = self.pads[peer] + 4 * (channel * self.size + self.rank)
        self._on_stream(self.write, word, 1, 0)

    def wait(self, peer: int, channel: int) -> None:
        word = self.pads[self.rank] + 4 * (channel * self.size + peer)
        if word not in self.waits:
            heard = _Operation(WAIT_VALUE, word, 1, EQUAL), _Operation(WRITE_VALUE, word, 0, 0)
            self.waits[word] = (_Operation * 2)(*heard)
        self._on_stream(self.batch, 2, self.waits[word], 0)

    def _on_stream(self, call: Any, *arguments: Any) -> None:
        error = call(torch.cuda.current_stream().cuda_stream, *arguments)
        if error:
            raise RuntimeError(f"CUDA driver error {error} in {call.__name__}")


class KernelFlags:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def raise_on(self, peer: int, channel: int) -> None:
        self.handle.put_signal(peer, channel)

    def wait(self, peer: int, channel: int) -> None:
        self.handle.wait_signal(peer, channel)


FLAGS: dict[str, type[StreamFlags | KernelFlags]] = {"stream": StreamFlags, "kernel": KernelFlags}


class Region:
    """Memory of the same size on every rank of a group, and flags beside it. Collective."""

    def __init__(self, group: ProcessGroup, device: torch.device, size: int, flags: str) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.size = size
        self.memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.memory, group)
        self.flags: Flags = FLAGS[flags](self.handle)
        self.views: dict[tuple[Any, ...], Tensor] = {}
        self.used = False  # before the first use nobody has to be waited for
        dist.barrier(group=group)

    def view(self, rank: int, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`shape` of `dtype` in the memory of `rank`, from element `at` on."""
        key = (rank, at, shape, dtype)
        if key not in self.views:
            self.views[key] = self.handle.get_buffer(rank, shape, dtype, at)
        return self.views[key]


class PeerMemory:
    """`Transport` between the GPUs of a group that see each other's memory."""

    def __init__(self, group: ProcessGroup, device: torch.device, flags: str = "stream") -> None:
        self.group, self.device, self.kind = group, device, flags
        self.rank, self.size = group.rank(), group.size()
        self.regions: dict[str, Region] = {}
        # CUDA graphs hold addresses in them, and evaluations may need more than the steps recorded
        self.outgrown: list[Region] = []
        # small things on these go before the blocks of a product that have not started
        self.pushing = torch.cuda.Stream(device, priority=-1)
        self.pulling = torch.cuda.Stream(device, priority=-1)

    def region(self, name: str, size: int) -> Region:
        """At least `size` bytes. Collective where it grows, as all ranks ask for the same."""
        if name not in self.regions or self.regions[name].size < size:
            torch.cuda.synchronize(self.device)  # the old one is no longer written or read ..
            dist.barrier(group=self.group)  # .. on any rank
            self.outgrown += [self.regions[name]] if name in self.regions else []
            self.regions[name] = Region(self.group, self.device, size, self.kind)
        return self.regions[name]

    def gather(self, x: Tensor, chunks: int, whole: bool = False) -> "_PeerGathering":
        return _PeerGathering(self, x, chunks, whole)

    def ring(self, chunks: int, into: Tensor) -> "_PeerRing":
        return _PeerRing(self, chunks, into)


class _PeerGathering:
    def __init__(self, transport: PeerMemory, x: Tensor, chunks: int, whole: bool) -> None:
        self.rank, self.size, self.chunks = transport.rank, transport.size, chunks
        self.rows, self.width, self.dtype = x.size(0) // chunks, x.size(1), x.dtype
        self.region = transport.region("gather", self.size * x.nbytes)
        self.main = torch.cuda.current_stream()
        self.awaited = {(s, c) for s in others(self.rank, self.size) for c in range(chunks)}
        pushing, flags = transport.pushing, self.region.flags
        pushing.wait_stream(self.main)
        with torch.cuda.stream(pushing):
            # the rank that takes this one's part first gets it first
            for other in reversed(others(self.rank, self.size)):
                if self.region.used:
                    flags.wait(other, READ)
                for chunk, part in enumerate(x.chunk(chunks)):
                    self._part(other, self.rank, chunk).copy_(part)
                    flags.raise_on(other, ARRIVED + chunk)
            if whole:
                for chunk, part in enumerate(x.chunk(chunks)):
                    self._part(self.rank, self.rank, chunk).copy_(part)
        self.pushed = pushing.record_event()
        self.region.used = True

    def _part(self, where: int, sender: int, chunk: int) -> Tensor:
        at = (sender * self.chunks + chunk) * self.rows * self.width
        return self.region.view(where, at, (self.rows, self.width), self.dtype)

    def take(self, rank: int, chunk: int) -> Tensor:
        if (rank, chunk) in self.awaited:
            self.awaited.remove((rank, chunk))
            self.region.flags.wait(rank, ARRIVED + chunk)
        return self._part(self.rank, rank, chunk)

    def whole(self) -> Tensor:
        for rank, chunk in sorted(self.awaited):
            self.take(rank, chunk)
        self.main.wait_event(self.pushed)  # the own part was copied behind the others'
        shape = (self.size * self.chunks * self.rows, self.width)
        return self.region.view(self.rank, 0, shape, self.dtype)

    def release(self) -> None:
        self.whole()  # and the memory of x may be used again
        for other in others(self.rank, self.size):
            self.region.flags.raise_on(other, READ)


class _PeerRing:
    def __init__(self, transport: PeerMemory, chunks: int, into: Tensor) -> None:
        rank, size = transport.rank, transport.size
        self.rank, self.next, self.previous = rank, (rank + 1) % size, (rank - 1) % size
        self.chunks, self.dtype = chunks, into.dtype
        self.shape = (into.size(0) // chunks, into.size(1))
        self.region = transport.region("ring", (size - 1) * into.nbytes)
        self.pulling, self.main = transport.pulling, torch.cuda.current_stream()
        if self.region.used:
            self.region.flags.wait(self.next, READ)
        self.region.used = True
        # what is pulled goes to memory that earlier work of this stream may still use
        self.pulling.wait_stream(self.main)
        self.events: dict[tuple[int, int], torch.cuda.Event] = {}

    def _place(self, where: int, step: int, chunk: int) -> Tensor:
        at = (step * self.chunks + chunk) * prod(self.shape)
        return self.region.view(where, at, self.shape, self.dtype)

    def place(self, step: int, chunk: int) -> Tensor:
        return self._place(self.rank, step, chunk)

    def send(self, step: int, chunk: int) -> None:
        self.region.flags.raise_on(self.next, ARRIVED + step * self.chunks + chunk)

    def receive(self, step: int, chunk: int, into: Tensor) -> None:
        with torch.cuda.stream(self.pulling):
            self.region.flags.wait(self.previous, ARRIVED + step * self.chunks + chunk)
            into.copy_(self._place(self.previous, step, chunk))
            self.events[step, chunk] = self.pulling.record_event()

    def arrived(self, step: int, chunk: int) -> None:
        self.main.wait_event(self.events.pop((step, chunk)))

    def release(self) -> None:
        with torch.cuda.stream(self.pulling):
            self.region.flags.raise_on(self.previous, READ)
        self.main.wait_stream(self.pulling)  # nothing to wait for, but graphs end on one stream
