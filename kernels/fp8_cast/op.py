"""The casts as `torch.library` ops: checks, choice of backend, fakes for torch.compile.

A cast has no gradient: what multiplies fp8 numbers says how its own backward goes
(flashtrain/model/float8_product.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fp8_cast import reference
from kernels.fp8_cast.tiles import ROW_LIMIT
from kernels.operation import operation, register_fake

E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa: up to 448, steps of 1/8 to 1/16
E5M2 = torch.float8_e5m2  # up to 57344, steps of 1/4 to 1/8
BACKENDS = ("auto", "triton", "torch")
INPUTS = (torch.float32, torch.bfloat16, torch.float16)


class Scaled(NamedTuple):
    """A matrix x [M, K] = q scale in fp8 with one scale, in the layouts that were asked for."""

    rows: Tensor | None  # q [M, K]
    columns: Tensor | None  # q^T [K, M], contiguous
    scale: Tensor  # 0-dim fp32


def absolute_maximum(x: Tensor, backend: str = "auto") -> Tensor:
    """max |x|, 0-dim fp32, exact; NaN where x holds one.

    backend: triton (one pass of a kernel), torch (PyTorch's operations, which torch.compile may
        fuse into what makes x), or auto: triton on CUDA, torch elsewhere.
    """
    _check(x, None, backend)
    if _takes_triton(x, backend):
        return _maximum(x.contiguous())
    return reference.absolute_maximum(x)


def cast_tensorwise(
    x: Tensor,
    maximum: Tensor,
    dtype: torch.dtype,
    *,
    rows: bool = True,
    columns: bool = True,
    backend: str = "auto",
) -> Scaled:
    """x as fp8 numbers times one scale, as it lies and transposed, in one pass over x.

    Args:
        x: [M, K] fp32, bf16 or fp16, of any strides; contiguous is free.
        maximum: `absolute_maximum(x)`, 0-dim fp32 on x's device.
        dtype: E4M3 or E5M2.
        rows, columns: which of the layouts to write.
        backend: auto (triton on CUDA, torch elsewhere), triton or torch.

    Raises:
        ValueError: arguments that make no sense.
    """
    _check(x, dtype, backend)
    if maximum.shape != () or maximum.dtype != torch.float32:
        raise ValueError(f"maximum is {maximum.dtype} {list(maximum.shape)}: 0-dim fp32 is needed")
    if not rows and not columns:
        raise ValueError("rows=False, columns=False: nothing is left to write")
    if _takes_triton(x, backend):
        q, qt, scale, _ = _tensorwise(x.contiguous(), maximum, dtype, rows, columns, False)
        return Scaled(q if rows else None, qt if columns else None, scale)
    q, scale = reference.tensorwise(x, maximum, dtype)
    return Scaled(q if rows else None, q.t().contiguous() if columns else None, scale)


def cast_gradient(
    dy: Tensor, maximum: Tensor, *, sums: bool, backend: str = "auto"
) -> tuple[Scaled, Tensor | None]:
    """dy [M, K] in E5M2, as it lies and transposed, with its sum over the rows [K] in fp32 where
    `sums`: the gradient of a bias, from the same pass. The rest as of `cast_tensorwise`."""
    if sums and _takes_triton(dy, backend):
        _check(dy, E5M2, backend)
        *made, total = _tensorwise(dy.contiguous(), maximum, E5M2, True, True, True)
        return Scaled(*made), total
    made8 = cast_tensorwise(dy, maximum, E5M2, backend=backend)
    return made8, dy.sum(0, dtype=torch.float32) if sums else None


def cast_rowwise(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x [M, K] -> q [M, K] fp8 and a scale for each row, [M, 1] fp32, in one pass.

    backend: triton, torch, or auto: triton on CUDA, but torch where torch.compile is tracing, since
        a row's maximum fuses with what makes the row.
    Raises ValueError for a row longer than 65536 where Triton is to cast it.
    """
    _check(x, dtype, backend)
    if _takes_triton(x, backend) and not (backend == "auto" and torch.compiler.is_compiling()):
        if x.size(1) > ROW_LIMIT:
            raise ValueError(f"rows of {x.size(1)} are longer than {ROW_LIMIT}: use backend=torch")
        return _rowwise(x.contiguous(), dtype)
    return reference.rowwise(x, dtype)


def cast_columnwise(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`cast_rowwise(x.t())` without x.t() in memory: [M, K] -> q [K, M] and scales [K, 1]."""
    _check(x, dtype, backend)
    if _takes_triton(x, backend):
        return _columnwise(x.contiguous(), dtype)
    return reference.columnwise(x, dtype)


def _check(x: Tensor, dtype: torch.dtype | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if x.dtype not in INPUTS:
        raise ValueError(f"x is {x.dtype}: fp32, bf16 or fp16 is cast to fp8")
    if x.numel() == 0:
        raise ValueError(f"x is {list(x.shape)}: a matrix without numbers has no scale")
    if dtype is not None and dtype not in (E4M3, E5M2):
        raise ValueError(f"dtype={dtype} is neither {E4M3} nor {E5M2}")
    if dtype is not None and x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}: a matrix [M, K] is needed")


def _takes_triton(x: Tensor, backend: str) -> bool:
    return x.is_cuda if backend == "auto" else backend == "triton"


def _kernels():
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.fp8_cast import kernel

    return kernel


# A namespace of their own: what attention registers is kept through activation checkpointing, and a
# cast is to be made again.


@operation("flashtrain_fp8::absolute_maximum")
def _maximum(x: Tensor) -> Tensor:
    return _kernels().absolute_maximum(x)


@register_fake(_maximum)
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@operation("flashtrain_fp8::cast_tensorwise")
def _tensorwise(
    x: Tensor, maximum: Tensor, dtype: torch.dtype, rows: bool, columns: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As it lies, transposed; scale; the sum over the rows. [0]: not wished."""
    q, qt, scale, total = _empty_tensorwise(x, maximum, dtype, rows, columns, sums)
    _kernels().tensorwise(
        x, maximum, q if rows else None, qt if columns else None, scale, total if sums else None
    )
    return q, qt, scale, total


@register_fake(_tensorwise)
def _empty_tensorwise(
    x: Tensor, maximum: Tensor, dtype: torch.dtype, rows: bool, columns: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    q = x.new_empty((M, K) if rows else (0,), dtype=dtype)
    qt = x.new_empty((K, M) if columns else (0,), dtype=dtype)
    total = x.new_empty(K if sums else 0, dtype=torch.float32)
    return q, qt, x.new_empty((), dtype=torch.float32), total


@operation("flashtrain_fp8::cast_rowwise")
def _rowwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, scale = _empty_rowwise(x, dtype)
    _kernels().rowwise(x, q, scale)
    return q, scale


@register_fake(_rowwise)
def _empty_rowwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.size(0), 1), dtype=torch.float32)


@operation("flashtrain_fp8::cast_columnwise")
def _columnwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    qt, scale = _empty_columnwise(x, dtype)
    _kernels().columnwise(x, qt, scale)
    return qt, scale


@register_fake(_columnwise)
def _empty_columnwise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return x.new_empty((K, M), dtype=dtype), x.new_empty((K, 1), dtype=torch.float32)
