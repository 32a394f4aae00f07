"""From shapes and options to launches: grids, buffers, and what each kernel gets. Needs no GPU.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size, BD = D padded to what
the kernels compute with.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention.hopper.backward import attention_bwd_kernel
from kernels.attention.hopper.backward_parts import BN
from kernels.attention.hopper.forward import attention_fwd_kernel
from kernels.attention.hopper.launch import Blocks, Launch, Pointer
from kernels.attention.hopper.masks import AFTER, BEFORE, DIAGONAL, DOCUMENTS
from kernels.attention.hopper.rows import ROWS, cast_dq_kernel, prepare_rows_kernel
from kernels.attention.hopper.tiles import (
    TOGETHER,
    BackwardTile,
    ForwardTile,
    choose_backward,
    choose_forward,
    padded_head,
)
from kernels.attention.problem import UNBOUNDED

LOG2_E = 1.4426950408889634


class Options(NamedTuple):
    """What a call asks for beside its tensors."""

    causal: bool
    scale: float
    alibi: bool = False
    before: int = UNBOUNDED  # keys a query sees before its place
    after: int = UNBOUNDED  # and after it; of no effect when causal
    softcap: float = 0.0  # 0: none
    sinks: torch.dtype | None = None
    documents: bool = False

    def limits(self, T: int, S: int) -> tuple[bool, int]:
        """(plain causal mask, or LIMITS of masks.py) for T queries over S keys.

        A bound that no query reaches counts as none, so the kernels see no large number.
        """
        after = 0 if self.causal else self.after
        found = DOCUMENTS.value if self.documents else 0
        if UNBOUNDED < self.before < S - 1:
            found |= BEFORE.value
        if UNBOUNDED < after < T - 1:
            found |= AFTER.value
        if found == AFTER.value and after == 0:
            return True, 0
        if found and after == 0:
            found |= DIAGONAL.value
        return False, found

    def masks(self, T: int, S: int) -> dict[str, Any]:
        """The arguments of both kernels that say what a query sees and how tiles are dealt out."""
        causal, limits = self.limits(T, S)
        return dict(
            bounds_ptr=Pointer("bounds"),
            before=self.before if limits & BEFORE.value else None,
            after=(0 if self.causal else self.after) if limits & AFTER.value else None,
            CAUSAL=causal,
            LIMITS=limits,
        )

    def caps(self) -> dict[str, Any]:
        """The arguments of both kernels for the soft cap."""
        if self.softcap == 0:
            return dict(cap=None, inner=None, SOFTCAP=False)
        return dict(cap=self.softcap * LOG2_E, inner=self.scale / self.softcap, SOFTCAP=True)


def forward_tile(q: Tensor, k: Tensor, options: Options) -> ForwardTile:
    """The tile of tiles.py for a call."""
    causal, limits = options.limits(q.shape[1], k.shape[1])
    return choose_forward(
        q.shape[3],
        causal or limits > 0,
        q.shape[1],
        limits=limits > 0,
        biased=options.alibi or options.softcap > 0,
        documents=options.documents,
    )


def backward_tile(q: Tensor, k: Tensor, options: Options) -> BackwardTile:
    """The tile of tiles.py for a call."""
    causal, limits = options.limits(q.shape[1], k.shape[1])
    return choose_backward(
        q.shape[3],
        causal or limits > 0,
        q.shape[1],
        limits=limits > 0,
        biased=options.alibi or options.softcap > 0,
    )


def forward_buffers(q: Tensor) -> dict[str, Tensor]:
    """What the forward writes: out [B, T, H, D] and lse [B, H, T]."""
    B, T, H, _ = q.shape
    return {
        "out": torch.empty_like(q, memory_format=torch.contiguous_format),
        "lse": torch.empty((B, H, T), dtype=torch.float32, device=q.device),
    }


def plan_forward(q: Tensor, k: Tensor, options: Options, tile: ForwardTile, n_sm: int) -> Launch:
    """The launch for the tensors q, k, v, out, lse and, each None where it has no part in the call,
    slopes [H] fp32, sinks [H], bounds [B, 2, T] int32 and counter [1] int32, zero.

    Args:
        q: [B, T, H, D]; k: [B, S, H_kv, D]; only their shapes are read. See `supports`.
        n_sm: multiprocessors; each runs one program at a time.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1], k.shape[2]
    rows, keys, past = 64 * tile.consumers, tile.keys, S - T
    n_tiles = -(-T // rows)
    BD = padded_head(D)
    masks = options.masks(T, S)
    causal = masks["CAUSAL"]
    if masks["LIMITS"]:
        edge = 1
    elif causal:
        edge = 1 if past % 64 == 0 else 2  # key tiles that the diagonal of 64 rows can cross
    else:
        edge = 1 if S % keys else 0
    # a tile of rows always ends inside one key tile: then each warpgroup needs all key tiles
    even = keys % rows == 0 and past % keys == 0
    skip = masks["LIMITS"] > 0 or (causal and not even)
    chunk = 1  # tiles of one length come one head after the other
    one_length = not causal and not masks["LIMITS"]
    if not one_length:
        chunk = _together(TOGETHER["forward"] // (4 * S * D), H // H_kv, B * H)
    values = dict(
        q_desc=Blocks("q", (1, 64, 1, BD)),
        k_desc=Blocks("k", (1, keys, 1, BD)),
        v_desc=Blocks("v", (1, keys, 1, BD)),
        out_desc=Blocks("out", (1, 64, 1, BD)),
        lse_ptr=Pointer("lse"),
        slopes_ptr=Pointer("slopes"),
        sinks_ptr=Pointer("sinks"),
        counter_ptr=Pointer("counter"),
        scale=1.0 if options.softcap > 0 else options.scale * LOG2_E,
        H=H,
        T=T,
        S=S,
        n_heads=B * H,
        n_tiles=n_tiles,
        chunk=chunk,
        D=BD,
        GROUP=H // H_kv,
        CONSUMERS=tile.consumers,
        BN=keys,
        STAGES=tile.stages,
        EDGE=edge,
        HALF=causal and even and rows == keys,
        SKIP=skip,
        ALIBI=options.alibi,
        SINKS=options.sinks is not None,
        SHARE=BD == 256,
        CHAINED=one_length and BD != 256,
        **masks,
        **options.caps(),
    )
    return _launch(attention_fwd_kernel, min(n_sm, n_tiles * B * H), values)


def backward_buffers(
    q: Tensor, k: Tensor, tile: BackwardTile, packed: bool = False
) -> dict[str, Tensor]:
    """What the backward writes: dq, dk, dv, and its scratch, whose rows are padded to tiles.

    packed: the first three are parts of one tensor, "dqkv" [B, T, H + 2 H_kv, D].
    """
    B, T, H, D = q.shape
    H_kv = k.shape[2]
    rows = B * H * _padded(T, tile)
    if packed:
        parts = [H, H_kv, H_kv]
        dqkv = torch.empty((B, T, sum(parts), D), dtype=q.dtype, device=q.device)
        made = dict(zip(("dq", "dk", "dv"), dqkv.split(parts, dim=2), strict=True))
        made["dqkv"] = dqkv
    else:
        made = {
            name: torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x in (("dq", q), ("dk", k), ("dv", k))
        }

    def scratch(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=q.device)

    return made | {
        "stats": scratch(2 * rows // tile.queries, tile.queries),
        # in the order of the threads it is no matrix
        "dq_sum": scratch(rows * padded_head(D) // 32, 32),
    }


def plan_backward(
    q: Tensor, k: Tensor, d_out: Tensor, options: Options, tile: BackwardTile, n_sm: int,
    packed: bool = False,
) -> tuple[Launch, Launch, Launch]:  # fmt: skip
    """The launches for the tensors of plan_forward, d_out, d_lse (or None) and backward_buffers,
    with the same `packed`.

    A sink has no part in them: lse holds all that the gradients need to know of it.

    Args:
        q: [B, T, H, D]; k: [B, S, H_kv, D]; d_out like q; shapes and strides of d_out are read.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1], k.shape[2]
    BM, BD, group, n_tiles = tile.queries, padded_head(D), H // H_kv, -(-S // BN.value)
    n_rows, n_heads = B * H * _padded(T, tile), B * H_kv
    row = (H + 2 * H_kv if packed else H) * D  # of dq
    masks = options.masks(T, S)
    columns = BD // 2 if BM == 64 else BD  # of dQ that a consumer makes
    around = dict(T=T, H=H, D=D, BD=BD, BM=BM)
    prepare = dict(
        out_ptr=Pointer("out"),
        d_out_ptr=Pointer("d_out"),
        lse_ptr=Pointer("lse"),
        d_lse_ptr=Pointer("d_lse"),
        stats_ptr=Pointer("stats"),
        sum_ptr=Pointer("dq_sum"),
        d_out_b=d_out.stride(0),
        d_out_t=d_out.stride(1),
        d_out_h=d_out.stride(2),
        n_stats=n_rows,
        **around,
    )
    values = dict(
        q_desc=Blocks("q", (1, BM, 1, BD)),
        k_desc=Blocks("k", (1, BN.value, 1, BD)),
        v_desc=Blocks("v", (1, BN.value, 1, BD)),
        do_desc=Blocks("d_out", (1, BM, 1, BD)),
        stats_desc=Blocks("stats", (1, BM)),
        dq_desc=Blocks("dq_sum", (2 * columns, 32)),
        dk_desc=Blocks("dk", (1, 64, 1, BD)),
        dv_desc=Blocks("dv", (1, 64, 1, BD)),
        slopes_ptr=Pointer("slopes"),
        counter_ptr=Pointer("counter"),
        scale=options.scale,
        H_kv=H_kv,
        T=T,
        S=S,
        n_heads=n_heads,
        n_tiles=n_tiles,
        chunk=_together(TOGETHER["backward"] // (8 * T * D * group), 1, n_heads),
        D=BD,
        BM=BM,
        GROUP=group,
        STAGES=tile.stages,
        RAGGED=not (masks["CAUSAL"] or masks["LIMITS"]) and S % BN.value != 0,
        ALIBI=options.alibi,
        EARLY=tile.early,
        AHEAD=tile.ahead and not masks["LIMITS"],
        **masks,
        **options.caps(),
    )
    cast = dict(
        sum_ptr=Pointer("dq_sum"),
        dq_ptr=Pointer("dq"),
        dq_b=T * row,
        dq_t=row,
        dq_h=D,
        scale=options.scale,
        **around,
        HELD=columns,
    )
    return (
        _launch(prepare_rows_kernel, n_rows // ROWS.value, prepare),
        _launch(attention_bwd_kernel, min(n_sm, n_tiles * n_heads), values),
        _launch(cast_dq_kernel, n_rows // ROWS.value, cast),
    )


def _launch(kernel: Any, n_programs: int, values: dict[str, Any]) -> Launch:
    """`values` in the order of the kernel's parameters."""
    arguments = {name: values[name] for name in kernel.arg_names}
    assert len(arguments) == len(values)
    return Launch(kernel, (n_programs, 1, 1), arguments)


def _padded(T: int, tile: BackwardTile) -> int:
    return -(-T // tile.queries) * tile.queries


def _together(fit: int, group: int, n_heads: int) -> int:
    """Heads whose tiles stand together: groups that share K and V, as many as fit, one at least."""
    return min(n_heads, max(1, fit) * group)
