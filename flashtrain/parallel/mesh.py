"""The layout of a run: which ranks share a layer, which share its storage, which hold copies of it.

rank = (((pipeline rank x replicate + replicate rank) x shard + shard rank) x context + context
rank) x tensor + tensor rank. Tensor ranks are neighbours, so that the collectives inside every
layer stay on one node's NVLink; then come those that hold parts of the same sequences, which talk
inside every attention; then those that gather weights from each other; sums of gradients go further
once a step, and the furthest way goes what is least, the hidden states between two blocks.
"""

from dataclasses import dataclass
from datetime import timedelta
from itertools import product

import torch.distributed as dist
from torch.distributed import ProcessGroup

from flashtrain.config import ParallelConfig


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh."""

    size: int
    rank: int
    group: ProcessGroup | None  # None when size is 1: there is nobody to talk to

    @property
    def name(self) -> str:
        """What the collectives call the group; ValueError on an axis of one."""
        if self.group is None:
            raise ValueError(f"an axis of {self.size} rank has no process group")
        return str(self.group.group_name)


SINGLE = Axis(size=1, rank=0, group=None)


@dataclass(frozen=True)
class Mesh:
    """Gradients are summed over context ranks as over data ranks: both see other tokens than their
    neighbours. So weights may be cut over context ranks too, or be copied."""

    world_size: int
    rank: int
    tensor: Axis  # ranks that share the arithmetic of each layer
    data: Axis  # ranks that see different samples: parallel.replicate x parallel.shard
    # ranks that each keep a part of the same weights and optimizer state, and those that keep the
    # same part; one of them counts the context ranks
    shard: Axis = SINGLE
    replicate: Axis = SINGLE
    context: Axis = SINGLE  # ranks that hold parts of the same sequences
    tokens: Axis = SINGLE  # ranks that see different tokens: data x context = replicate x shard
    pipeline: Axis = SINGLE  # ranks that hold different layers and see the same samples
    ends: Axis = SINGLE  # of those the first and the last; one of them alone on ranks in between


ALONE = Mesh(world_size=1, rank=0, tensor=SINGLE, data=SINGLE)


def build_mesh(
    tensor: int,
    timeout: timedelta | None = None,
    shard: int = 1,
    context: int = 1,
    shard_context: bool = True,
    pipeline: int = 1,
) -> Mesh:
    """The mesh of this process group, replicate = ranks / (pipeline x shard x context x tensor);
    every rank must call it, with the same arguments.

    shard_context: weights are cut over the context ranks too, else copied over them.
    `timeout` bounds collectives on the new groups, which do not inherit the one given to
    `init_process_group` (null: the backend's default). Raises ValueError when the degrees do not
    divide the number of ranks.
    """
    ready = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if ready else (1, 0)
    inner = tensor * shard * context * pipeline
    if min(tensor, shard, context, pipeline) < 1 or world % inner:
        factors = {"shard": shard, "context": context, "pipeline": pipeline}
        others = [f" x parallel.{name}={size}" for name, size in factors.items() if size != 1]
        degrees = f"parallel.tensor={tensor}" + "".join(others) + (f" = {inner}" if others else "")
        raise ValueError(
            f"{degrees} must be at least 1 and divide the {world} processes of this run: change "
            "it or the number of processes"
        )
    sizes = {
        "pipeline": pipeline,
        "replicate": world // inner,
        "shard": shard,
        "context": context,
        "tensor": tensor,
    }
    axes = _Axes(sizes, rank, timeout)
    cut, copied = ("context",) * shard_context, ("context",) * (not shard_context)
    return Mesh(
        world,
        rank,
        tensor=axes.along("tensor"),
        data=axes.along("replicate", "shard"),
        shard=axes.along("shard", *cut),
        replicate=axes.along("replicate", *copied),
        context=axes.along("context"),
        tokens=axes.along("replicate", "shard", "context"),
        pipeline=axes.along("pipeline"),
        ends=axes.ends("pipeline"),
    )


def mesh_of(parallel: ParallelConfig, timeout: timedelta | None = None) -> Mesh:
    """`build_mesh` with the degrees of a resolved config."""
    assert parallel.tensor is not None and parallel.shard is not None
    return build_mesh(
        parallel.tensor,
        timeout,
        parallel.shard,
        parallel.context,
        parallel.shard_context,
        parallel.pipeline,
    )


class _Axes:
    """Makes each group once, however many axes turn out to be the same ranks."""

    def __init__(self, sizes: dict[str, int], rank: int, timeout: timedelta | None) -> None:
        self.sizes, self.rank, self.timeout = sizes, rank, timeout
        self.made: dict[tuple[str, ...], Axis] = {}

    def along(self, *names: str) -> Axis:
        """The ranks whose places differ on these axes only. Collective."""
        names = tuple(name for name in self.sizes if name in names and self.sizes[name] > 1)
        if names not in self.made:
            self.made[names] = self._make(names)
        return self.made[names]

    def ends(self, name: str) -> Axis:
        """The first and the last rank along an axis; an axis of one elsewhere. Collective."""
        if self.sizes[name] <= 2:
            return self.along(name)
        return _axis([[row[0], row[-1]] for row in self._rows((name,))], self.rank, self.timeout)

    def _make(self, names: tuple[str, ...]) -> Axis:
        return _axis(self._rows(names), self.rank, self.timeout)

    def _rows(self, names: tuple[str, ...]) -> list[list[int]]:
        rows: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(product(*map(range, self.sizes.values()))):
            fixed = tuple(p for name, p in zip(self.sizes, place, strict=True) if name not in names)
            rows.setdefault(fixed, []).append(rank)
        return list(rows.values())


def _axis(rows: list[list[int]], rank: int, timeout: timedelta | None) -> Axis:
    """The row that holds `rank`. Creating a group is a collective, so all ranks make all rows."""
    size = len(rows[0])
    if size == 1:
        return SINGLE
    if size == dist.get_world_size():  # the communicator of all exists already
        return Axis(size, rank, dist.group.WORLD)
    own = SINGLE
    for row in rows:
        group = dist.new_group(row, timeout=timeout)
        if rank in row:
            own = Axis(size, row.index(rank), group)
    return own
