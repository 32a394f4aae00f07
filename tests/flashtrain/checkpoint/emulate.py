"""Tensor ranks without processes: a tiny model cut by hand, and peers that are threads."""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.checkpoint import Peers, collect, save
from flashtrain.model.shard import Piece, Shard

HEADS = 4  # of size 2: qkv is [q 8 | k 8 | v 8] rows


class Tiny(nn.Module):
    """Every way tensor parallelism cuts: rows, columns, three row blocks, replicated, tied."""

    def __init__(self, ranks: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16 // ranks, 6)
        self.qkv = nn.Linear(6, 24 // ranks, bias=False)
        self.out = nn.Linear(8 // ranks, 6, bias=True)
        self.temperature = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 16 // ranks, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embedding(tokens)).chunk(3, -1)
        return self.head(self.out(q * k + v) * self.temperature)


def shard(ranks: int, rank: int) -> Tiny:
    """Rank `rank`'s part of Tiny, with other values in it, `parameter.shard` set."""
    model = Tiny(ranks)
    if ranks == 1:
        return model
    rows, heads = 16 // ranks, 8 // ranks
    shards = {
        model.embedding.weight: Shard((16, 6), (Piece(0, 0, rank * rows, rows, True),)),
        model.qkv.weight: Shard(
            (24, 6),
            tuple(Piece(0, i * heads, i * 8 + rank * heads, heads, True) for i in range(3)),
        ),
        model.out.weight: Shard((6, 8), (Piece(1, 0, rank * heads, heads, True),)),
        model.out.bias: Shard((6,), (Piece(0, 0, 0, 6, rank == 0),)),
        model.temperature: Shard((), (Piece(0, 0, 0, 1, rank == 0),)),
    }
    for parameter, noted in shards.items():
        parameter.shard = noted  # type: ignore[attr-defined]
    return model


def trained(seed: int = 0, steps: int = 2, **kwargs: Any) -> tuple[Tiny, torch.optim.AdamW]:
    """A whole model after a few steps of AdamW, so that moments and counters are not zero."""
    torch.manual_seed(seed)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **kwargs)
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(16)
    nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
    optimizer.step()
    optimizer.zero_grad()


def cut(parameter: Tensor, whole: Tensor) -> Tensor:
    """The rows or columns of `whole` that a sharded parameter stands for."""
    noted = getattr(parameter, "shard", None)
    if noted is None or parameter.dim() == 0:
        return whole
    parts = [whole.narrow(p.dim, p.start, p.length) for p in noted.pieces]
    return torch.cat(parts, noted.pieces[0].dim)


class Hub:
    """Where the threads of one emulated group leave their values."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size


class ThreadPeers(Peers):
    def __init__(self, hub: Hub, rank: int) -> None:
        super().__init__()
        self.hub, self.rank, self.size = hub, rank, len(hub.values)

    def _exchange(self, value: Any) -> list[Any]:
        self.hub.barrier.wait()
        self.hub.values[self.rank] = json.loads(json.dumps(value))
        self.hub.barrier.wait()
        return list(self.hub.values)

    def gather(self, value: Any) -> list[Any] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        return self._exchange(value)[0]


def on_threads(size: int, work: Any) -> list[Any]:
    """Results of `work(ThreadPeers)` of all ranks; an exception is the result of its rank."""
    hub, results = Hub(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadPeers(hub, rank))
        except Exception as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_whole(folder: Path, step: int, seed: int = 0, **kwargs: Any) -> Path:
    """A checkpoint of a model that has been trained with `seed`."""
    model, optimizer = trained(seed)
    return save(folder, step, collect(model, optimizer), {"tokens": step * 10}, **kwargs)
