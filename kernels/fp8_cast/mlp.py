"""The casts of what an MLP has between its products, which is never written in 16 bits.

The first product gives z. Forward casts a = gelu(z), or silu(g) u of z = [g | u] (`gated`), for the
second product: z is read for the largest |a|, and once more for the cast, 6 bytes a number in all,
where a written in between, read for its maximum and for its cast would be 10. GELU grows with z
where z is positive, and nowhere else is |a| above LOW: the largest z gives the largest a.

Where x is a norm's output even that pass is spared: z_j = x u_j + b_j is at most |x| |u_j| + |b_j|
(Cauchy-Schwarz), with the length of a row of x and of U known beforehand (`hidden_bound`). For
random weights of gpt2_124m that is 6.5 times the largest |z|; E4M3 is as exact over 14 powers of
two.

Backward casts dz, which z and d, the gradient of a, give. Its scale is of a bound, not of the
largest number, so that one pass is enough, 6 bytes in place of 12. E5M2 is as exact over 29 powers
of two, so it matters little how far above the largest number the bound lies:

    |dz| <= max |a'| max |d|        |d| = |dY D| <= K max |dY| max |D|        (K summed features)

with all three maxima at hand: that of the derivative comes with the one of a, the others are those
of the scales of what was multiplied. For numbers of either sign the bound is 2^8 to 2^11 too large
at K = 2048, which leaves 2^18 below the largest number before bits are lost.

As in op.py no function has a gradient of its own. Dims: N tokens, F hidden features.
"""

import torch
from torch import Tensor

from kernels.fp8_cast import reference
from kernels.fp8_cast.op import BACKENDS, E4M3, E5M2, INPUTS, Scaled
from kernels.operation import operation, register_fake

# of d, which is rounded to 16 bits, of the scales and of sums in fp32
ROUNDINGS = 1.0 + 2.0**-6
# of E4M3, 2^-4 each, of z and of sums; what is below E4M3's normal numbers adds 1e-4 at most
CAST_ROUNDINGS = (1.0 + 2.0**-4) ** 2 * ROUNDINGS
LOW = 0.1701  # |gelu(z)| for negative z: at most 0.17004
STEEP = 1.1291  # gelu': at most 1.12904


def hidden_maxima(z: Tensor, *, gated: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(max |a|, the largest derivative of a number of a by one of z), each 0-dim fp32; for GELU
    what neither exceeds, max(max |a|, LOW) and STEEP. NaN where there is one.

    Args:
        z: [N, F], gated [N, 2 F], 16-bit or fp32.
        backend: auto (triton for 16 bits on CUDA, torch elsewhere), triton (16 bits) or torch.

    Raises:
        ValueError: arguments that make no sense.
    """
    _check(z, None, gated, backend)
    kernels = _takes_triton(z, backend)
    if gated:
        if kernels:
            peak, steepest = _gated_maxima(z.contiguous()).unbind()
            return peak, steepest
        a, slopes = reference.activated(z, gated)
        return reference.absolute_maximum(a.to(z.dtype)), reference.absolute_maximum(slopes)
    largest = _largest(z.contiguous()) if kernels else z.amax().to(torch.float32).clamp(min=0.0)
    a, _ = reference.activated(largest, gated)
    return a.to(z.dtype).to(torch.float32).clamp(min=LOW), torch.full_like(largest, STEEP)


def hidden_bound(length: Tensor, reach: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `hidden_maxima` gives for GELU, at least, for z = x U^T + bias of x and U in E4M3.

    length: what no row of x is longer than before it was cast, of U reach; 0-dim fp32. bias: [F].
    """
    most = length * reach * CAST_ROUNDINGS
    if bias is not None:
        most = most + reference.absolute_maximum(bias)
    return most.clamp(min=LOW), torch.full_like(most, STEEP)


def longest_row(weight: Tensor) -> Tensor:
    """`reach` of hidden_bound: the length of the longest row of [F, K], 0-dim fp32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).amax()


def cast_hidden(
    z: Tensor, maximum: Tensor, *, gated: bool, rows: bool = True, columns: bool = True,
    backend: str = "auto",
) -> Scaled:  # fmt: skip
    """a [N, F] in E4M3, as it lies where `rows` and transposed where `columns`.

    maximum: the first of `hidden_maxima`. Raises ValueError for neither layout, too.
    """
    _check(z, None, gated, backend)
    if not rows and not columns:
        raise ValueError("rows=False, columns=False: nothing is left to write")
    if _takes_triton(z, backend):
        q, qt, scale, _ = _cast(z.contiguous(), None, maximum, gated, rows, columns, False)
    else:
        a = reference.activated(z, gated)[0].to(z.dtype)
        q, scale = reference.tensorwise(a, maximum, E4M3)
        qt = q.t().contiguous() if columns else q
    return Scaled(q if rows else None, qt if columns else None, scale)


def gradient_bound(slope: Tensor, dy_scale: Tensor, weight_scale: Tensor, features: int) -> Tensor:
    """What no |dz| exceeds, 0-dim fp32, where d is the product of fp8 dY [N, K] and D [K, F].

    slope: the second of `hidden_maxima`; dy_scale, weight_scale: of dY in E5M2 and of D in E4M3;
    features: K.
    """
    largest = torch.finfo(E5M2).max * torch.finfo(E4M3).max * features * ROUNDINGS
    return slope * (dy_scale * weight_scale) * largest


def cast_hidden_gradient(
    z: Tensor, d: Tensor, bound: Tensor, *, gated: bool, sums: bool = False, backend: str = "auto"
) -> tuple[Scaled, Tensor | None]:
    """dz, of z's shape, in E5M2, with its transpose, and its sum over tokens in fp32 where `sums`.

    d: [N, F] in z's dtype, the gradient of a; bound: `gradient_bound`, or what else no |dz|
    exceeds, 0-dim fp32.
    """
    _check(z, d, gated, backend)
    if _takes_triton(z, backend):
        *made, total = _cast(z.contiguous(), d.contiguous(), bound, gated, True, True, sums)
        return Scaled(*made), total if sums else None
    dz = reference.gradient(z, d, gated)
    q, scale = reference.tensorwise(dz.to(z.dtype), bound, E5M2)
    return Scaled(q, q.t().contiguous(), scale), dz.sum(0) if sums else None


def _check(z: Tensor, d: Tensor | None, gated: bool, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if z.dtype not in INPUTS:
        raise ValueError(f"z is {z.dtype}: fp32, bf16 or fp16 is cast to fp8")
    if z.dim() != 2 or z.numel() == 0 or (gated and z.size(1) % 2):
        what = "[N, 2 F], gate and value side by side" if gated else "[N, F]"
        raise ValueError(f"z is {list(z.shape)}: {what} is needed, with numbers in it")
    if backend == "triton" and z.itemsize != 2:
        raise ValueError(f"z is {z.dtype}: backend=triton casts 16 bits, backend=torch any")
    F = z.size(1) // 2 if gated else z.size(1)
    if d is not None and (d.shape != (z.size(0), F) or d.dtype != z.dtype):
        raise ValueError(f"d is {d.dtype} {list(d.shape)}: {z.dtype} [{z.size(0)}, {F}] is needed")


def _takes_triton(z: Tensor, backend: str) -> bool:
    return z.is_cuda and z.itemsize == 2 if backend == "auto" else backend == "triton"


def _kernels():
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.fp8_cast import mlp_kernel

    return mlp_kernel


@operation("flashtrain_fp8::largest")
def _largest(z: Tensor) -> Tensor:
    """max(z, 0), 0-dim fp32; NaN where z holds one."""
    from kernels.fp8_cast import kernel

    return kernel.absolute_maximum(z, positive=True)


@register_fake(_largest)
def _(z: Tensor) -> Tensor:
    return z.new_empty((), dtype=torch.float32)


@operation("flashtrain_fp8::gated_maxima")
def _gated_maxima(z: Tensor) -> Tensor:
    return _kernels().gated_maxima(z)


@register_fake(_gated_maxima)
def _(z: Tensor) -> Tensor:
    return z.new_empty(2, dtype=torch.float32)


@operation("flashtrain_fp8::cast_hidden")
def _cast(
    z: Tensor, d: Tensor | None, maximum: Tensor, gated: bool, rows: bool, columns: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, or dz where d is given, in z's dtype and then fp8: as it lies, transposed; scale; sums.
    [0]: not wished."""
    q, qt, scale, total = _empty(z, d, maximum, gated, rows, columns, sums)
    _kernels().cast(
        z, d, maximum, q if rows else None, qt if columns else None, scale,
        total if sums else None, gated,
    )  # fmt: skip
    return q, qt, scale, total


@register_fake(_cast)
def _empty(
    z: Tensor, d: Tensor | None, maximum: Tensor, gated: bool, rows: bool, columns: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, width = z.size(0), z.size(1) // 2 if gated and d is None else z.size(1)
    dtype, fp32 = E4M3 if d is None else E5M2, torch.float32
    q = z.new_empty((N, width) if rows else (0,), dtype=dtype)
    qt = z.new_empty((width, N) if columns else (0,), dtype=dtype)
    return q, qt, z.new_empty((), dtype=fp32), z.new_empty(width if sums else 0, dtype=fp32)
