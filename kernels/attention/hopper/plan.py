"""From shapes and options to launches: grids, buffers, and what each kernel gets. Needs no GPU.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.hopper.backward import BN, attention_bwd_kernel
from kernels.attention.hopper.forward import attention_fwd_kernel
from kernels.attention.hopper.launch import Blocks, Launch, Pointer
from kernels.attention.hopper.rows import cast_dq_kernel, prepare_rows_kernel
from kernels.attention.hopper.tiles import BackwardTile, ForwardTile

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Options:
    """What a call asks for beside its tensors."""

    causal: bool
    scale: float
    alibi: bool


def forward_buffers(q: Tensor) -> dict[str, Tensor]:
    """What the forward writes: out [B, T, H, D] and lse [B, H, T]."""
    B, T, H, D = q.shape
    return {
        "out": torch.empty((B, T, H, D), dtype=q.dtype, device=q.device),
        "lse": torch.empty((B, H, T), dtype=torch.float32, device=q.device),
    }


def plan_forward(q: Tensor, k: Tensor, options: Options, tile: ForwardTile, n_sm: int) -> Launch:
    """The launch for q, k, v, out, lse, slopes ([H] fp32 or None) and counter ([1] int32, zero).

    Args:
        q: [B, T, H, D]; k: [B, S, H_kv, D]; only their shapes are read. See `supports`.
        n_sm: multiprocessors; each runs one program at a time.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1], k.shape[2]
    rows, keys, past = 64 * tile.consumers, tile.keys, S - T
    n_tiles = -(-T // rows)
    if options.causal:
        edge = 1 if past % 64 == 0 else 2  # key tiles that the diagonal of 64 rows can cross
    else:
        edge = 1 if S % keys else 0
    # a tile of rows always ends inside one key tile: then each warpgroup needs all key tiles
    even = keys % rows == 0 and past % keys == 0
    arguments = dict(
        q_desc=Blocks("q", (1, 64, 1, D)),
        k_desc=Blocks("k", (1, keys, 1, D)),
        v_desc=Blocks("v", (1, keys, 1, D)),
        out_desc=Blocks("out", (1, 64, 1, D)),
        lse_ptr=Pointer("lse"),
        slopes_ptr=Pointer("slopes"),
        counter_ptr=Pointer("counter"),
        scale=options.scale * LOG2_E,
        H=H,
        T=T,
        S=S,
        n_heads=B * H,
        n_tiles=n_tiles,
        chunk=_together(tile.together, 4 * S * D, H // H_kv, B * H),
        D=D,
        GROUP=H // H_kv,
        CONSUMERS=tile.consumers,
        BN=keys,
        STAGES=tile.stages,
        REGISTERS=tile.registers,
        CAUSAL=options.causal,
        EDGE=edge,
        SKIP=options.causal and not even,
        ALIBI=options.alibi,
        DRAW=tile.draw,
    )
    return Launch(attention_fwd_kernel, (min(n_sm, n_tiles * B * H), 1, 1), arguments)


def backward_buffers(q: Tensor, k: Tensor, tile: BackwardTile) -> dict[str, Tensor]:
    """What the backward writes: dq, dk, dv, and its scratch, whose rows are padded to tiles."""
    B, T, H, D = q.shape
    rows = B * H * _padded(T, tile)
    return {
        "dq": torch.empty(q.shape, dtype=q.dtype, device=q.device),
        "dk": torch.empty(k.shape, dtype=k.dtype, device=k.device),
        "dv": torch.empty(k.shape, dtype=k.dtype, device=k.device),
        "stats": torch.empty(
            (2 * rows // tile.queries, tile.queries), dtype=torch.float32, device=q.device
        ),
        "dq_sum": torch.empty((rows, D), dtype=torch.float32, device=q.device),
    }


def plan_backward(
    q: Tensor, k: Tensor, d_out: Tensor, options: Options, tile: BackwardTile, n_sm: int
) -> tuple[Launch, Launch, Launch]:
    """The launches for the tensors of plan_forward, d_out, d_lse (or None) and backward_buffers.

    Args:
        q: [B, T, H, D]; k: [B, S, H_kv, D]; d_out like q; shapes and strides of d_out are read.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1], k.shape[2]
    BM, group, n_tiles = tile.queries, H // H_kv, -(-S // BN.value)
    n_rows = B * H * _padded(T, tile)
    around = dict(T=T, H=H, D=D, BM=BM)
    prepare = dict(
        out_ptr=Pointer("out"),
        d_out_ptr=Pointer("d_out"),
        lse_ptr=Pointer("lse"),
        d_lse_ptr=Pointer("d_lse"),
        stats_ptr=Pointer("stats"),
        dq_ptr=Pointer("dq_sum"),
        d_out_b=d_out.stride(0),
        d_out_t=d_out.stride(1),
        d_out_h=d_out.stride(2),
        n_stats=n_rows,
        **around,
    )
    arguments = dict(
        q_desc=Blocks("q", (1, BM, 1, D)),
        k_desc=Blocks("k", (1, BN.value, 1, D)),
        v_desc=Blocks("v", (1, BN.value, 1, D)),
        do_desc=Blocks("d_out", (1, BM, 1, D)),
        stats_desc=Blocks("stats", (1, BM)),
        dq_desc=Blocks("dq_sum", (64, D // 2 if BM == 64 else D)),
        dk_desc=Blocks("dk", (1, 64, 1, D)),
        dv_desc=Blocks("dv", (1, 64, 1, D)),
        slopes_ptr=Pointer("slopes"),
        counter_ptr=Pointer("counter"),
        scale=options.scale,
        H_kv=H_kv,
        T=T,
        S=S,
        n_heads=B * H_kv,
        n_tiles=n_tiles,
        chunk=_together(tile.together, 8 * T * D * group, 1, B * H_kv),
        D=D,
        BM=BM,
        GROUP=group,
        STAGES=tile.stages,
        CAUSAL=options.causal,
        RAGGED=not options.causal and S % BN.value != 0,
        ALIBI=options.alibi,
        EARLY=tile.early,
        DRAW=tile.draw,
    )
    cast = dict(sum_ptr=Pointer("dq_sum"), dq_ptr=Pointer("dq"), scale=options.scale, **around)
    grid = (n_rows // BM, 1, 1)
    return (
        Launch(prepare_rows_kernel, grid, prepare),
        Launch(attention_bwd_kernel, (min(n_sm, n_tiles * B * H_kv), 1, 1), arguments),
        Launch(cast_dq_kernel, grid, cast),
    )


def _padded(T: int, tile: BackwardTile) -> int:
    return -(-T // tile.queries) * tile.queries


def _together(room: int, bytes_per_kv: int, group: int, n_heads: int) -> int:
    """Heads whose tiles stand together: whole groups that share K and V, as many as fit in room."""
    if room == 0:
        return 1
    return min(n_heads, max(1, room // bytes_per_kv) * group)
