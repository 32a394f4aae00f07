"""Linear and embedding layers that hold a part of their weight: made from dense ones, and back.

Dims: B batch, T tokens, D width of the residual stream, V vocabulary, n tensor ranks. Between
layers the residual stream is split over its B T tokens, in order, and held as [B, T/n, D]: a column
layer gathers them before its product, a row layer scatters the sum after its own, so norms and
additions run on an n-th of the tokens. Scheme: Shoeybi et al. 2019, arXiv:1909.08053 section 3; the
split stream: Korthikanti et al. 2022, arXiv:2205.05198 section 4.2.2, which cuts along T alone.
"part r" below: tokens r B T / n on, an n-th of all (collectives.py).

Every parameter made here carries notes that others read: `shard` (flashtrain/model/shard.py);
`tensor_model_parallel` when ranks hold different rows; `partial_gradient` or `partial_rows` when
its gradient is a term of a sum (flashtrain/parallel/gradients.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain.model.embedding import Embedding
from flashtrain.model.linear import Linear, Product
from flashtrain.model.shard import Piece, Shard, held, shard_of, whole
from flashtrain.parallel.collectives import gather_sequence, scatter_sequence, slice_sequence
from flashtrain.parallel.mesh import Axis
from flashtrain.parallel.overlap import PLAIN, Form, gather_linear, linear_scatter
from kernels.embedding import embedding


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a dense weight that are split on their own, in units that stay whole."""

    rows: int
    unit: int = 1  # rows of one unit: the head size where rows are heads
    shared: bool = False  # where ranks outnumber units, neighbouring ranks hold the same unit


@dataclass(frozen=True)
class PartialRows:
    """Rows `[local, local + length)` of a gradient are one term of rows `[at, at + length)` of
    `total` rows that are summed over the ranks; this rank's term of the others is zero."""

    local: int
    length: int
    at: int
    total: int


def split_rows(
    parts: Sequence[Part], axis: Axis
) -> tuple[tuple[Piece, ...], tuple[PartialRows, ...]]:
    """This rank's rows of each part, in order, and which of them other ranks hold too.

    Raises ValueError when the ranks neither divide the units nor may share them evenly.
    """
    pieces, partial = [], []
    local = start = 0  # where the part begins, in the shard and in the whole
    for part in parts:
        units = part.rows // part.unit
        if units % axis.size == 0:
            length = part.rows // axis.size
            at, owned = axis.rank * length, True
        elif part.shared and axis.size % units == 0:
            length, holders = part.unit, axis.size // units
            at, owned = axis.rank // holders * length, axis.rank % holders == 0
            partial.append(PartialRows(local, length, at, part.rows))
        else:
            what = "rows" if part.unit == 1 else f"units of {part.unit} rows"
            raise ValueError(f"{units} {what} do not divide over {axis.size} tensor ranks")
        pieces.append(Piece(0, local, start + at, length, owned))
        local, start = local + length, start + part.rows
    return tuple(pieces), tuple(partial)


def shard_parameter(
    dense: Tensor, pieces: tuple[Piece, ...], partial: tuple[PartialRows, ...] = ()
) -> nn.Parameter:
    """A parameter of its own memory with these pieces of a dense one, noted; meta stays meta."""
    shape = list(dense.shape)
    shape[pieces[0].dim] = sum(piece.length for piece in pieces)
    # not torch.cat: its meta version imports the compiler, 3 s of a start on a CPU
    values = torch.empty(shape, dtype=dense.dtype, device=dense.device)
    for piece in pieces if not dense.is_meta else ():
        rows = dense.detach().narrow(piece.dim, piece.start, piece.length)
        values.narrow(piece.dim, piece.local, piece.length).copy_(rows)
    parameter = nn.Parameter(values, dense.requires_grad)
    _note(parameter, shard=Shard(tuple(dense.shape), pieces), tensor_model_parallel=True)
    if partial:
        _note(parameter, partial_rows=partial)
    return parameter


def mark_replicated(parameter: Tensor, axis: Axis) -> None:
    """Note a parameter that all ranks hold and each uses on its own tokens or heads."""
    _note(parameter, shard=whole(parameter.shape, owned=axis.rank == 0), partial_gradient=True)


def _note(parameter: Tensor, **notes: object) -> None:
    for name, value in notes.items():
        setattr(parameter, name, value)


@torch.no_grad()
def gather_whole(parameter: Tensor, axis: Axis, tensor: Tensor | None = None) -> Tensor:
    """The whole of `tensor` (default the parameter, else of its shape), on every rank.

    A collective: each rank puts the rows it owns into zeros, and the sum is exact.
    """
    memory = held(parameter if tensor is None else tensor)
    full = memory.new_zeros(shard_of(parameter).shape)
    for box in shard_of(parameter).boxes:
        if box.owned:
            place = zip(box.start, box.shape, strict=True)
            full[tuple(slice(at, at + length) for at, length in place)] = box.view(memory)
    if axis.group is not None:
        dist.all_reduce(full, group=axis.group)
    return full


class ColumnLinear(nn.Module):
    """A linear layer that holds rows W_r of its weight: each rank makes its own output features.

    forward   y_r = X W_r^T + b_r  with X = concat over s of x_s
    backward  dx_r = (sum over s of dy_s W_s)[part r];  dW_r = dy_r^T X;  db_r = sum of dy_r

    x_r [B, T/n, in], y_r [B, T, out_r], W_r [out_r, in]. `form`: how it talks (overlap.py); `fuses`
    as of flashtrain/model/linear.py.
    """

    fuses = True

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.axis = axis
        self.form: Form = PLAIN
        self.product: Product | None = None  # in place of bf16's (model/float8.py); plain form only
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_dense(cls, dense: Linear, axis: Axis, parts: Sequence[Part] = ()) -> Self:
        """Rows of `dense`, split part by part; no parts: all rows as one.

        Raises ValueError when a part does not divide over the ranks.
        """
        parts = parts or (Part(dense.out_features),)
        if sum(part.rows for part in parts) != dense.out_features:
            raise ValueError(f"parts {parts} do not add up to {dense.out_features} rows")
        pieces, partial = split_rows(parts, axis)
        weight = shard_parameter(dense.weight, pieces, partial)
        bias = None if dense.bias is None else shard_parameter(dense.bias, pieces, partial)
        return cls(weight, bias, axis)

    def to_dense(self) -> Linear:
        """The dense layer again, on every rank; a collective."""
        return _dense_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(self.arrive(x), self.weight, self.bias)
        return gather_linear(x, self.weight, self.bias, self.axis, self.form)

    def arrive(self, x: Tensor) -> Tensor:
        return gather_sequence(x, self.axis)

    def leave(self, y: Tensor) -> Tensor:
        return y


class RowLinear(nn.Module):
    """A linear layer that holds columns W_r of its weight: each rank adds its input features' term.

    forward   y_r = (sum over s of x_s W_s^T)[part r] + b
    backward  dY = concat over s of dy_s;  dx_r = dY W_r;  dW_r = dY^T x_r;
              db = sum over s and tokens of dy_s, of which each rank has its own term

    x_r [B, T, in_r], y_r [B, T/n, out], W_r [out, in_r]; b [out] is whole on every rank. `form`:
    how it talks (overlap.py); `fuses` as of flashtrain/model/linear.py.
    """

    fuses = True

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.axis = axis
        self.form: Form = PLAIN
        self.product: Product | None = None  # in place of bf16's (model/float8.py); plain form only
        self.weight = weight
        self.bias = bias

    @classmethod
    def from_dense(cls, dense: Linear, axis: Axis) -> Self:
        """Columns of `dense`; raises ValueError when they do not divide over the ranks."""
        if dense.in_features % axis.size:
            raise ValueError(
                f"{dense.in_features} columns do not divide over {axis.size} tensor ranks"
            )
        length = dense.in_features // axis.size
        piece = Piece(1, 0, axis.rank * length, length, owned=True)
        bias = None
        if dense.bias is not None:
            bias = nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
            mark_replicated(bias, axis)
        return cls(shard_parameter(dense.weight, (piece,)), bias, axis)

    def to_dense(self) -> Linear:
        """The dense layer again, on every rank; a collective."""
        return _dense_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None:
            y = self.leave(self.product(x, self.weight, None))
        else:
            y = linear_scatter(x, self.weight, self.axis, self.form)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def arrive(self, x: Tensor) -> Tensor:
        return x

    def leave(self, y: Tensor) -> Tensor:
        return scatter_sequence(y, self.axis)


def _dense_linear(layer: ColumnLinear | RowLinear) -> Linear:
    weight = gather_whole(layer.weight, layer.axis)
    with torch.device("meta"):
        dense = Linear(weight.size(1), weight.size(0))
    dense.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if layer.bias is not None:
        dense.bias = nn.Parameter(gather_whole(layer.bias, layer.axis), layer.bias.requires_grad)
    return dense


class VocabularyEmbedding(nn.Module):
    """A token table that holds rows E_r: each rank looks up its own words, zero for the others.

    forward   y_r = (sum over s of lookup(tokens, E_s))[part r], one term of which is not zero
    backward  dY = concat over s of dy_s;  dE_r[word] = sum of dY at this rank's tokens

    tokens [B, T] int64 on every rank, y_r [B, T/n, D] in the compute dtype, E_r [V/n, D].
    """

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype, axis: Axis) -> None:
        super().__init__()
        self.dtype = dtype
        self.axis = axis
        self.weight = weight

    @classmethod
    def from_dense(cls, dense: Embedding, axis: Axis) -> Self:
        """Rows of `dense`; raises ValueError when they do not divide over the ranks."""
        pieces, _ = split_rows([Part(dense.weight.size(0))], axis)
        return cls(shard_parameter(dense.weight, pieces), dense.dtype, axis)

    def to_dense(self) -> Embedding:
        """The dense table again, on every rank; a collective."""
        weight = gather_whole(self.weight, self.axis)
        with torch.device("meta"):
            dense = Embedding(weight.size(0), weight.size(1), self.dtype)
        dense.weight = nn.Parameter(weight, self.weight.requires_grad)
        return dense

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.size(0)
        # the outer ranks take words beyond the table too, and fail on them as a dense table does
        holder = (tokens // rows).clamp(0, self.axis.size - 1)
        here = holder == self.axis.rank
        # words of other ranks read rows spread over the table, not all the same one: the backward
        # adds (zeros) there, and adds to one row queue up
        local = torch.where(here, tokens - self.axis.rank * rows, tokens % rows)
        x = embedding(local, self.weight, self.dtype)
        return scatter_sequence(x.masked_fill(~here.unsqueeze(-1), 0), self.axis)

    def add(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`x_r` with its tokens' vectors added, out of those of all positions [T, D] or of all
        tokens [B, T, D]."""
        batch, vectors = x.size(0), vectors.to(x.dtype)
        if vectors.dim() == 2 and batch % self.axis.size == 0:  # this rank holds whole sequences
            return (x.view(-1, *vectors.shape) + vectors).view_as(x)
        return x + slice_sequence(vectors.expand(batch, -1, -1), self.axis)
