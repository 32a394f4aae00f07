"""The transport over peer memory without a GPU: threads for ranks, one hardware queue for each.

Here every stream runs at once what it is given, in the order of the host's calls: the strictest
order a GPU can keep. So a wait for something that another rank queues later would hang, memory that
is written too early would show in the numbers, and a flag raised before the last time was heard is
an error.
"""

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.parallel import peer_memory, pipelined
from flashtrain.parallel.peer_memory import PeerMemory, StreamFlags
from flashtrain.parallel.transport import transport_of, use_transport

CPU, LIMIT = torch.device("cpu"), 20
TOLD_TWICE, FOR_EVER = 1, 2  # errors of the driver


class World:
    """Memory and flags that all ranks see."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.meeting = threading.Barrier(size, timeout=LIMIT)
        self.memories: dict[tuple[int, int], Tensor] = {}  # by number of region and rank
        self.pads: dict[tuple[int, int], Tensor] = {}


class Driver:
    """The two calls of libcuda.so, on the host's memory and at once."""

    changed = threading.Condition()

    def __init__(self, name: str) -> None:
        self.cuStreamWriteValue32_v2 = Call(self.write)
        self.cuStreamBatchMemOp_v2 = Call(self.batch)

    def write(self, stream: int, address: int, value: int, how: int) -> int:
        word = ctypes.c_uint32.from_address(address)
        with self.changed:
            # one that nobody has waited for yet would be lost
            if word.value == value:
                return TOLD_TWICE
            word.value = value
            self.changed.notify_all()
        return 0

    def batch(self, stream: int, count: int, operations: Any, how: int) -> int:
        for operation in operations[:count]:
            word = ctypes.c_uint32.from_address(operation.address)
            if operation.kind == peer_memory.WRITE_VALUE:
                with self.changed:
                    word.value = operation.value
                continue
            assert (operation.kind, operation.how) == (peer_memory.WAIT_VALUE, peer_memory.EQUAL)
            with self.changed:
                told = self.changed.wait_for(lambda: word.value == operation.value, LIMIT)  # noqa: B023
            if not told:
                return FOR_EVER
        return 0


class Call:
    def __init__(self, function: Callable[..., int]) -> None:
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *arguments: Any) -> int:
        return self.function(*arguments)


class Region:
    def __init__(self, group: Any, device: torch.device, size: int, flags: str) -> None:
        self.size, self.used, self.world = size, False, group.world
        self.number = group.regions = group.regions + 1
        here = self.number, group.place
        self.world.memories[here] = torch.full((size,), 255, dtype=torch.uint8)
        self.world.pads[here] = torch.zeros(1024, dtype=torch.int32)
        self.world.meeting.wait()
        ranks = range(self.world.size)
        pads = [self.world.pads[self.number, rank].data_ptr() for rank in ranks]
        self.flags = StreamFlags(
            SimpleNamespace(signal_pad_ptrs=pads, rank=group.place, world_size=self.world.size)
        )

    def view(self, rank: int, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = self.world.memories[self.number, rank].view(dtype)
        return values[at : at + torch.Size(shape).numel()].view(shape)


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> None: ...


@pytest.fixture
def one_queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda = SimpleNamespace(
        Stream=lambda *_args, **_keywords: Stream(),
        current_stream=Stream,
        stream=lambda _stream: contextlib.nullcontext(),
        synchronize=lambda _device: None,
        Event=object,
    )
    together = SimpleNamespace(barrier=lambda group: group.world.meeting.wait())
    monkeypatch.setattr(peer_memory, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(peer_memory, "dist", together)
    monkeypatch.setattr(peer_memory, "Region", Region)
    monkeypatch.setattr(peer_memory.ctypes, "CDLL", Driver)
    monkeypatch.setattr(pipelined, "SMALLEST", 1)
    return None


def on_threads(size: int, check: Callable[[int], None]) -> None:
    """Run `check(rank)` for every rank at the same time; fails with the first one's error."""
    errors: list[BaseException] = []
    world = World(size)

    def main(rank: int) -> None:
        try:
            place = SimpleNamespace(rank=lambda: rank, size=lambda: size)
            place.world, place.place, place.regions = world, rank, 0
            use_transport(f"rank {rank}", PeerMemory(place, CPU))  # type: ignore[arg-type]
            check(rank)
        except BaseException as error:
            errors.append(error)
            world.meeting.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_products_over_peer_memory(
    size: int, chunks: int, one_queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelined, "CHUNKS", chunks)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    B, part, wide, narrow = 2, 4, 5, 3
    # small, then larger: the memory grows; then small again
    cases = []
    for scale in (1, 2, 1):
        xs, weights = random(size, B, scale * part, wide), random(size, narrow, wide)
        ys, downs = random(size, B, scale * part * size, narrow), random(size, wide, narrow)
        cases.append((xs, weights, ys, downs))

    def check(rank: int) -> None:
        name = f"rank {rank}"
        for xs, weights, ys, downs in cases:
            whole = xs.view(B, -1, wide)
            x, weight = xs[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
            y = pipelined.gather_linear(x, weight.detach(), weight, None, size, name)
            assert_close(y, whole @ weight.T)
            dx, dw = torch.autograd.grad(y, (x, weight), ys[rank])
            terms = sum(ys[s] @ weights[s] for s in range(size))
            assert_close(dx, terms.view_as(xs)[rank])
            assert_close(dw, ys[rank].flatten(0, 1).T @ whole.flatten(0, 1))

            y, down = ys[rank].clone().requires_grad_(), downs[rank].clone().requires_grad_()
            z = pipelined.linear_scatter(y, down.detach(), down, size, name)
            terms = sum(ys[s] @ downs[s].T for s in range(size))
            assert_close(z, terms.view_as(xs)[rank])
            dy, ddown = torch.autograd.grad(z, (y, down), xs[rank])
            assert_close(dy, whole @ down)
            assert_close(ddown, whole.flatten(0, 1).T @ ys[rank].flatten(0, 1))

    on_threads(size, check)


def test_memory_that_a_graph_may_hold_outlives_growth(one_queue: None) -> None:
    def check(rank: int) -> None:
        transport = transport_of(f"rank {rank}")
        assert isinstance(transport, PeerMemory)
        small = weakref.ref(transport.region("gather", 64))
        assert transport.region("gather", 128).size == 128
        assert small() is not None

    on_threads(2, check)
