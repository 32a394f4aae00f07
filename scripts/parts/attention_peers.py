"""What bench_attention.py races: the shapes, and each backend's call for a shape.

A call takes q, k, v [B, S, H, D] and returns out [B, S, H, D]. A backend that cannot compute a
shape returns the reason instead, or raises it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention, document_bounds, explain

TOKENS, WIDTH = 16384, 2048
WINDOW = 1024  # keys before a query, of the `window` mask
MEAN_DOCUMENT = 512  # tokens, of the `documents` mask
MASKS = ("causal", "full", "window", "documents")
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """16k tokens in sequences of `length`; all masks but `full` are causal too."""

    head_size: int
    mask: str  # of MASKS
    length: int

    @property
    def causal(self) -> bool:
        return self.mask != "full"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """[B, S, H, D]."""
        heads = WIDTH // self.head_size
        return max(TOKENS // self.length, 1), self.length, heads, self.head_size

    @property
    def forward_flops(self) -> float:
        """4 D for each query and key that meet; a causal square of side n counts n^2 / 2."""
        B, S, H, D = self.sizes
        pairs = S * S / 2 if self.causal else S * S
        if self.mask == "documents":
            pairs = sum(n * n for n in document_lengths(S)) / 2
        elif self.mask == "window":
            pairs -= max(S - WINDOW, 0) ** 2 / 2
        return 4.0 * B * H * pairs * D

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `attention` beside q, k, v."""
        found: dict[str, Any] = {"causal": self.causal}
        if self.mask == "window":
            found["window"] = (WINDOW, 0)
        if self.mask == "documents":
            ids = document_ids(self.length).expand(self.sizes[0], -1)
            found["documents"] = document_bounds(ids)  # once for all layers, as the peers' lengths
        return found

    def __str__(self) -> str:
        return f"D={self.head_size} {self.mask} S={self.length}"


@cache
def document_lengths(total: int) -> tuple[int, ...]:
    """total / MEAN_DOCUMENT lengths that add up to total, cut at random places, the same always."""
    n_cuts = max(total // MEAN_DOCUMENT - 1, 0)
    generator = torch.Generator().manual_seed(0)
    cuts = sorted((torch.randperm(total - 1, generator=generator)[:n_cuts] + 1).tolist())
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


@cache
def document_ids(total: int) -> Tensor:
    """[1, total] int32 on the GPU."""
    lengths = torch.tensor(document_lengths(total))
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None].cuda()


@cache
def document_starts(rows: int, total: int) -> Tensor:
    """cu_seqlens of a batch of such rows, [rows x documents + 1] int32 on the GPU."""
    lengths = torch.tensor(document_lengths(total) * rows)
    return F.pad(lengths.cumsum(0), (1, 0)).to("cuda", torch.int32)


def ours(backend: str, shape: Shape) -> Call | str:
    probe = torch.empty(shape.sizes, dtype=torch.bfloat16, device="cuda")
    options = shape.options
    try:
        explain(probe, probe, probe, **options, backend=backend)
    except ValueError as refusal:
        return str(refusal)
    return lambda q, k, v: attention(q, k, v, **options, backend=backend)


def sdpa(backend: SDPBackend, shape: Shape) -> Call | str:
    if shape.mask not in ("causal", "full"):
        return "scaled_dot_product_attention has no such mask"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=shape.causal
            )
        return out.transpose(1, 2)

    return call


def flash2(shape: Shape) -> Call | str:
    """FlashAttention-2 as PyTorch ships it."""
    if shape.mask in ("causal", "full"):
        return sdpa(SDPBackend.FLASH_ATTENTION, shape)
    from torch.nn.attention.varlen import varlen_attn

    B, S, _, _ = shape.sizes
    if shape.mask == "documents":
        starts, longest, left = document_starts(B, S), max(document_lengths(S)), -1
    else:
        starts, longest, left = torch.arange(0, B * S + 1, S, dtype=torch.int32).cuda(), S, WINDOW

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(
            *(x.flatten(0, 1) for x in (q, k, v)),
            starts, starts, longest, longest, window_size=(left, 0),
        )  # fmt: skip
        return out.view(q.shape)

    return call


@cache
def flex(shape: Shape) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else the 8 recompilations of one function end at the third shape
    S = shape.length
    mask = None
    if shape.mask == "documents":
        ids = document_ids(S)[0]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (ids[i] == ids[j])

    elif shape.mask == "window":

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j <= WINDOW)

    else:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i >= j

    if shape.causal:
        mask = create_block_mask(visible, None, None, S, S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)  # a kernel per length, as Flex is best
    return lambda q, k, v: compiled(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask
    ).transpose(1, 2)


def flash4(shape: Shape) -> Call | str:
    """FlashAttention-4's CuTe-DSL kernels; their Python package is optional."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError as missing:
        return f"FlashAttention-4 is not installed: {missing}"

    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    if shape.mask == "documents":
        starts = document_starts(shape.sizes[0], shape.length)
        longest = max(document_lengths(shape.length))

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=starts, cu_seqlens_k=starts,
                max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
            )  # fmt: skip
            return first(out).view(q.shape)

        return packed
    window = (WINDOW, 0) if shape.mask == "window" else (None, None)
    return lambda q, k, v: first(flash_attn_func(q, k, v, causal=shape.causal, window_size=window))


BACKENDS: dict[str, Callable[[Shape], Call | str]] = {
    "hopper": lambda shape: ours("hopper", shape),
    "triton": lambda shape: ours("triton", shape),
    "fa2": flash2,
    "cudnn": lambda shape: sdpa(SDPBackend.CUDNN_ATTENTION, shape),
    "flex": flex,
    "fa4": flash4,
}
