"""Which part of a whole tensor a parameter is. Plain arithmetic: no process group, no files.

Initial weights, gradient norms and checkpoints all ask this one question, so none of them depends
on how many GPUs share a layer.
"""

from dataclasses import dataclass

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
class Shard:
    shape: tuple[int, ...]  # of the whole tensor
    pieces: tuple[Piece, ...]


def shard_of(parameter: Tensor) -> Shard:
    """What a parallel plan noted on `parameter.shard`, else: the whole tensor, owned."""
    noted: Shard | None = getattr(parameter, "shard", None)
    return noted or whole(parameter.shape)


def whole(shape: torch.Size | tuple[int, ...], owned: bool = True) -> Shard:
    length = shape[0] if shape else 1
    return Shard(tuple(shape), (Piece(0, 0, 0, length, owned),))


def owned_rows(parameter: Tensor, tensor: Tensor | None = None) -> list[Tensor]:
    """Views of `tensor` (default: the parameter itself; else of its shape) that this rank owns."""
    tensor = parameter if tensor is None else tensor
    if tensor.dim() == 0:
        return [tensor] if shard_of(parameter).pieces[0].owned else []
    return [
        tensor.narrow(piece.dim, piece.local, piece.length)
        for piece in shard_of(parameter).pieces
        if piece.owned
    ]
