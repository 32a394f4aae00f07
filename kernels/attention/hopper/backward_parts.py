"""What both consumers of the backward share: the queries of a turn, what sees a key, dK and dV.

Dims: BM queries of a tile, GROUP = H / H_kv, D head size; a consumer has 64 keys of a tile.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.attention.hopper.masks import queries_of
from kernels.attention.hopper.shim import tma_store


@gluon.jit
def query_at(i, first, per_head, BM: gl.constexpr, GROUP: gl.constexpr):
    """(head of the group, first query) of turn i: the heads of a group one after the other."""
    member = 0
    if GROUP > 1:
        member = i // per_head
    return member, first + (i - member * per_head) * BM


@gluon.jit
def keys_seen(
    key, b, T, S, limits, limits_smem, W: gl.constexpr, LAYOUT: gl.constexpr, LIMITS: gl.constexpr
):  # fmt: skip
    """What `probabilities` needs to hide pairs: (first, last query of each of the 64 keys, and
    between which queries all 64 are seen); the first two wait in shared memory: registers are
    short."""
    seen = (0, 0, 0, 0)
    if LIMITS:
        firsts = limits_smem.slice(W * 128, 64)
        lasts = limits_smem.slice(W * 128 + 64, 64)
        first_of, last_of = queries_of(
            key + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), b, T, S, limits, LIMITS
        )
        firsts.store(first_of)
        lasts.store(last_of)
        clear_from, _ = queries_of(key + 63, b, T, S, limits, LIMITS)
        _, clear_to = queries_of(key, b, T, S, limits, LIMITS)
        if key + 64 > S:
            clear_to = -1  # keys past the end
        seen = (firsts, lasts, clear_from, clear_to)
    return seen


@gluon.jit
def masked_tiles(
    key, first, per_head, S, past, BM: gl.constexpr, LAST: gl.constexpr, CAUSAL: gl.constexpr,
    LIMITS: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """How many of the query tiles from `first` on may need a mask; the ones behind them do not.

    The key tile ends LAST after this consumer's first key.
    """
    n = 0
    if LIMITS:
        n = per_head
    elif CAUSAL:  # until all queries see the tile's last key
        n = gl.minimum(gl.maximum(key + LAST - past - first + (BM - 1), 0) // BM, per_head)
    elif RAGGED:
        if key + 64 > S:
            n = per_head
    return n


@gluon.jit
def store_dk_dv(
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
