"""How parts of a product travel between ranks while other parts are computed; and over messages.

Two patterns, which `pipelined.py` fills with products. Both are collective: every rank of the group
makes the same calls, with tensors of the same shape, in the same order.

    gather  each rank's x goes to all others, by chunks of rows; the own rows need not wait for any
    ring    partial sums travel from rank r to r + 1, each step adding that rank's term, and end
            after n - 1 steps on the rank whose rows they are

Here: what a transport is, and the one over point-to-point messages (gloo), which shows on CPUs that
the decomposition is right. `peer_memory.py` is the one for GPUs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Gathering(Protocol):
    def take(self, rank: int, chunk: int) -> Tensor:
        """Chunk `chunk` of what `rank`, another one, sent: [m / chunks, K]. Waits for it."""
        ...

    def whole(self) -> Tensor:
        """What all ranks sent, in order: [n m, K]. Waits. Only if asked for at the start."""
        ...

    def release(self) -> None:
        """Nothing is read any more. Always to be called."""
        ...


class Ring(Protocol):
    def place(self, step: int, chunk: int) -> Tensor:
        """Memory [rows, N] for the partial sum that this rank makes at `step` < n - 1."""
        ...

    def send(self, step: int, chunk: int) -> None:
        """What stands in `place(step, chunk)` goes to the next rank."""
        ...

    def receive(self, step: int, chunk: int, into: Tensor) -> None:
        """Start to bring what the previous rank sends at `step` into memory of this rank."""
        ...

    def arrived(self, step: int, chunk: int) -> None:
        """Wait for what `receive` started."""
        ...

    def release(self) -> None:
        """Nothing is sent or received any more. Always to be called."""
        ...


class Transport(Protocol):
    rank: int
    size: int

    def gather(self, x: Tensor, chunks: int, whole: bool = False) -> Gathering:
        """Start to send x [m, K], contiguous, to all ranks, and to receive theirs."""
        ...

    def ring(self, chunks: int, into: Tensor) -> Ring:
        """Ready to move partial sums of shape [into.size(0) / chunks, N]; `into` [m, N] is what
        the last step's will be received in."""
        ...


def others(rank: int, size: int) -> Sequence[int]:
    """The ranks whose parts `rank` takes, in the order in which they arrive."""
    return [(rank + step) % size for step in range(1, size)]


class MessageTransport:
    """`Transport` by sends and receives of a process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def gather(self, x: Tensor, chunks: int, whole: bool = False) -> "_MessageGathering":
        return _MessageGathering(self, x, chunks)

    def ring(self, chunks: int, into: Tensor) -> "_MessageRing":
        return _MessageRing(self, chunks, into)


class _MessageGathering:
    def __init__(self, transport: MessageTransport, x: Tensor, chunks: int) -> None:
        group, self.rank, self.size = transport.group, transport.rank, transport.size
        self.memory = x.new_empty(self.size, chunks, x.size(0) // chunks, x.size(1))
        self.memory[self.rank].view_as(x).copy_(x)
        own = self.memory[self.rank]
        self.sends: list[dist.Work] = []
        self.receives: dict[tuple[int, int], dist.Work] = {}
        for other in others(self.rank, self.size):
            for chunk in range(chunks):
                sent = dist.isend(own[chunk], group=group, group_dst=other, tag=chunk)
                room = self.memory[other, chunk]
                received = dist.irecv(room, group=group, group_src=other, tag=chunk)
                assert sent is not None and received is not None
                self.sends.append(sent)
                self.receives[other, chunk] = received

    def take(self, rank: int, chunk: int) -> Tensor:
        work = self.receives.pop((rank, chunk), None)
        if work is not None:
            work.wait()
        return self.memory[rank, chunk]

    def whole(self) -> Tensor:
        for rank, chunk in list(self.receives):
            self.take(rank, chunk)
        return self.memory.flatten(0, 2)

    def release(self) -> None:
        self.whole()
        for work in self.sends:
            work.wait()


class _MessageRing:
    TAG = 1000  # a gathering may be under way at the same time

    def __init__(self, transport: MessageTransport, chunks: int, into: Tensor) -> None:
        self.group, self.chunks, size = transport.group, chunks, transport.size
        self.next, self.previous = (transport.rank + 1) % size, (transport.rank - 1) % size
        rows = into.size(0) // chunks
        self.places = into.new_empty(size - 1, chunks, rows, into.size(1))
        self.sends: list[dist.Work] = []
        self.receives: dict[tuple[int, int], dist.Work] = {}

    def place(self, step: int, chunk: int) -> Tensor:
        return self.places[step, chunk]

    def send(self, step: int, chunk: int) -> None:
        tag = self.TAG + step * self.chunks + chunk
        work = dist.isend(self.places[step, chunk], group=self.group, group_dst=self.next, tag=tag)
        assert work is not None
        self.sends.append(work)

    def receive(self, step: int, chunk: int, into: Tensor) -> None:
        tag = self.TAG + step * self.chunks + chunk
        work = dist.irecv(into, group=self.group, group_src=self.previous, tag=tag)
        assert work is not None
        self.receives[step, chunk] = work

    def arrived(self, step: int, chunk: int) -> None:
        self.receives.pop((step, chunk)).wait()

    def release(self) -> None:
        for work in self.sends:
            work.wait()


_transports: dict[str, Transport] = {}  # by the name of the group, which is all an operator takes


def use_transport(name: str, transport: Transport) -> None:
    """From now on the pipelined products of group `name` travel this way."""
    _transports[name] = transport


def forget_transports() -> None:
    """Let go of all of them and their memory, before their groups are destroyed."""
    _transports.clear()


def transport_of(name: str) -> Transport:
    """Raises ValueError for a group without one."""
    if name not in _transports:
        raise ValueError(f"no transport for group {name!r}: call `choose_form` for its axis first")
    return _transports[name]
