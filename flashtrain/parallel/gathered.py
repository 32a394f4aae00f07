"""Causal attention of a rank's queries over the keys and values of all ranks, gathered.

A plain causal forward pass goes round instead (ring.py): on two H200 at 65,536 tokens 631 TFLOP/s a
GPU where gathered keys had 581, at 262,144 607 and 606; forward with backward stayed at 551 and 552
there, 584 and 580 here (2026-11-28). Its backward pass, and all of any other mask, is gathered.

Heads go through in groups: the keys and values of one group travel while attention computes the
group before, and so do the gradients of the group before in the backward pass. In the open are the
first group's gather and the last one's scatter. Groups on two streams, so that one launch's end is
filled by the next one's blocks, were not faster (89 % of one GPU's rate beside 91 %, 2026-11-28).
Backward gathers anew, so a rank keeps its own keys and values only.

A chunk's queries are the last of the keys up to its end, which is how `attention` places them: the
two chunks of a rank are two plain calls, and their gradients add up in the keys that both see.

All gathers are started before the first attention. Its persistent programs leave no multiprocessor
to a transfer that comes later, which then waits until they are through.

Both passes are `torch.library` ops, as those of ring.py: a compiler sees one op, and selective
recomputation keeps its result.

Dims: B batch, T tokens of whole sequences, c ranks, L = T / 2c, H and K query and key/value heads
of this tensor rank, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.layout import head_groups
from flashtrain.parallel.chunks import cut_parts, join_parts, own_chunks
from flashtrain.parallel.collectives import finish_all, start_gathers, start_scatters
from flashtrain.parallel.ring import ring_forward
from kernels.attention import attention, attention_block_backward
from kernels.operation import operation, register_autograd, register_fake


@operation(
    "flashtrain::gather_attention_forward",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? documents, str backend,"
    " int rank, int size, str name) -> (Tensor, Tensor)",
)
def gather_forward(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, documents: Tensor | None,
    backend: str, rank: int, size: int, name: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, 2L, H, D] in q's dtype and lse [B, H, 2L] fp32 (fp64 for fp64).

    q [B, 2L, H, D], k and v [B, 2L, K, D]; alibi_slopes [H]; documents [B, 2, T] by
    `document_bounds`.
    """
    if alibi_slopes is None and documents is None:
        gone_round: tuple[Tensor, Tensor] = ring_forward(q, k, v, backend, rank, size, name)
        return gone_round
    length = q.shape[1] // 2
    groups = head_groups(q.shape[0], length, q.shape[2], k.shape[2])
    coming = _start(k, v, groups, size, name)
    out, lse = _results(q)
    for heads, _ in groups:
        whole_k, whole_v = (join_parts(parts) for parts in finish_all(coming.pop(0)))
        slopes = None if alibi_slopes is None else alibi_slopes[heads]
        for chunk, rows in _own_rows(rank, size, length):
            end = (chunk + 1) * length
            seen = None if documents is None else documents[..., :end]
            out[:, rows, heads], lse[:, heads, rows] = _attend(
                q[:, rows, heads], whole_k[:, :end], whole_v[:, :end], slopes, seen, backend
            )
    return out, lse


@operation(
    "flashtrain::gather_attention_backward",
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? documents,"
    " Tensor out, Tensor lse, str backend, int rank, int size, str name)"
    " -> (Tensor, Tensor, Tensor)",
)
def gather_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None,
    documents: Tensor | None, out: Tensor, lse: Tensor,
    backend: str, rank: int, size: int, name: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of this rank's q, k and v, contiguous."""
    length = q.shape[1] // 2
    groups = head_groups(q.shape[0], length, q.shape[2], k.shape[2])
    coming = _start(k, v, groups, size, name)
    leaving = []
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for heads, _ in groups:
        whole_k, whole_v = (join_parts(parts) for parts in finish_all(coming.pop(0)))
        slopes = None if alibi_slopes is None else alibi_slopes[heads]
        sums: list[Tensor] = []
        # the late chunk first: the early one sees a part of its keys
        for chunk, rows in reversed(_own_rows(rank, size, length)):
            end = (chunk + 1) * length
            seen = None if documents is None else documents[..., :end]
            dq[:, rows, heads], *terms = _attend_backward(
                d_out[:, rows, heads], q[:, rows, heads], whole_k[:, :end], whole_v[:, :end],
                slopes, seen, out[:, rows, heads], lse[:, heads, rows], backend,
            )  # fmt: skip
            if not sums:
                sums = terms
            else:
                for total, term in zip(sums, terms, strict=True):
                    total[:, :end] += term
        del whole_k, whole_v
        parts = [cut_parts(_chunks(total, length, size)) for total in sums]
        leaving.append(start_scatters(parts, size, name))
    for (_, narrow), pending in zip(groups, leaving, strict=True):
        for grad, own in zip((dk, dv), finish_all(pending), strict=True):
            grad[:, :, narrow] = own.squeeze(0)
    return dq, dk, dv


def _start(
    k: Tensor, v: Tensor, groups: list[tuple[slice, slice]], size: int, name: str
) -> list[list[Tensor]]:
    """Every group's keys and values on their way, [c, B, 2L, heads, D] each."""
    return [start_gathers([x[:, :, narrow] for x in (k, v)], size, name) for _, narrow in groups]


def _own_rows(rank: int, size: int, length: int) -> list[tuple[int, slice]]:
    """A rank's two chunks, and where it has them."""
    early, late = own_chunks(rank, size)
    return [(early, slice(0, length)), (late, slice(length, 2 * length))]


def _chunks(total: Tensor, length: int, size: int) -> list[Tensor]:
    """The 2c chunks of a whole sequence's gradient [B, T, ...], from that of its first keys."""
    chunks = list(total.split(length, dim=1))
    nothing = torch.zeros_like(chunks[0])
    return chunks + [nothing] * (2 * size - len(chunks))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, documents: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """out and lse of queries that are the last T of S places.

    `attention` takes documents for T = S only. So with documents: first the keys that the chunk has
    itself, then those before it, and the two are merged by their lse.
    """
    if documents is None:
        return attention(
            q, k, v, causal=True, alibi_slopes=slopes, return_lse=True, backend=backend
        )
    start = k.shape[1] - q.shape[1]
    out, lse = attention(
        q, k[:, start:], v[:, start:], causal=True, alibi_slopes=slopes,
        documents=_own_bounds(documents, start), return_lse=True, backend=backend,
    )  # fmt: skip
    if start == 0:
        return out, lse
    key_mask, begins_here = _before(documents, start)
    before, lse_before = attention(
        q, k, v, causal=True, alibi_slopes=slopes, key_mask=key_mask,
        return_lse=True, backend=backend,
    )  # fmt: skip
    lse_before = lse_before.masked_fill(begins_here, float("-inf"))
    total = torch.logaddexp(lse, lse_before)
    share, share_before = (
        (part - total).exp().transpose(1, 2).unsqueeze(-1) for part in (lse, lse_before)
    )
    return (share * out + share_before * before).to(q.dtype), total


def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None,
    documents: Tensor | None, out: Tensor, lse: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of `_attend`."""
    if documents is None:
        return attention_block_backward(
            d_out, q, k, v, out, lse, causal=True, alibi_slopes=slopes, backend=backend
        )
    start = k.shape[1] - q.shape[1]
    dq, own_dk, own_dv = attention_block_backward(
        d_out, q, k[:, start:], v[:, start:], out, lse, causal=True, alibi_slopes=slopes,
        documents=_own_bounds(documents, start), backend=backend,
    )  # fmt: skip
    if start == 0:
        return dq, own_dk, own_dv
    key_mask, begins_here = _before(documents, start)
    dq_before, dk, dv = attention_block_backward(
        # exp(score - inf) is 0: these queries see nothing there
        d_out, q, k, v, out, lse.masked_fill(begins_here, float("inf")), causal=True,
        alibi_slopes=slopes, key_mask=key_mask, backend=backend,
    )  # fmt: skip
    dk[:, start:] += own_dk
    dv[:, start:] += own_dv
    return dq + dq_before, dk, dv


def _own_bounds(documents: Tensor, start: int) -> Tensor:
    """Documents as a chunk that begins at `start` and ends with them has them, [B, 2, T]."""
    own = documents[..., start:]
    return (own - start).clamp(0, own.shape[2])


def _before(documents: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Keys before a chunk that some of its queries see, [B, S]; queries that see none, [B, 1, T].

    At most one document goes on into the chunk, the one that its first token belongs to.
    """
    own = documents[..., start:]
    place = torch.arange(documents.shape[2], device=documents.device)
    return (place >= own[:, 0, :1]) & (place < start), own[:, :1] >= start


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=wide)


@register_fake(gather_forward)
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(q)


@register_fake(gather_backward)
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend, ctx.rank, ctx.size, ctx.name = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """`gather_attention` hands out no lse, so nothing can want a gradient of it."""
    dq, dk, dv = gather_backward(
        d_out, *ctx.saved_tensors, ctx.backend, ctx.rank, ctx.size, ctx.name
    )
    return dq, dk, dv, None, None, None, None, None, None


register_autograd(gather_forward, _gradients, setup_context=_save)
