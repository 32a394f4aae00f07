"""dQ in a ring of a few heads that stays in L2, converted and zeroed as soon as it is complete.

Dims: B batch, T queries, H heads, H_kv key/value heads, D head size, GROUP = H / H_kv, BM queries
of a tile, BN keys of a tile; `padded` is T up to whole tiles of BM.

fp32 sums for all heads would go to memory and back four times: zeroed, fetched to be added to,
evicted, fetched to be converted. Here there is room for RINGS groups of `chunk` heads, whose tiles
stand together in the schedule, and two more partitions of the kernel run beside the products:

    signaller   counts in `progress`, per head, the key tiles that are added up
    finisher    of turn (tile n, head h): waits until all tiles of head h - chunk are added up,
                converts every n_tiles-th block of 64 rows of its dQ and zeroes it; counts that
                in `progress` too, per group
    producer    waits, before a head of group g, until group g - RINGS is through

Every wait is for tiles that were drawn earlier, first tiles too, so whoever runs gets on, however
few programs the card has room for. The last two groups are left to the kernel that follows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.attention.hopper.schedule import following, let_go, tile_at
from kernels.attention.hopper.shim import barrier, fence_async_global, tma_load, wait_for

RINGS = gl.constexpr(3)
PIECE = gl.constexpr(2048)  # numbers that one copy brings: 32 columns of 64 rows, see dq.py


@gluon.jit
def slot_of(head, ring, GROUP: gl.constexpr, RING: gl.constexpr):
    """The first query head's place of a kv head in the sums."""
    if RING:
        head = head % ring
    return head * GROUP


@gluon.jit
def wait_for_slot(head, progress_ptr, n_heads, n_tiles, chunk, RING: gl.constexpr):
    """Producer: until what was in the head's place is out of it."""
    if RING:
        group = head // chunk
        if group >= RINGS:
            wait_for(progress_ptr + (n_heads + group - RINGS), chunk * n_tiles)


@gluon.jit
def signaller(progress_ptr, ticket, turn_done, sizes, DRAW: gl.constexpr, DEPTH: gl.constexpr):
    """One warp: once both consumers have added all of a turn, say so."""
    WARPS: gl.constexpr = 1
    _H_kv, _T, _S, n_heads, n_tiles, chunk = sizes
    turn = 0
    position = following(0, turn, ticket, DRAW, DEPTH, 1, WARPS, True)
    while position < n_tiles * n_heads:
        _rank, head = tile_at(position, n_tiles, n_heads, chunk)
        mbarrier.wait(turn_done.index(turn % DEPTH), (turn // DEPTH) & 1)
        gl.atomic_add(progress_ptr + head, 1, sem="release")
        let_go(turn, ticket, DEPTH)
        turn += 1
        position = following(position, turn, ticket, DRAW, DEPTH, 1, WARPS, True)


@gluon.jit
def _bring(sum_desc, row, piece_smem, piece_full, n, D: gl.constexpr):
    """Issue the load of a piece, the n-th of this program."""
    mbarrier.expect(piece_full.index(n % 2), sum_desc.block_type.nbytes)
    tma_load(sum_desc, [row, 0], piece_full.index(n % 2), piece_smem.index(n % 2))


@gluon.jit
def finisher(
    sum_desc, sum_ptr, dq_ptr, dq_row, progress_ptr, ticket, pieces, sizes, ring, scale,
    D: gl.constexpr,  # of the sums
    D_OUT: gl.constexpr,  # of dq
    BM: gl.constexpr, GROUP: gl.constexpr, DRAW: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Two warps: dq [B, T, H, D_OUT] = scale * sums of the heads a group before this turn's.

    dq_row: from a token to the next in dq.
    """
    WARPS: gl.constexpr = 2
    PIECES: gl.constexpr = 64 * D // PIECE  # of a block of 64 rows
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [2], [0])
    IN: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [2, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [2, 1], [1, 0])
    piece_smem, piece_full = pieces
    H_kv, T, _S, n_heads, n_tiles, chunk = sizes
    padded = (T + BM - 1) // BM * BM
    n_blocks = padded // 64 * GROUP
    n_groups = (n_heads + chunk - 1) // chunk
    n = 0
    turn = 0
    position = following(0, turn, ticket, DRAW, DEPTH, 1, WARPS, True)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        group = head // chunk
        if (group > 0) & (group < n_groups - 1):
            head = head - chunk
            b = head // H_kv
            first_row = slot_of(head, ring, GROUP, True) * padded
            count = (n_blocks - rank + n_tiles - 1) // n_tiles * PIECES
            wait_for(progress_ptr + head, n_tiles)
            fence_async_global()  # the copy engine reads what ordinary additions made
            if count > 0:
                _bring(sum_desc, (first_row + rank * 64) * (D // 32), piece_smem, piece_full, n, D)
            for i in range(count):
                if i + 1 < count:
                    block = rank + (i + 1) // PIECES * n_tiles
                    row = (first_row + block * 64) * (D // 32) + (i + 1) % PIECES * 64
                    _bring(sum_desc, row, piece_smem, piece_full, n + 1, D)
                mbarrier.wait(piece_full.index(n % 2), (n // 2) & 1)
                block = rank + i // PIECES * n_tiles
                member = block * 64 // padded
                t = block * 64 - member * padded + gl.arange(0, 64, gl.SliceLayout(1, OUT))
                line = (gl.cast(b, gl.int64) * T + t) * dq_row
                line = line + ((head - b * H_kv) * GROUP + member) * D_OUT
                place = gl.cast(first_row + block * 64, gl.int64) * D + i % PIECES * PIECE
                for half in gl.static_range(2):
                    x = piece_smem.index(n % 2).slice(half * 32, 32, 0).load(IN)
                    x = (x * scale).to(dq_ptr.dtype.element_ty)
                    x = x.reshape(
                        [2, 4, 8, 4, 2, 2]
                    )  # 8 columns, warp, row, lane of 4, 8 rows, column
                    x = gl.convert_layout(x.permute((1, 4, 2, 0, 3, 5)).reshape([64, 16]), OUT)
                    d = i % PIECES * 32 + half * 16 + gl.arange(0, 16, gl.SliceLayout(0, OUT))
                    within = (t < T)[:, None] & (d < D_OUT)[None, :]
                    gl.store(dq_ptr + line[:, None] + d[None, :], x, mask=within)
                    nothing = gl.zeros([PIECE // 2], gl.float32, FLAT)
                    at = place + half * (PIECE // 2)
                    gl.store(sum_ptr + at + gl.arange(0, PIECE // 2, FLAT), nothing)
                barrier()  # the piece is used up
                n += 1
            gl.atomic_add(progress_ptr + (n_heads + group - 1), 1, sem="release")
        let_go(turn, ticket, DEPTH)
        turn += 1
        position = following(position, turn, ticket, DRAW, DEPTH, 1, WARPS, True)
