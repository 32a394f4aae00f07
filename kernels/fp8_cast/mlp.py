"""The casts of what an MLP has between its products, where 16 bits of it are never written.

The first product gives z. Forward casts a = gelu(z), or silu(g) u of z = [g | u] (`gated`), for the
second product; backward casts dz, which that of a, d, and z give. Each is read twice, once for the
largest number and once for the cast: 6 bytes a number of a from z, where a written in between,
read for its maximum and for its cast would be 10; 10 where 14 for dz.

As in op.py no function has a gradient of its own. Dims: N tokens, F hidden features.
"""

import torch
from torch import Tensor

from kernels.fp8_cast import reference
from kernels.fp8_cast.op import BACKENDS, E4M3, E5M2, INPUTS, Scaled
from kernels.operation import operation, register_fake


def hidden_maximum(z: Tensor, *, gated: bool, backend: str = "auto") -> Tensor:
    """max |a|, 0-dim fp32; NaN where a holds one.

    Args:
        z: [N, F], gated [N, 2 F], 16-bit or fp32.
        backend: auto (triton for 16 bits on CUDA, torch elsewhere), triton or torch.

    Raises:
        ValueError: arguments that make no sense.
    """
    _check(z, None, gated, backend)
    if _takes_triton(z, backend):
        maximum: Tensor = _maximum(z.contiguous(), None, gated, False)[0]
        return maximum
    return reference.absolute_maximum(reference.activated(z, gated))


def cast_hidden(
    z: Tensor, maximum: Tensor, *, gated: bool, columns: bool = True, backend: str = "auto"
) -> Scaled:
    """a [N, F] in E4M3, with its transpose where `columns`; maximum: `hidden_maximum(z)`."""
    _check(z, None, gated, backend)
    if _takes_triton(z, backend):
        q, qt, scale = _cast(z.contiguous(), None, maximum, gated, columns)
        return Scaled(q, qt if columns else None, scale)
    q, scale = reference.tensorwise(reference.activated(z, gated), maximum, E4M3)
    return Scaled(q, q.t().contiguous() if columns else None, scale)


def hidden_gradient_maximum(
    z: Tensor, d: Tensor, *, gated: bool, sums: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """max |dz|, 0-dim fp32, and where `sums` the sum of dz over tokens, fp32, of z's width.

    d: [N, F] in z's dtype, the gradient of a; the rest as in `hidden_maximum`.
    """
    _check(z, d, gated, backend)
    if _takes_triton(z, backend):
        maximum, total = _maximum(z.contiguous(), d.contiguous(), gated, sums)
        return maximum, total if sums else None
    dz = reference.gradient(z, d, gated)
    return reference.absolute_maximum(dz), dz.sum(0) if sums else None


def cast_hidden_gradient(
    z: Tensor, d: Tensor, maximum: Tensor, *, gated: bool, backend: str = "auto"
) -> Scaled:
    """dz, of z's shape, in E5M2, with its transpose; maximum: `hidden_gradient_maximum(z, d)`."""
    _check(z, d, gated, backend)
    if _takes_triton(z, backend):
        return Scaled(*_cast(z.contiguous(), d.contiguous(), maximum, gated, True))
    q, scale = reference.tensorwise(reference.gradient(z, d, gated), maximum, E5M2)
    return Scaled(q, q.t().contiguous(), scale)


def _check(z: Tensor, d: Tensor | None, gated: bool, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if z.dtype not in INPUTS:
        raise ValueError(f"z is {z.dtype}: fp32, bf16 or fp16 is cast to fp8")
    if z.dim() != 2 or z.numel() == 0 or (gated and z.size(1) % 2):
        what = "[N, 2 F], gate and value side by side" if gated else "[N, F]"
        raise ValueError(f"z is {list(z.shape)}: {what} is needed, with numbers in it")
    F = z.size(1) // 2 if gated else z.size(1)
    if d is not None and (d.shape != (z.size(0), F) or d.dtype != z.dtype):
        raise ValueError(f"d is {d.dtype} {list(d.shape)}: {z.dtype} [{z.size(0)}, {F}] is needed")


def _takes_triton(z: Tensor, backend: str) -> bool:
    return z.is_cuda and z.itemsize == 2 if backend == "auto" else backend == "triton"


def _kernels():
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.fp8_cast import mlp_kernel

    return mlp_kernel


@operation("flashtrain_fp8::hidden_maximum")
def _maximum(z: Tensor, d: Tensor | None, gated: bool, sums: bool) -> tuple[Tensor, Tensor]:
    """Of a, or of dz where d is given; then the sum of that over tokens, [0] if not asked for."""
    return _kernels().maximum(z, d, gated, sums)


@register_fake(_maximum)
def _(z: Tensor, d: Tensor | None, gated: bool, sums: bool) -> tuple[Tensor, Tensor]:
    fp32 = torch.float32
    return z.new_empty((), dtype=fp32), z.new_empty(z.size(1) if sums else 0, dtype=fp32)


@operation("flashtrain_fp8::cast_hidden")
def _cast(
    z: Tensor, d: Tensor | None, maximum: Tensor, gated: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """a, or dz where d is given; without `columns` the transpose is [0]."""
    q, qt, scale = _empty(z, d, maximum, gated, columns)
    _kernels().cast(z, d, maximum, q, qt if columns else None, scale, gated)
    return q, qt, scale


@register_fake(_cast)
def _empty(
    z: Tensor, d: Tensor | None, maximum: Tensor, gated: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, width = z.size(0), z.size(1) // 2 if gated and d is None else z.size(1)
    dtype = E4M3 if d is None else E5M2
    q = z.new_empty((N, width), dtype=dtype)
    qt = z.new_empty((width, N) if columns else (0,), dtype=dtype)
    return q, qt, z.new_empty((), dtype=torch.float32)
