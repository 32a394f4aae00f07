"""A step as two CUDA graphs: all its forwards and backwards, and the update of the weights.

The host then starts two things a step in place of hundreds of kernels, so no GPU waits for it. A
graph is the kernels with the addresses they were recorded with. So batches are copied to where
those of the recording lie, gradients come back at the same places, and the learning rate is a
number on the device. Micro-batches of another shape or number (data.ramp) get graphs of their own,
in place of those before: each keeps the memory of all activations and gradients.

The first steps of a shape run as they are: they compile, choose tiles, and make what is made once.

Collectives are recorded with the rest, by every rank alike: NCCL's as PyTorch starts them, DDP's
among them, and the copies and flags of peer memory (parallel/peer_memory.py). A rank that hangs in
a replay cannot say in which collective.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashtrain.config import Config, ConfigError, CudaGraph
from flashtrain.data.loader import Batch
from flashtrain.layout import no_graphs, records

log = logging.getLogger("flashtrain.engine.graph")

WARMUP = 2  # steps of each shape that are not recorded
# with DDP: it times its first 10 with events (PyTorch's notes on CUDA graphs ask for 11)
DDP_WARMUP = 11


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None: ...


# runs a function so that its kernels are recorded, not started; what it returns is filled at replay
Record = Callable[[Callable[[], Any]], tuple[Graph, Any]]


@dataclass
class Recorded:
    """The graphs for micro-batches of one number and shape."""

    batches: list[Batch]  # where the graph reads
    passes: Graph
    losses: tuple[Tensor, ...]  # where it writes
    gradients: list[tuple[nn.Parameter, Tensor]]
    update: Graph | None = None
    norm: Tensor | None = None


class Graphs:
    """Stands in for an engine's passes and update, and calls them until their graphs are there."""

    def __init__(
        self,
        passes: Callable[[list[Batch]], tuple[Tensor, ...]],
        update: Callable[[], Tensor] | None,
        parameters: Iterable[nn.Parameter],
        record: Record | None = None,
        warmup: int = WARMUP,
    ) -> None:
        """passes: from micro-batches to losses, adding to the gradients of `parameters`.

        update: from gradients to their norm; moves the weights and forgets the gradients. None
        where it cannot be recorded: then `update` here must not be called.
        """
        self.run_passes, self.run_update = passes, update
        self.parameters = list(parameters)
        self.record, self.given = record or recorder(), record
        self.warmup = warmup
        self.seen: Counter[object] = Counter()
        self.recorded: dict[object, Recorded] = {}
        self.last: Recorded | None = None  # whose gradients are there

    def passes(self, batches: list[Batch]) -> tuple[Tensor, ...]:
        self.last = None
        if any(parameter.grad is not None for parameter in self.parameters):
            return self.run_passes(batches)  # which adds to them; a graph would write over them
        key = tuple(_layout(tensor) for batch in batches for tensor in batch)
        own = self.recorded.get(key)
        if own is None:
            self._retire()
            self.seen[key] += 1
            if self.seen[key] <= self.warmup:
                return self.run_passes(batches)
            own = self.recorded[key] = self._record(batches)
        for there, batch in zip(own.batches, batches, strict=True):
            for to, tensor in zip(there, batch, strict=True):
                if to is not None and tensor is not None:
                    to.copy_(tensor, non_blocking=True)
        own.passes.replay()
        for parameter, gradient in own.gradients:
            parameter.grad = gradient
        self.last = own
        return tuple(loss.clone() for loss in own.losses)  # the next replay writes over them

    def update(self) -> Tensor:
        assert self.run_update is not None
        own = self.last
        if own is None:
            return self.run_update()
        if own.update is None:
            own.update, own.norm = self.record(self.run_update)
            for parameter, gradient in own.gradients:
                parameter.grad = gradient
        own.update.replay()
        # weights moved, which no version number shows: who keeps something made of them looks there
        torch.autograd.graph.increment_version(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        assert own.norm is not None
        return own.norm.clone()

    def _retire(self) -> None:
        """Give back what other shapes' graphs hold; a ramp does not come back to them."""
        if not self.recorded:
            return
        if self.parameters[0].is_cuda:
            torch.cuda.synchronize()  # a replay may be under way
        self.recorded.clear()
        self.record = self.given or recorder()  # memory whose graphs are gone takes no new ones

    def _record(self, batches: list[Batch]) -> Recorded:
        there = [_copy(batch) for batch in batches]
        # what is made once for each version of a weight is to be made in every replay
        torch.autograd.graph.increment_version(self.parameters)
        shapes = ", ".join(" x ".join(map(str, batch.tokens.shape)) for batch in there)
        log.info("recorded as CUDA graphs from here on: steps of %s tokens", shapes)
        graph, losses = self.record(lambda: self.run_passes(there))
        gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        return Recorded(there, graph, losses, gradients)


def _copy(batch: Batch) -> Batch:
    documents = None if batch.documents is None else batch.documents.clone()
    return Batch(batch.tokens.clone(), batch.labels.clone(), documents)


def _layout(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def recorder() -> Record:
    """For the current device. What is recorded shares memory: no two of its graphs run at once."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Any]) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        # other threads, the loader's among them, may go on using the device meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
        return graph, result

    return record


def uses_graphs(config: Config, device: torch.device) -> bool:
    """What `trainer.cuda_graph` means here; ConfigError where it is on and cannot be.

    `config` is resolved.
    """
    wanted, reason = config.trainer.cuda_graph, no_graphs(config)
    if device.type != "cuda":
        reason = "the device is not a CUDA GPU"
    if wanted is CudaGraph.on and reason is not None:
        raise ConfigError(f"trainer.cuda_graph=on: {reason}; take auto or off")
    return reason is None and records(config)
