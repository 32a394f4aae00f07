"""A kernel call as a value: made without a GPU, so that tests can compile it or emulate it.

Triton takes 25 to 30 microseconds to describe, bind and look up a call of these kernels in Python.
A Launch does that once for tensors of one set of shapes and strides, and then only puts the
addresses of the tensors at hand in their places; restart.py has how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.hopper.restart import record

ALIGNMENT = 16  # bytes: the copy engine's rule for addresses and strides
GLUON_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}
OPTIONS = {"num_warps": 4}  # of the compiler
Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Pointer:
    """The address of a tensor, or None where there is none."""

    name: str


@dataclass(frozen=True)
class Blocks:
    """A tensor seen through the copy engine, which moves blocks of this shape."""

    name: str
    block: tuple[int, ...]


@dataclass
class Launch:
    """One kernel, its grid, and its arguments in order; Pointer and Blocks stand for tensors."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    again: Callable[[Tensors], None] | None = None  # the call after the first

    def bind(self, tensors: Tensors) -> dict[str, Any]:
        """The arguments for these tensors, which differ from call to call in address only."""
        bound = dict(self.arguments)
        for name, argument in self.arguments.items():
            if type(argument) is Pointer:
                bound[name] = tensors[argument.name]
            elif type(argument) is Blocks:
                tensor = tensors[argument.name]
                assert tensor is not None
                bound[name] = descriptor(tensor, argument.block)
        return bound

    def run(self, tensors: Tensors) -> None:
        """Start the kernel on the current stream of the current device, always the same device."""
        if self.again is not None:
            self.again(tensors)
            return
        bound = self.bind(tensors)
        assert list(bound) == self.kernel.arg_names
        compiled = self.kernel[self.grid](**bound, **OPTIONS)

        def whole(tensors: Tensors) -> None:
            compiled[self.grid](*self.bind(tensors).values())

        kinds = self.arguments.values()
        pointers = [x.name for x in kinds if type(x) is Pointer and tensors[x.name] is not None]
        blocks = [(x.name, partial(descriptor, block=x.block)) for x in kinds if type(x) is Blocks]
        self.again = record(compiled, self.grid, list(bound.values()), pointers, blocks, whole)


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Blocks of `tensor`; what lies outside of it reads as zero and is not written."""
    # a dimension of size 1 may have any stride in PyTorch, but not in a descriptor
    strides = [
        step if size > 1 else ALIGNMENT
        for step, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    ]
    layout = shared_layout(block, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], list(block), layout)


@cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The swizzle with which the copy engine writes a block and the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_TYPES[dtype])


def misaligned(strides: tuple[int, ...], sizes: tuple[int, ...], itemsize: int) -> bool:
    """Whether the copy engine refuses these strides: it wants multiples of 16 bytes, none zero."""
    steps = [step for step, size in zip(strides[:-1], sizes[:-1], strict=True) if size > 1]
    return strides[-1] != 1 or any(step <= 0 or step * itemsize % ALIGNMENT for step in steps)


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous and aligned, else a copy that is."""
    if tensor.data_ptr() % ALIGNMENT or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def copyable(tensor: Tensor) -> Tensor:
    """The tensor itself where the copy engine can read it, else a contiguous copy."""
    strides, sizes = tensor.stride(), tensor.shape
    if tensor.data_ptr() % ALIGNMENT or misaligned(strides, sizes, tensor.itemsize):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor
