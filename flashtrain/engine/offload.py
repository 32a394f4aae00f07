"""Block inputs in host memory between forward and backward.

With `trainer.recompute=full` a block's input is all that stays of it, [B, T, D] a layer; here that
goes to pinned host memory while later blocks run, and comes back while the backward of the block
above runs, as ZeRO-Infinity does with activation checkpoints (Rajbhandari et al. 2021,
arXiv:2104.07857). What remains on the GPU does not grow with depth: the newest inputs, which
backward needs first and which never leave, the one that is leaving or on its way back, and one more
while a block runs.

Everything is ordered by the compute stream: it waits for a copy before it lets the memory go, and a
copy back starts where the compute stream stands. So memory is reused without asking the host, which
may run ahead.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.model.gpt import GPT


def offload_inputs(model: GPT, device: torch.device, newest: int = 1) -> "Offload":
    """From now on keep the inputs of the model's blocks on the host, in place. After `compile`.

    newest: so many stay on the device, at least 1.
    """
    offload = Offload(model.config.d_model, model.embedding.dtype, device, newest)
    model.forward = functools.partial(offload.run, model.forward)  # type: ignore[method-assign]
    return offload


def pin(room: Tensor, device: torch.device) -> None:
    """Lock host memory in its place for as long as the tensor lives, so that copies from and to the
    device run by themselves. PyTorch's own pinned memory is rounded up to a power of two: of a host
    of 256 GB that could leave half."""
    error = torch.cuda.cudart().cudaHostRegister(room.data_ptr(), room.nbytes, 0)
    torch.cuda.check_error(error)
    weakref.finalize(room, _unpin, room.data_ptr(), device).atexit = False


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still be on its way
    torch.cuda.cudart().cudaHostUnregister(address)


class Entry:
    """One saved tensor: on the device, leaving it, on the host, or on its way back."""

    def __init__(self, offload: "Offload", tensor: Tensor, before: "Entry | None") -> None:
        self.offload, self.before = offload, before
        self.device: Tensor | None = tensor
        self.host: Tensor | None = None
        self.left: torch.cuda.Event | None = None
        self.came: torch.cuda.Event | None = None

    def start(self) -> None:
        """Begin to copy it to the host."""
        assert self.device is not None
        self.host = self.offload.room(self.device)
        self.left = self.offload.copy(self.offload.leaving, self.host, self.device)

    def leave(self) -> None:
        """Let go of the device's memory."""
        self.offload.wait(self.left)
        self.device = None

    def fetch(self) -> None:
        """Start to bring it back, if it is not there."""
        if self.device is None:
            assert self.host is not None
            self.device = self.host.new_empty(self.host.shape, device=self.offload.device)
            self.came = self.offload.copy(self.offload.returning, self.device, self.host)

    def take(self) -> Tensor:
        self.fetch()
        if self.before is not None:
            self.before.fetch()
        self.offload.wait(self.came)
        assert self.device is not None
        tensor, self.device = self.device, None
        return tensor

    def __del__(self) -> None:
        for moved in (self.left, self.came):  # whoever gets the memory next may write at once
            self.offload.wait(moved)
        if self.host is not None:
            self.offload.rooms.append(self.host)


class Offload:
    """Hooks on what autograd saves, and the host memory that is used again in every pass."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, stay: int) -> None:
        self.width, self.dtype, self.device, self.stay = width, dtype, device, stay
        cuda = device.type == "cuda"
        self.leaving = torch.cuda.Stream(device) if cuda else None
        self.returning = torch.cuda.Stream(device) if cuda else None
        self.rooms: list[Tensor] = []
        self.newest: Entry | None = None

    def run(self, forward: Any, *arguments: Any, **keywords: Any) -> Any:
        """`forward`, with what it saves."""
        self.newest = None
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*arguments, **keywords)
        finally:
            self.newest = None  # or what is saved would outlive its backward

    def pack(self, tensor: Tensor) -> "Tensor | Entry":
        residual = tensor.dim() == 3 and tensor.size(2) == self.width and tensor.dtype == self.dtype
        if not residual or isinstance(tensor, nn.Parameter):
            return tensor
        self.newest = entry = Entry(self, tensor, self.newest)
        older: Entry | None = entry
        for _ in range(self.stay):
            older = older.before if older is not None else None
        if older is not None:
            older.start()
            if older.before is not None:
                older.before.leave()
        return entry

    def unpack(self, saved: "Tensor | Entry") -> Tensor:
        return saved.take() if isinstance(saved, Entry) else saved

    def room(self, tensor: Tensor) -> Tensor:
        """Host memory like `tensor`, used before or new."""
        for index, room in enumerate(self.rooms):
            if room.shape == tensor.shape:
                return self.rooms.pop(index)
        room = torch.empty(tensor.shape, dtype=tensor.dtype)
        if self.device.type == "cuda":
            pin(room, self.device)
        return room

    def copy(
        self, stream: torch.cuda.Stream | None, into: Tensor, source: Tensor
    ) -> torch.cuda.Event | None:
        """Beside the compute stream, from where it stands; on a CPU at once."""
        if stream is None:
            into.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
            moved: torch.cuda.Event = stream.record_event()
        return moved

    def wait(self, moved: torch.cuda.Event | None) -> None:
        """Of the compute stream, not of the host."""
        if moved is not None:
            torch.cuda.current_stream().wait_event(moved)
