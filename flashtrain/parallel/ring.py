"""Causal attention over a sequence in parts, keys and values going round from rank to rank.

Liu et al. 2023, arXiv:2310.01889, with the balanced order of context.py: rank r of c holds chunks r
and 2c-1-r. At step s it has the keys and values of rank j = r - s (mod c), and

    j = r   its chunks see themselves, and the late one all of the early one: plain causal attention
    j < r   both its chunks see chunk j and neither sees chunk 2c-1-j: all queries, the early keys
    j > r   only its late chunk sees them, and sees both: the late queries, all keys

so no block but the first has a mask, and all ranks do the same work at every step. Partial outputs
are merged in fp32 by their lse. The next keys and values travel while a step computes. Backward
goes round once more: with `out` and `lse` of the whole each block gives its gradients at once, and
fp32 sums of dK and dV travel one step behind the keys and values that they belong to, home at last.

Both passes are `torch.library` ops: a compiler sees one op, selective recomputation keeps its
result, and no rank holds more than two parts of the keys and values at a time.

Dims: B batch, T/c = 2L tokens of this rank, H and K query and key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.parallel.collectives import finish_shift, start_shift
from flashtrain.parallel.mesh import Axis
from kernels.attention import attention, attention_block_backward
from kernels.operation import operation, register_autograd, register_fake


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axis: Axis, alibi_slopes: Tensor | None,
    documents: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Causal attention of this rank's queries over whole sequences.

    q [B, T/c, H, D], k and v [B, T/c, K, D]. Raises ValueError for slopes and documents, which
    blocks of keys that do not stand before their queries cannot say.
    """
    if alibi_slopes is not None or documents is not None:
        raise ValueError("ring attention is causal only, without ALiBi or documents: use gather")
    out, _ = ring_forward(q, k, v, backend, axis.rank, axis.size, axis.name)
    result: Tensor = out
    return result


def _block(step: int, rank: int, size: int, length: int) -> tuple[slice, slice]:
    """Which of a rank's queries meet which of the visiting keys."""
    every, early, late = slice(None), slice(0, length // 2), slice(length // 2, None)
    if step == 0:
        return every, every
    return (every, early) if (rank - step) % size < rank else (late, every)


@operation(
    "flashtrain::ring_attention_forward",
    schema="(Tensor q, Tensor k, Tensor v, str backend, int rank, int size, str name)"
    " -> (Tensor, Tensor)",
)
def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, backend: str, rank: int, size: int, name: str
) -> tuple[Tensor, Tensor]:
    """out [B, T/c, H, D] in q's dtype and lse [B, H, T/c] fp32 (fp64 for fp64), over all keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    visiting = torch.stack([k, v])
    out = lse = torch.empty(0)
    for step in range(size):
        if more := step < size - 1:
            coming = start_shift(visiting, rank, size, name)
        rows, columns = _block(step, rank, size, q.shape[1])
        part, its_lse = attention(
            q[:, rows], visiting[0, :, columns], visiting[1, :, columns], causal=step == 0,
            return_lse=True, backend=backend,
        )  # fmt: skip
        if step == 0:
            out, lse = part.to(wide).contiguous(), its_lse.to(wide).contiguous()
        else:
            _merge(out[:, rows], lse[:, :, rows], part, its_lse.to(wide))
        if more:
            visiting = finish_shift(coming)
    return out.to(q.dtype), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, its_lse: Tensor) -> None:
    """Bring in the result over other keys, in place: out += (part - out) share of its weight."""
    share = torch.sigmoid(its_lse - lse).transpose(1, 2).unsqueeze(-1)  # exp(l') / (e^l + e^l')
    out.lerp_(part.to(out.dtype), share)
    torch.logaddexp(lse, its_lse, out=lse)


@operation(
    "flashtrain::ring_attention_backward",
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str backend,"
    " int rank, int size, str name) -> (Tensor, Tensor, Tensor)",
)
def ring_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    backend: str, rank: int, size: int, name: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of this rank's q, k and v, contiguous."""
    wide = torch.promote_types(q.dtype, torch.float32)
    visiting = torch.stack([k, v])
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    # of dK and dV of the visitors; on its way to the next rank between two steps
    sums = torch.zeros(visiting.shape, dtype=wide, device=q.device)
    for step in range(size):
        if more := step < size - 1:
            coming = start_shift(visiting, rank, size, name)
        rows, columns = _block(step, rank, size, q.shape[1])
        terms = attention_block_backward(
            d_out[:, rows], q[:, rows], visiting[0, :, columns], visiting[1, :, columns],
            out[:, rows].contiguous(), lse[:, :, rows].contiguous(),
            causal=step == 0, backend=backend,
        )  # fmt: skip
        dq[:, rows] += terms[0]
        if step > 0:
            sums = finish_shift(sums)
        sums[0, :, columns] += terms[1]
        sums[1, :, columns] += terms[2]
        sums = start_shift(sums, rank, size, name)
        if more:
            visiting = finish_shift(coming)
    dk, dv = finish_shift(sums)
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@register_fake(ring_forward)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=wide)


@register_fake(ring_backward)
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.ring = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """`ring_attention` hands out no lse, so nothing can want a gradient of it."""
    dq, dk, dv = ring_backward(d_out, *ctx.saved_tensors, *ctx.ring)
    return dq, dk, dv, None, None, None, None


register_autograd(ring_forward, _gradients, setup_context=_save)
