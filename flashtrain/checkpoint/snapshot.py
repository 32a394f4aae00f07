"""A copy of a run's state in host memory, as it is at one step, while training goes on.

The memory is made once, as large as what this rank writes, and used by every save. On a GPU it is
pinned, so that the copy runs at the speed of the bus. It is registered with CUDA block by block and
not taken from torch's own allocator of pinned memory, which rounds every size up to a power of two.
"""

import logging
from collections import defaultdict
from dataclasses import replace
from mmap import PAGESIZE, mmap

import torch
from torch import Tensor

from flashtrain.checkpoint.state import State
from flashtrain.checkpoint.tensors import LocalTensor

log = logging.getLogger("flashtrain.checkpoint")
BLOCK = 1 << 30  # bytes; CUDA calls of the loop wait while one is pinned, so not all in one
ALIGNMENT = 64  # bytes: a multiple of every element size
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process


class HostMemory:
    """Room for the tensors of one state that this rank writes."""

    def __init__(self, state: State, device: torch.device) -> None:
        """device: where most of the state lies; on CUDA the memory is pinned.

        Takes seconds for many GB, so do it beside training. A tensor that has no owned box needs
        no room.
        """
        self.device, self.layout = device, _layout(state)
        self.pinned: list[Tensor] = []
        self.rooms: dict[str, Tensor] = {}
        for names in _blocks(self.layout):
            places, size = [], 0
            for name in names:
                places.append(size)
                size += -(-_bytes(*self.layout[name]) // ALIGNMENT) * ALIGNMENT
            memory = _whole_pages(size)
            if device.type == "cuda":
                self._pin(memory)
            for name, at in zip(names, places, strict=True):
                shape, dtype = self.layout[name]
                room = memory[at : at + _bytes(shape, dtype)]
                self.rooms[name] = room.view(dtype).view(shape)

    @property
    def bytes(self) -> int:
        return sum(room.numel() * room.element_size() for room in self.rooms.values())

    def fits(self, state: State) -> bool:
        return self.layout == _layout(state)

    @torch.no_grad()
    def copy(self, state: State) -> State:
        """`state` as it is now, in this memory: valid until the next copy.

        Waits for the device before and after, and for nothing else.
        """
        self._synchronize()
        tensors = {}
        for name, local in state.tensors.items():
            room = self.rooms.get(name)
            if room is None:
                room = torch.empty(0, dtype=local.tensor.dtype)
            else:
                room.copy_(local.tensor, non_blocking=True)
            owned = tuple(box for box in local.boxes if box.owned)
            tensors[name] = replace(local, tensor=room, boxes=owned)
        scalars = _copy_scalars(state.scalars)
        self._synchronize()
        return State(tensors, scalars)

    def release(self) -> None:
        """Give the memory back; nothing that `copy` returned may be used any more."""
        self.rooms.clear()
        for memory in self.pinned:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self.pinned.clear()

    def _pin(self, memory: Tensor) -> None:
        torch.cuda.set_device(self.device)  # of this thread, which may be new
        memory.zero_()  # on all cores; CUDA would touch page after page on one
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE)
        if int(error) == 0:
            self.pinned.append(memory)
        else:
            log.warning(
                "CUDA cannot pin %d bytes of host memory (error %d), so saving holds training up "
                "for longer: free host memory, or set checkpoint.asynchronous=false",
                memory.numel(),
                int(error),
            )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Layout = dict[str, tuple[torch.Size, torch.dtype]]


def _layout(state: State) -> Layout:
    """Names, local shapes and dtypes of the tensors that this rank writes anything of."""
    return {
        name: (local.tensor.shape, local.tensor.dtype)
        for name, local in state.tensors.items()
        if _is_written(local)
    }


def _is_written(local: LocalTensor) -> bool:
    return any(box.owned for box in local.boxes)


def _blocks(layout: Layout) -> list[list[str]]:
    """Names that share a block of about BLOCK bytes; a larger tensor has its own."""
    blocks: list[list[str]] = []
    size = BLOCK
    for name, (shape, dtype) in layout.items():
        if size + _bytes(shape, dtype) > BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(name)
        size += _bytes(shape, dtype)
    return blocks


def _whole_pages(size: int) -> Tensor:
    """At least `size` bytes that share no page with anything: CUDA registers pages, each once.

    Mapped, so that a page begins where the storage does: `is_pinned` looks nowhere else.
    """
    pages = max(1, -(-size // PAGESIZE))
    return torch.frombuffer(mmap(-1, pages * PAGESIZE), dtype=torch.uint8)


def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _copy_scalars(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host; hundreds of counters on a device cost one copy for each kind, not one each."""
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, scalar in scalars.items():
        kinds[scalar.device, scalar.dtype].append(name)
    copied: dict[str, Tensor] = {}
    for names in kinds.values():
        values = torch.stack([scalars[name].detach() for name in names]).cpu()
        copied |= dict(zip(names, values.unbind(), strict=True))
    return {name: copied[name] for name in scalars}
