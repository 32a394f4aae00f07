"""Rows of a table, and their gradient: sums over equal tokens, in a fixed order.

Dims: N tokens, V words, D columns.

The gradient wants all tokens of a word together, so they are sorted; a program takes P of them in
that order and BLOCK columns. With X their gradients and same[i, j] = (token i is token j, i <= j),
same^T X holds at the last of each run of equal tokens the sum of that run. Runs that end within the
P are written to the table's rows. What belongs to a run that began before goes to `parts`, and a
second kernel adds those parts up: so a word that every tenth token is costs no more than others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device
from kernels.launch import run
from kernels.sizes import cdiv

P = 16  # tokens of a program: the least that a product takes
MANY = 2**16  # words that numbers of 16 bits tell apart, which are sorted in half the passes


@triton.jit
def gather_kernel(
    tokens_ptr,  # [N]
    weight_ptr,  # [V, D]
    y_ptr,  # [N, D]
    N, V, D,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token that is no word gets NaN: nobody waits to complain."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(tokens_ptr + rows, mask=rows < N, other=0).to(tl.int64)
    known = (tokens >= 0) & (tokens < V)
    inside = (columns < D)[None, :]
    at = tokens[:, None] * D + columns[None, :]
    y = tl.load(weight_ptr + at, mask=known[:, None] & inside, other=float("nan"))
    to = rows[:, None] * D + columns[None, :]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & inside)


@triton.jit
def sum_runs_kernel(
    dy_ptr,  # [N, D]
    sorted_ptr,  # [N] tokens, less `shift`
    order_ptr,  # [N] where they were
    total_ptr,  # [V, D], zeros before
    parts_ptr,  # [N / P, D] fp32
    N, V, D, shift,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * P
    at = first + tl.arange(0, P)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < D)[None, :]
    tokens = tl.load(sorted_ptr + at, mask=at < N, other=0).to(tl.int32)
    following = tl.load(sorted_ptr + at + 1, mask=at + 1 < N, other=0).to(tl.int32)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=0).to(tl.int32)
    rows = tl.load(order_ptr + at, mask=at < N, other=0).to(tl.int64)
    x = tl.load(
        dy_ptr + rows[:, None] * D + columns[None, :], mask=(at < N)[:, None] & inside, other=0.0
    )
    same = (tokens[:, None] == tokens[None, :]) & (at[:, None] >= at[None, :])
    sums = tl.dot(same.to(x.dtype), x, input_precision="ieee")  # [P, BLOCK], fp32
    ends = (at < N) & ((at == first + P - 1) | (at == N - 1) | (tokens != following))
    began = (first > 0) & (tokens == before)  # in an earlier program
    words = tokens.to(tl.int64) + shift
    known = (words >= 0) & (words < V)
    tl.store(
        total_ptr + words[:, None] * D + columns[None, :], sums.to(total_ptr.dtype.element_ty),
        mask=(ends & known & (began == 0))[:, None] & inside,
    )  # fmt: skip
    # at most one run comes from before
    part = tl.sum(tl.where((ends & began)[:, None], sums, 0.0), 0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + columns, part, mask=columns < D)


@triton.jit
def join_runs_kernel(
    sorted_ptr,  # [N] tokens, less `shift`
    parts_ptr,  # [N / P, D] fp32
    total_ptr,  # [V, D]
    N, V, D, shift, programs,  # of sum_runs_kernel
    P: tl.constexpr, TAKES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a run to its row; the program after the one in which the run began."""
    own = tl.program_id(0) + 1
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(sorted_ptr + own * P).to(tl.int32)
    goes_on = tl.load(sorted_ptr + own * P - 1).to(tl.int32) == token
    # whether it came into the program before this one from an earlier one
    earlier = (own - 1) * P - 1
    long = (earlier >= 0) & (
        tl.load(sorted_ptr + earlier, mask=earlier >= 0, other=0).to(tl.int32) == token
    )
    word = token.to(tl.int64) + shift
    if goes_on & (long == 0) & (word >= 0) & (word < V):
        total = tl.zeros([BLOCK], tl.float32)
        start = own
        going = start < programs
        while going:
            takes = start + tl.arange(0, TAKES)
            theirs = tl.load(sorted_ptr + takes * P, mask=takes < programs, other=0).to(tl.int32)
            mine = (takes < programs) & (theirs == token)
            at = takes[:, None].to(tl.int64) * D + columns[None, :]
            parts = tl.load(parts_ptr + at, mask=mine[:, None] & (columns < D)[None, :], other=0.0)
            total += tl.sum(parts, 0)
            start += TAKES
            going = (tl.sum(mine.to(tl.int32), 0) == TAKES) & (start < programs)
        row = total_ptr + word * D + columns
        sums = tl.load(row, mask=columns < D, other=0.0).to(tl.float32) + total
        tl.store(row, sums.to(total_ptr.dtype.element_ty), mask=columns < D)


def gather(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens [N], weight [V, D], contiguous -> [N, D] in dtype."""
    (N,), (V, D) = tokens.shape, weight.shape
    y = torch.empty((N, D), dtype=dtype, device=weight.device)
    rows, block = _sizes(D, weight.device)
    with on_device(weight):
        run(
            gather_kernel, (cdiv(N, rows), cdiv(D, block)),
            tokens, weight, y, N, V, D, R=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


def gradient(tokens: Tensor, dy: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    """As reference.gradient_reference; tokens [N] and dy [N, D] contiguous, N > 0."""
    N, D = dy.shape
    shift = MANY // 2 if words <= MANY else 0
    keys = (tokens - shift).to(torch.int16 if shift else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    total = torch.zeros((words, D), dtype=dtype, device=dy.device)
    programs = cdiv(N, P)
    parts = torch.empty((programs, D), dtype=torch.float32, device=dy.device)
    _, block = _sizes(D, dy.device)
    across = cdiv(D, block)
    with on_device(dy):
        run(
            sum_runs_kernel, (programs, across),
            dy, keys, order, total, parts, N, words, D, shift, P=P, BLOCK=block, num_warps=4,
        )  # fmt: skip
        if programs > 1:
            run(
                join_runs_kernel, (programs - 1, across),
                keys, parts, total, N, words, D, shift, programs,
                P=P, TAKES=P, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return total


def _sizes(D: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a program."""
    return (4, 32) if device.type == "cpu" else (8, 256)
