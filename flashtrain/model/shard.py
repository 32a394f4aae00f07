"""Which part of a whole tensor a parameter is. Plain arithmetic: no process group, no files.

Initial weights, gradient norms and checkpoints all ask this one question, so none of them depends
on how many GPUs share a layer.

Two cuts stand behind each other. Tensor parallelism gives a rank slabs of the whole (`Piece`), laid
side by side in one tensor. Sharded data parallelism (FSDP, ZeRO) cuts that tensor again, into runs
of consecutive values of its row-major order (`Span`). `Shard.boxes` says what both together leave.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows `[local, local + length)` of a shard are rows `[start, start + length)` of the whole."""

    dim: int
    local: int
    start: int
    length: int
    owned: bool  # one rank owns each row of the whole: it counts it in norms and writes it


@dataclass(frozen=True)
class Span:
    """Values `[first, first + count)` of a shard of this shape, in row-major order."""

    shape: tuple[int, ...]
    first: int
    count: int
    owned: bool = True  # False where another rank holds the same span and owns it


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor, and where its values lie in what this rank holds."""

    at: int  # number of its first value in the held memory
    strides: tuple[int, ...]  # in the held memory, in values
    start: tuple[int, ...]  # of the box in the whole
    shape: tuple[int, ...]
    owned: bool

    def view(self, held: Tensor) -> Tensor:
        """The box of `held`, contiguous memory of this rank's values in order; writes through."""
        if not held.is_contiguous():
            raise ValueError(f"a tensor with strides {held.stride()} has no boxes: copy it first")
        return held.as_strided(self.shape, self.strides, held.storage_offset() + self.at)


@dataclass(frozen=True)
class Shard:
    shape: tuple[int, ...]  # of the whole tensor
    pieces: tuple[Piece, ...]
    span: Span | None = None  # null: every value of the pieces is here

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the whole that this rank holds, in the order of their memory, all of which
        they fill; none is empty."""
        return tuple(_boxes(self))


def shard_of(parameter: Tensor) -> Shard:
    """What a parallel plan noted on `parameter.shard`, else: the whole tensor, owned."""
    noted: Shard | None = getattr(parameter, "shard", None)
    return noted or whole(parameter.shape)


def whole(shape: torch.Size | tuple[int, ...], owned: bool = True) -> Shard:
    length = shape[0] if shape else 1
    return Shard(tuple(shape), (Piece(0, 0, 0, length, owned),))


def _boxes(shard: Shard) -> list[Box]:
    if not shard.shape:  # a 0-dim tensor: whole or, of an empty span, not here
        span, owned = shard.span, shard.pieces[0].owned
        count = 1 if span is None else span.count
        return [Box(0, (), (), (), owned and (span is None or span.owned))] if count else []
    local_shape = _local_shape(shard)
    strides = tuple(prod(local_shape[dim + 1 :]) for dim in range(len(local_shape)))
    span = shard.span or Span(local_shape, 0, prod(local_shape))
    found = []
    for low, high in _runs(span, strides):
        for piece in shard.pieces:
            start, end = list(low), list(high)
            start[piece.dim] = max(low[piece.dim], piece.local)
            end[piece.dim] = min(high[piece.dim], piece.local + piece.length)
            shape = tuple(e - s for s, e in zip(start, end, strict=True))
            if min(shape) <= 0:
                continue
            at = sum(s * stride for s, stride in zip(start, strides, strict=True)) - span.first
            start[piece.dim] += piece.start - piece.local
            found.append(Box(at, strides, tuple(start), shape, piece.owned and span.owned))
    return found


def _local_shape(shard: Shard) -> tuple[int, ...]:
    """Of the tensor that the pieces make, before a span is cut from it."""
    if shard.span is not None:
        return shard.span.shape
    shape = list(shard.shape)
    dim = shard.pieces[0].dim
    shape[dim] = max(piece.local + piece.length for piece in shard.pieces)
    return tuple(shape)


def _runs(
    span: Span, strides: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(low, high) corners of boxes that fill a span: a matrix has a broken row, whole ones, and a
    broken row."""
    end = span.first + span.count
    cuts = {span.first, end}
    for stride in strides[:-1]:  # where whole rows, whole matrices, .. begin and end inside
        if stride:
            first, last = -(-span.first // stride) * stride, end // stride * stride
            cuts |= {first, last} if first <= last else set()
    for begin, stop in pairwise(sorted(cuts)):
        yield (
            _corner(begin, span, strides),
            tuple(at + 1 for at in _corner(stop - 1, span, strides)),
        )


def _corner(number: int, span: Span, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Where a value lies, by its number in row-major order."""
    return tuple(number // step % size for step, size in zip(strides, span.shape, strict=True))


def held(tensor: Tensor) -> Tensor:
    """This rank's memory of a tensor: its local part where it is a DTensor, else itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def owned_rows(parameter: Tensor, tensor: Tensor | None = None) -> list[Tensor]:
    """Views of `tensor` (default: the parameter itself; else of its shape) that this rank owns, or
    all of it as it is."""
    memory = held(parameter if tensor is None else tensor)
    if memory.numel() == 0:
        return []
    noted: Shard | None = getattr(parameter, "shard", None)
    if noted is None or all(box.owned for box in noted.boxes):
        return [memory]
    return [box.view(memory) for box in noted.boxes if box.owned]
