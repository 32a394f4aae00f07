"""Rotary positions of the first heads of a tensor, as two ops: where they lie, and into a new one.

Neither has a gradient of its own: autograd sees `kernels.attention.attention_packed`, whose forward
and backward turn heads with them.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.operation import operation, register_fake
from kernels.rope.reference import rotate, turned_back

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A namespace of their own: what attention registers is kept through activation checkpointing.


@operation("flashtrain_rope::rotate_heads_", mutates_args=("x",))
def rotate_heads_(
    x: Tensor, table: Tensor, heads: int, back: bool = False, backend: str = "auto"
) -> None:
    """Turn the first `heads` heads of x where they lie.

    Args:
        x: [B, T, at least `heads`, D], contiguous in D.
        table: [T, R] or [B, T, R] float32, cos then sin, as in reference.py.
        back: by the transpose, as gradients are turned.
        backend: auto (triton on CUDA, torch elsewhere and for fp64), triton or torch.

    Raises:
        ValueError: a table that does not fit x, or a backend that cannot turn it.
    """
    check_table(table, x)
    if _by_kernel(x, backend):
        _kernel().rotate(x, x, table, heads, back)
    else:
        x[:, :, :heads] = rotate(x[:, :, :heads], turned_back(table) if back else table)


@operation("flashtrain_rope::rotate_heads")
def rotate_heads(x: Tensor, table: Tensor, heads: int, backend: str = "auto") -> Tensor:
    """x with its first `heads` heads turned, contiguous. Arguments as for `rotate_heads_`."""
    check_table(table, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    R = table.shape[-1]
    if _by_kernel(x, backend):
        _kernel().rotate(x, y, table, heads, False)
        y[:, :, :heads, R:] = x[:, :, :heads, R:]
    else:
        y[:, :, :heads] = rotate(x[:, :, :heads], table)
    y[:, :, heads:] = x[:, :, heads:]
    return y


@register_fake(rotate_heads_)
def _(x: Tensor, table: Tensor, heads: int, back: bool = False, backend: str = "auto") -> None:
    return None


@register_fake(rotate_heads)
def _(x: Tensor, table: Tensor, heads: int, backend: str = "auto") -> Tensor:
    return x.new_empty(x.shape)


def check_table(table: Tensor, x: Tensor) -> None:
    """Raises ValueError where a rotation does not fit x [B, T, H, D]."""
    B, T, _, D = x.shape
    R = table.shape[-1]
    rows = tuple(table.shape[:-1])
    # not `in`, which torch.compile gets wrong where some of the numbers are symbols
    fits = (rows == (T,) or rows == (B, T)) and R <= D and R % 2 == 0
    if not fits or table.dtype != torch.float32:
        raise ValueError(
            f"a rotation of {table.dtype} {list(table.shape)} is not for heads {list(x.shape)}: it "
            f"must be float32 [{T}, R] or [{B}, {T}, R], R even and at most {D}"
        )


def _by_kernel(x: Tensor, backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    fits = x.dtype in DTYPES and x.stride(3) == 1
    if backend == "triton" and not fits:
        raise ValueError(
            f"backend='triton' turns heads in fp32, bf16 or fp16, contiguous in their last "
            f"dimension, not {x.dtype} with strides {x.stride()}: take backend='torch'"
        )
    return backend == "triton" or (backend == "auto" and x.is_cuda and fits)


def _kernel() -> Any:
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.rope import kernel

    return kernel
