"""What a cast number may be off from float64.

Triton's interpreter rounds to fp8 wrongly where a mantissa carries, and among numbers below the
smallest normal one; so on the CPU the kernels' numbers that would be rounded up to the next power
of two are left out, and the smallest may be off by a whole step. A GPU is held to all of them.
"""

import torch
from torch import Tensor

from kernels.fp8_cast import E4M3, E5M2, Scaled

# relative error of a rounding to nearest, u / (1 + u), and half of the smallest number
ROUNDING = {E4M3: (1 / 17, 2.0**-10), E5M2: (1 / 9, 2.0**-17)}
# of a number before it is rounded: a dozen operations in fp32, an exponential by hardware among
# them, whose 2 units in the last place the exponent's size multiplies
FP32 = 2.0**-18


def rounded(z: Tensor, all_: bool) -> float:
    """Relative error of a number that was rounded to z's dtype before; the interpreter cuts off."""
    return FP32 + (0.0 if z.dtype == torch.float32 else 2.0**-8 if all_ else 2.0**-7)


def assert_cast(made: Scaled, right: Tensor, peak: Tensor | float, z: Tensor, all_: bool) -> None:
    """Within a rounding of `right`, both layouts alike, `peak` the format's largest number."""
    assert made.rows is not None and made.columns is not None
    dtype, before = made.rows.dtype, rounded(z, all_)
    assert made.rows.shape == right.shape
    assert made.columns.is_contiguous()
    assert torch.equal(made.columns.t().float(), made.rows.float())
    top = torch.finfo(dtype).max
    assert abs(made.scale.double() * top - peak) <= before * peak
    relative, smallest = ROUNDING[dtype]
    error = (made.rows.double() * made.scale.double() - right).abs()
    steps = smallest if all_ else 2 * smallest
    limit = (relative + before) * right.abs() + (steps + FP32) * made.scale.double()
    wrong = error > limit
    if not all_:
        mantissa = torch.frexp(right.abs() / made.scale.double()).mantissa
        wrong &= (mantissa < 1 - relative - before) & (mantissa > 0.5 + before)
    assert not wrong.any(), (error / limit)[wrong]
    assert (error > 0.5 * limit).any() or right.numel() < 100  # so the limit can fail
