"""What both consumers of the backward share: the queries of a turn, what sees a key, dK and dV.

Dims: BM queries of a tile, GROUP = H / H_kv, D head size; a consumer has 64 keys of a tile.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper.dq import add_to_dq, half_of_dq
from kernels.attention.hopper.ends import number_at
from kernels.attention.hopper.masks import query_tiles
from kernels.attention.hopper.shim import tma_store

BN = gl.constexpr(128)  # keys of a tile


@gluon.jit
def query_at(i, first, per_head, BM: gl.constexpr, GROUP: gl.constexpr):
    """(head of the group, first query) of turn i: the heads of a group one after the other."""
    member = 0
    if GROUP > 1:
        member = i // per_head
    return member, first + (i - member * per_head) * BM


@gluon.jit
def queries_seen(
    key, turn, b, T, S, limits, ends, W: gl.constexpr, BM: gl.constexpr,
    CAUSAL: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """(first query, how many tiles) that see the key tile, and what `probabilities` needs to hide
    pairs: (first, last query of each of the 64 keys from `key` on, in shared memory since registers
    are short; between which queries all 64 are seen)."""
    seen = (0, 0, 0, 0)
    if LIMITS:
        firsts, lasts, spans, full, _empty = ends
        at = turn % 2
        mbarrier.wait(full.index(at), (turn // 2) & 1)
        firsts = firsts.index(at * 2 + W)
        lasts = lasts.index(at * 2 + W)
        clear_to = number_at(lasts, 0)
        if key + 64 > S:
            clear_to = -1  # keys past the end
        seen = (firsts, lasts, number_at(firsts, 63), clear_to)
        first = number_at(spans.index(at * 2), 0)
        per_head = number_at(spans.index(at * 2 + 1), 0)
    else:
        first, per_head = query_tiles(key - W * 64, b, T, S, limits, BM, BN, CAUSAL, LIMITS)
    return first, per_head, seen


@gluon.jit
def masked_tiles(
    key, first, per_head, S, past, BM: gl.constexpr, LAST: gl.constexpr, CAUSAL: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """How many of the query tiles from `first` on may need a mask; the ones behind them do not.

    The key tile ends LAST after this consumer's first key.
    """
    n = 0
    if CAUSAL:  # until all queries see the tile's last key
        n = gl.minimum(gl.maximum(key + LAST - past - first + (BM - 1), 0) // BM, per_head)
    elif RAGGED:
        if key + 64 > S:
            n = per_head
    return n


@gluon.jit
def _store_dk_dv(
    dk_desc, dv_desc, dk, dv, dq_smem, b, key, h, W: gl.constexpr, BM: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """dV, then dK [64, D] leave through the staging buffer of dQ: room for one or for both."""
    DTYPE: gl.constexpr = dk_desc.dtype
    ROOM: gl.constexpr = 1 if BM == 64 else 2
    stage = dq_smem.index(W)._reinterpret(DTYPE, [ROOM, 1, 64, 1, D], dk_desc.layout)
    tma.store_wait(0)
    stage.index(0).reshape([64, D]).store(dv.to(DTYPE))
    fence_async_shared()
    tma_store(dv_desc, [b, key, h, 0], stage.index(0))
    if ROOM == 1:
        tma.store_wait(0)
    stage.index(ROOM - 1).reshape([64, D]).store(dk.to(DTYPE))
    fence_async_shared()
    tma_store(dk_desc, [b, key, h, 0], stage.index(ROOM - 1))


@gluon.jit
def end_of_turn(
    results, rings, staging, dk, dv, last, row, b, key, h,
    W: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, DQ_LAYOUT: gl.constexpr,
):  # fmt: skip
    """What is left after the last tile of a turn, number `last` of the program: its dQ, at `row` of
    the buffer; dK and dV."""
    dq_desc, dk_desc, dv_desc = results
    _q, _do, kv, _ticket = rings
    ds_ring, dq_smem, _places = staging
    ds_smem, ds_full, _ds_empty = ds_ring
    k_smem, _v, _full, kv_empty = kv
    mbarrier.wait(ds_full.index(last % 2), (last // 2) & 1)
    dq = half_of_dq(
        ds_smem.index(last % 2), k_smem.index(0).reshape([2 * 64, D]), W, BM, D, DQ_LAYOUT
    )
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(kv_empty, count=1)  # the next K and V load under what follows
    add_to_dq(dq_desc, dq_smem, dq, row, W, BM, D)
    _store_dk_dv(dk_desc, dv_desc, dk, dv, dq_smem, b, key, h, W, BM, D)
