"""The transport over peer memory without a GPU: threads for ranks, one hardware queue for each.

Here every stream runs at once what it is given, in the order of the host's calls: the strictest
order a GPU can keep. So a wait for something that another rank queues later would hang, and memory
that is written too early would show in the numbers.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.parallel import peer_memory, pipelined
from flashtrain.parallel.peer_memory import PeerMemory
from flashtrain.parallel.transport import use_transport

CPU, LIMIT = torch.device("cpu"), 20


class World:
    """Memory and flags that all ranks see."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.meeting = threading.Barrier(size, timeout=LIMIT)
        self.changed = threading.Condition()
        self.memories: dict[tuple[int, int], Tensor] = {}  # by number of region and rank


class Flags:
    def __init__(self, world: World, number: int, rank: int, raised: Counter[Any]) -> None:
        self.world, self.number, self.rank, self.raised = world, number, rank, raised
        self.heard: Counter[tuple[int, int]] = Counter()

    def raise_on(self, peer: int, channel: int) -> None:
        with self.world.changed:
            self.raised[self.number, self.rank, peer, channel] += 1
            self.world.changed.notify_all()

    def wait(self, peer: int, channel: int) -> None:
        self.heard[peer, channel] += 1
        key, enough = (self.number, peer, self.rank, channel), self.heard[peer, channel]
        with self.world.changed:
            told = self.world.changed.wait_for(lambda: self.raised[key] >= enough, LIMIT)
        assert told, f"rank {self.rank} waited for rank {peer}, channel {channel}, for ever"


class Region:
    raised: ClassVar[Counter[Any]] = Counter()

    def __init__(self, group: Any, device: torch.device, size: int, flags: str) -> None:
        self.size, self.used, self.world = size, False, group.world
        self.number = group.regions = group.regions + 1
        self.world.memories[self.number, group.place] = torch.full((size,), 255, dtype=torch.uint8)
        self.flags = Flags(self.world, self.number, group.place, self.raised)
        self.world.meeting.wait()

    def view(self, rank: int, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = self.world.memories[self.number, rank].view(dtype)
        return values[at : at + torch.Size(shape).numel()].view(shape)


class Stream:
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
    monkeypatch.setattr(pipelined, "SMALLEST", 1)
    Region.raised = Counter()
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
            y = pipelined.gather_linear(x, weight, None, size, name)
            assert_close(y, whole @ weight.T)
            dx, dw = torch.autograd.grad(y, (x, weight), ys[rank])
            terms = sum(ys[s] @ weights[s] for s in range(size))
            assert_close(dx, terms.view_as(xs)[rank])
            assert_close(dw, ys[rank].flatten(0, 1).T @ whole.flatten(0, 1))

            y, down = ys[rank].clone().requires_grad_(), downs[rank].clone().requires_grad_()
            z = pipelined.linear_scatter(y, down, size, name)
            terms = sum(ys[s] @ downs[s].T for s in range(size))
            assert_close(z, terms.view_as(xs)[rank])
            dy, ddown = torch.autograd.grad(z, (y, down), xs[rank])
            assert_close(dy, whole @ down)
            assert_close(ddown, whole.flatten(0, 1).T @ ys[rank].flatten(0, 1))

    on_threads(size, check)
