"""What the small kernels around the backward do, done beside the products: three more partitions.

Dims: B batch, T queries, H heads, H_kv key/value heads, D head size, GROUP = H / H_kv, BM queries
of a tile, BN keys of a tile; `padded` is T up to whole tiles of BM.

By themselves those kernels are bound by memory and take 0.13 ms of 0.5 at 16k tokens of length
1024: they read out and d_out for delta, write zeros for the sums of dQ, fetch the sums again and
write dQ. The main kernel hardly uses the memory, so one warp each does that there. The tiles of
`chunk` heads, a group, stand together in the schedule; at a turn (key tile n of head h):

    preparer    lse and -delta of every n_tiles-th 16 rows of head h + LEAD chunk; counts that head
    finisher    waits until all key tiles of head h - LAG chunk are added up; converts every
                n_tiles-th 64 rows of its dQ and zeroes the sums; counts head h + LEAD chunk
    signaller   once both consumers have added all of this turn to memory, counts head h
    producer    before it loads row statistics, waits until the first two have counted head h
                2 n_tiles times

There are sums for LEAD + LAG groups. So the place that head h - LAG chunk leaves is the one that
head h + LEAD chunk takes, and the producer's wait is for both its statistics and its zeros. That
wait and the finisher's are for turns of another group, one or two rounds of all programs ago, and
should end at once. No wait is for a tile that was drawn later, first tiles too, so whoever runs
gets on, however few programs the card has room for. The first LEAD groups are prepared and the
last LAG groups are finished by the small kernels.

The sums are touched by the copy engine only, which works in L2; what the signaller counts has been
waited for with `stored`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# ruff: noqa: SIM102 -- the outer `if` is decided at compile time

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.attention.hopper.schedule import following, let_go, tile_at
from kernels.attention.hopper.shim import (
    barrier,
    fence_async_global,
    stored,
    tma_load,
    tma_store,
    wait_for,
)

LEAD, LAG = gl.constexpr(2), gl.constexpr(2)  # groups
DEPTH = gl.constexpr(8)  # turns that the three may lag
PIECE = gl.constexpr(1024)  # sums that one copy brings: 16 columns of 64 rows, see dq.py
PIECES = gl.constexpr(3)  # in flight
PART = gl.constexpr(16)  # rows of out and d_out that one copy brings, 64 columns of them
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def slot_of(head, ring, GROUP: gl.constexpr, RING: gl.constexpr):
    """The first query head's place of a kv head in the sums."""
    if RING:
        head = head % ring
    return head * GROUP


@gluon.jit
def wait_for_head(head, progress_ptr, n_heads, n_tiles, chunk, RING: gl.constexpr):
    """Producer: until the head's row statistics are there and its place in the sums is zero."""
    if RING:
        if head >= LEAD * chunk:
            wait_for(progress_ptr + (n_heads + head), 2 * n_tiles)
            fence_async_global()  # the copy engine reads what ordinary instructions wrote


@gluon.jit
def signaller(progress_ptr, ticket, turn_done, sizes, DRAW: gl.constexpr):
    """One warp: once both consumers have added all of a turn, say so."""
    _H_kv, _T, _S, n_heads, n_tiles, chunk = sizes
    turn = 0
    position = following(0, turn, ticket, DRAW, DEPTH, 1, 1, True)
    while position < n_tiles * n_heads:
        _rank, head = tile_at(position, n_tiles, n_heads, chunk)
        mbarrier.wait(turn_done.index(turn % DEPTH), (turn // DEPTH) & 1)
        gl.atomic_add(progress_ptr + head, 1, sem="release")
        let_go(turn, ticket, DEPTH)
        turn += 1
        position = following(position, turn, ticket, DRAW, DEPTH, 1, 1, True)


@gluon.jit
def _member(row, padded, GROUP: gl.constexpr):
    """(head of the group, query) of a row of a kv head."""
    member = 0
    if GROUP > 1:
        member = row // padded
    return member, row - member * padded


@gluon.jit
def _bring_rows(out_desc, do_desc, at, part_smem, part_full, n, D: gl.constexpr):
    """Issue the loads of PART rows of out and d_out, the n-th of this program."""
    HALVES: gl.constexpr = D // 64
    b, t, h = at
    s = n % 2
    mbarrier.expect(part_full.index(s), 2 * HALVES * out_desc.block_type.nbytes)
    for i in gl.static_range(HALVES):
        place = (s * HALVES + i) * 2
        tma_load(out_desc, [b, t, h, i * 64], part_full.index(s), part_smem.index(place))
        tma_load(do_desc, [b, t, h, i * 64], part_full.index(s), part_smem.index(place + 1))


@gluon.jit
def _minus_delta(part_smem, s, rows: gl.constexpr, DTYPE: gl.constexpr, D: gl.constexpr):
    """-rowsum(out * d_out) of 4 of the PART rows in place `s`."""
    HALVES: gl.constexpr = D // 64
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    total = gl.zeros([4, 64], gl.float32, ROWS)
    for i in gl.static_range(HALVES):
        # the swizzle moves columns of both alike, and their order does not matter
        out = part_smem.index((s * HALVES + i) * 2)._reinterpret(DTYPE, [PART, 64], FLAT)
        d_out = part_smem.index((s * HALVES + i) * 2 + 1)._reinterpret(DTYPE, [PART, 64], FLAT)
        out = out.slice(rows, 4, 0).load(ROWS).to(gl.float32)
        total -= out * d_out.slice(rows, 4, 0).load(ROWS).to(gl.float32)
    return gl.sum(total, 1)


@gluon.jit
def preparer(
    out_desc, do_desc, lse_ptr, d_lse_ptr, stats_ptr, progress_ptr, ticket, parts, sizes,
    D: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    """One warp: what prepare_rows_kernel of rows.py does, for heads LEAD groups ahead."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    FOUR: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
    part_smem, part_full = parts
    H_kv, T, _S, n_heads, n_tiles, chunk = sizes
    padded = (T + BM - 1) // BM * BM
    n_parts = padded // PART * GROUP
    lanes = gl.arange(0, PART, ONE)
    n = 0
    turn = 0
    position = following(0, turn, ticket, DRAW, DEPTH, 1, 1)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        head += LEAD * chunk
        if head < n_heads:
            b = head // H_kv
            h = (head - b * H_kv) * GROUP
            count = (n_parts - rank + n_tiles - 1) // n_tiles
            lse = gl.zeros([PART], gl.float32, ONE)
            for i in range(count + 1):
                s = (n + i - 1) % 2
                before = lse
                if i < count:  # what has to be fetched is one part ahead
                    member, t = _member((rank + i * n_tiles) * PART, padded, GROUP)
                    _bring_rows(
                        out_desc, do_desc, (b, t, h + member), part_smem, part_full, n + i, D
                    )
                    given = (head * GROUP + member) * T + t
                    # +inf past the end: P is 0 there
                    lse = gl.load(lse_ptr + (given + lanes), lanes < T - t, other=float("inf"))
                if i > 0:
                    row = (rank + (i - 1) * n_tiles) * PART
                    place = stats_ptr + (head * GROUP * padded + row)
                    mbarrier.wait(part_full.index(s), ((n + i - 1) // 2) & 1)
                    gl.store(place + lanes, before * LOG2_E)
                    place += gl.cast(n_heads * GROUP, gl.int64) * padded
                    for rows in gl.static_range(0, PART, 4):
                        minus_delta = _minus_delta(part_smem, s, rows, out_desc.dtype, D)
                        four = rows + gl.arange(0, 4, FOUR)
                        if d_lse_ptr is not None:
                            member, t = _member(row, padded, GROUP)
                            given = (head * GROUP + member) * T + t
                            more = gl.load(d_lse_ptr + (given + four), four < T - t, other=0.0)
                            minus_delta += more
                        gl.store(place + four, minus_delta)
                    barrier()  # the part is used up
            n += count
            gl.atomic_add(progress_ptr + (n_heads + head), 1, sem="release")
        turn += 1
        position = following(position, turn, ticket, DRAW, DEPTH, 1, 1)


@gluon.jit
def _bring_sums(sum_desc, row, piece_smem, piece_full, n):
    """Issue the load of a piece, the n-th of this program."""
    s = n % PIECES
    mbarrier.expect(piece_full.index(s), sum_desc.block_type.nbytes)
    tma_load(sum_desc, [row, 0], piece_full.index(s), piece_smem.index(s))


@gluon.jit
def _zero(zero_desc, row, zeros_smem):
    """A piece of the sums becomes zero, in two copies."""
    tma_store(zero_desc, [row, 0], zeros_smem)
    tma_store(zero_desc, [row + PIECE // 64, 0], zeros_smem)


@gluon.jit
def _convert_piece(piece, scale, dq_layout: gl.constexpr, DTYPE: gl.constexpr):
    """A piece of sums [32, 32] becomes [1, 64, 1, 16] of dq at its beginning."""
    IN: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])
    out = piece._reinterpret(DTYPE, [2, 1, 64, 1, 16], dq_layout).index(0)
    for i in gl.static_range(2):
        # 16 columns of 32 rows, of which two warps of a consumer hold 8 columns in a row: lines
        # [8 i, 8 i + 8) and those 16 behind; what is overwritten has been read
        x = gl.join(piece.slice(i * 8, 8, 0).load(IN), piece.slice(16 + i * 8, 8, 0).load(IN))
        x = (x * scale).to(DTYPE)
        x = x.reshape([2, 8, 4, 2, 2, 2])  # warp, row, lane of 4, 8 rows, column, 8 columns
        x = x.permute((0, 3, 1, 5, 2, 4)).reshape([32, 16])
        out.reshape([64, 16]).slice(i * 32, 32, 0).store(x)
    return out


@gluon.jit
def finisher(
    sum_desc, zero_desc, dq_desc, progress_ptr, ticket, pieces, sizes, ring, scale,
    D: gl.constexpr,  # of the sums
    BM: gl.constexpr, GROUP: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    """One warp: dq [B, T, H, D] = scale * sums for heads LAG groups behind, and their zeros."""
    OF_BLOCK: gl.constexpr = 64 * D // PIECE  # pieces of 64 rows
    LINES: gl.constexpr = PIECE // 32  # of the sums seen as [..., 32]
    piece_smem, piece_full, zeros_smem = pieces
    H_kv, T, _S, n_heads, n_tiles, chunk = sizes
    padded = (T + BM - 1) // BM * BM
    n_blocks = padded // 64 * GROUP
    n = 0
    turn = 0
    position = following(0, turn, ticket, DRAW, DEPTH, 1, 1)
    while position < n_tiles * n_heads:
        rank, head = tile_at(position, n_tiles, n_heads, chunk)
        count = (n_blocks - rank + n_tiles - 1) // n_tiles * OF_BLOCK
        before = head - LAG * chunk
        after = head + LEAD * chunk
        # where block `rank` of the place that both share starts, and from there to the next block
        line = (slot_of(after, ring, GROUP, True) * padded + rank * 64) * (D // 32)
        step = (n_tiles - 1) * (64 * D // 32)
        if before >= 0:
            b = before // H_kv
            h = (before - b * H_kv) * GROUP
            wait_for(progress_ptr + before, n_tiles)
            fence_async_global()
            tma.store_wait(0)  # of the turn before
            for i in gl.static_range(PIECES - 1):
                if i < count:
                    row = line + i // OF_BLOCK * step + i * LINES
                    _bring_sums(sum_desc, row, piece_smem, piece_full, n + i)
            for i in range(count):
                s = (n + i) % PIECES
                row = line + i // OF_BLOCK * step + i * LINES
                member, t = _member((rank + i // OF_BLOCK * n_tiles) * 64, padded, GROUP)
                mbarrier.wait(piece_full.index(s), ((n + i) // PIECES) & 1)
                piece = _convert_piece(piece_smem.index(s), scale, dq_desc.layout, dq_desc.dtype)
                fence_async_shared()
                tma_store(dq_desc, [b, t, h + member, i % OF_BLOCK * 16], piece)
                _zero(zero_desc, row, zeros_smem)
                ahead = i + PIECES - 1
                if ahead < count:
                    tma.store_wait(3)  # the piece before this one has left
                    row = line + ahead // OF_BLOCK * step + ahead * LINES
                    _bring_sums(sum_desc, row, piece_smem, piece_full, n + ahead)
            n += count
        elif after < n_heads:
            for i in range(count):
                _zero(zero_desc, line + i // OF_BLOCK * step + i * LINES, zeros_smem)
        if after < n_heads:
            stored(0)
            gl.atomic_add(progress_ptr + (n_heads + after), 1, sem="release")
        turn += 1
        position = following(position, turn, ticket, DRAW, DEPTH, 1, 1)
    tma.store_wait(0)
