"""The layout of a run: which ranks share a layer, and which hold copies of it.

Tensor ranks are neighbours (rank = data rank x tensor + tensor rank), so that the collectives
inside every layer stay on one node's NVLink and only gradients cross nodes.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup


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
    world_size: int
    rank: int
    tensor: Axis  # ranks that share one copy of each layer
    data: Axis  # ranks that hold the same shard and see different samples


def build_mesh(tensor: int, timeout: timedelta | None = None) -> Mesh:
    """The mesh of this process group; every rank must call it, with the same arguments.

    `timeout` bounds collectives on the new groups, which do not inherit the one given to
    `init_process_group` (null: the backend's default). Raises ValueError when `tensor` does not
    divide the number of ranks.
    """
    ready = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if ready else (1, 0)
    if tensor < 1 or world % tensor:
        raise ValueError(
            f"parallel.tensor={tensor} must be at least 1 and divide the {world} processes of this "
            "run: change it or the number of processes"
        )
    replicas = world // tensor
    return Mesh(
        world,
        rank,
        tensor=_axis(
            [[d * tensor + t for t in range(tensor)] for d in range(replicas)], rank, timeout
        ),
        data=_axis(
            [[d * tensor + t for d in range(replicas)] for t in range(tensor)], rank, timeout
        ),
    )


def _axis(rows: list[list[int]], rank: int, timeout: timedelta | None) -> Axis:
    """The row that holds `rank`. Creating a group is a collective, so all ranks make all rows."""
    size = len(rows[0])
    if size == 1:
        return SINGLE
    if len(rows) == 1:  # the whole world: its communicator exists already
        return Axis(size, rank, dist.group.WORLD)
    own = SINGLE
    for row in rows:
        group = dist.new_group(row, timeout=timeout)
        if rank in row:
            own = Axis(size, row.index(rank), group)
    return own
