"""What a norm gives a product in fp8: cast as it is computed, never written in 16 bits.

Its scale is of a bound, not of the largest number, so that nothing has to be read for that. With h
the normalised row, whose D squares are D in the mean at most,

    |norm(x)| = |h w + b| <= sqrt(D) max |w| + max |b|

which for normal numbers lies 8 times above the largest at D = 2048. An E4M3 number keeps its 3
bits of mantissa down to 2^-14.8 of the largest one; what is below that is off by 2^-18.8 of the
bound at most.

As in op.py no function has a gradient of its own. Dims: N tokens, D features.
"""

import torch
from torch import Tensor

from kernels.fp8_cast import reference
from kernels.fp8_cast.op import BACKENDS, E4M3, INPUTS, Scaled
from kernels.norm.tiles import LONGEST
from kernels.operation import operation, register_fake


def cast_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, centers: bool,
    columns: bool = True, backend: str = "auto",
) -> tuple[Scaled, Tensor, Tensor, Tensor]:  # fmt: skip
    """norm(x) [N, D] in E4M3, as it lies and with `columns` transposed; then what the norm's
    gradient takes (`kernels.norm.norm_gradient`): mean [N] ([0] for RMSNorm) and rstd [N], fp32;
    last what no row of norm(x) is longer than, 0-dim fp32 (`hidden_bound`).

    Args:
        x: [N, D], 16-bit or fp32; weight, bias: [D]; eps, centers: as in `kernels.norm.add_norm`.
        backend: auto (triton for 16 bits on CUDA, torch elsewhere), triton (16 bits) or torch.

    Raises:
        ValueError: arguments that make no sense, or rows longer than 16384 for triton.
    """
    _check(x, weight, bias, centers, backend)
    if _takes_triton(x, backend):
        bias = None if bias is None else bias.contiguous()
        q, qt, scale, mean, rstd, bounds = _cast(
            x.contiguous(), weight.contiguous(), bias, eps, centers, columns
        )
        return Scaled(q, qt if columns else None, scale), mean, rstd, bounds[1]
    y, mean, rstd, bound, length = reference.norm(x, weight, bias, eps, centers)
    q, scale = reference.tensorwise(y, bound, E4M3)
    return Scaled(q, q.t().contiguous() if columns else None, scale), mean, rstd, length


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, centers: bool, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if x.dtype not in INPUTS:
        raise ValueError(f"x is {x.dtype}: the norm of fp32, bf16 or fp16 is cast to fp8")
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"x is {list(x.shape)}: [N, D] is needed, with numbers in it")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[1:]:
            raise ValueError(f"{name} {list(parameter.shape)} must be [{x.size(1)}]")
    if bias is not None and not centers:
        raise ValueError("an RMSNorm (centers=False) has no bias")
    if backend == "triton" and (x.itemsize != 2 or x.size(1) > LONGEST):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}: backend=triton takes rows of up to {LONGEST} numbers "
            "of 16 bits, backend=torch any"
        )


def _takes_triton(x: Tensor, backend: str) -> bool:
    if backend == "auto":
        return x.is_cuda and x.itemsize == 2 and x.size(1) <= LONGEST
    return backend == "triton"


@operation("flashtrain_fp8::cast_norm")
def _cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centers: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As it lies, transposed ([0]: not wished); scale; mean and rstd; [2], bounds of numbers and of
    rows' lengths."""
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.fp8_cast import norm_kernel

    q, qt, scale, mean, rstd, bounds = _empty(x, weight, bias, eps, centers, columns)
    norm_kernel.cast(
        x, weight, bias, eps, q, qt if columns else None, scale, mean if centers else None, rstd,
        bounds,
    )  # fmt: skip
    return q, qt, scale, mean, rstd, bounds


@register_fake(_cast)
def _empty(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centers: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, D = x.shape
    q = x.new_empty(x.shape, dtype=E4M3)
    qt = x.new_empty((D, N) if columns else (0,), dtype=E4M3)
    sizes: list[tuple[int, ...]] = [(), (N if centers else 0,), (N,), (2,)]
    scale, mean, rstd, bounds = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return q, qt, scale, mean, rstd, bounds
