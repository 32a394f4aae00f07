"""What an MLP casts between its products, against float64: the numbers, both layouts, sums."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.fp8_cast import (
    E4M3,
    E5M2,
    absolute_maximum,
    cast_hidden,
    cast_hidden_gradient,
    cast_norm,
    cast_tensorwise,
    gradient_bound,
    hidden_bound,
    hidden_maxima,
    longest_row,
    mlp,
)
from tests.kernels.fp8_cast.conftest import KERNELS
from tests.kernels.fp8_cast.rounding import FP32, ROUNDING, assert_cast, rounded
from tests.kernels.interpreter import Platform, platforms

SHAPES = [(1, 1), (16, 32), (17, 40), (5, 66), (70, 3)]
GATED = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
WAYS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float32)],
    ids=["triton", "torch", "torch-fp32"],
)
# the kernels cast 16 bits
platform = platforms(*KERNELS, cpu=(torch.bfloat16,), cuda=(torch.bfloat16,))


def operands(
    shape: tuple[int, int], gated: bool, platform: Platform, dtype: torch.dtype = torch.bfloat16,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z and d; several tiles of a GPU's, odd sizes stay odd."""
    N, width = (shape[0] * 31, shape[1] * 33) if platform.on_gpu else shape
    options: Any = {"device": platform.device, "dtype": torch.float32}
    z = torch.randn(N, width * (2 if gated else 1), **options) * spread
    return z.to(dtype), torch.randn(N, width, **options).to(dtype)


def exact(z: Tensor, gated: bool, d: Tensor | None = None) -> Tensor:
    """a, or dz, by PyTorch in float64."""
    z = z.detach().double().requires_grad_()
    if gated:
        g, u = z.chunk(2, -1)
        a = F.silu(g) * u
    else:
        a = F.gelu(z, approximate="tanh")
    return a.detach() if d is None else torch.autograd.grad(a, z, d.double())[0]


@GATED
@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_cast_as_they_are_computed(
    shape: tuple[int, int], backend: str, dtype: torch.dtype, gated: bool, platform: Platform
) -> None:
    z, _ = operands(shape, gated, platform, dtype)
    maximum, slope = hidden_maxima(z, gated=gated, backend=backend)
    right = exact(z, gated)
    peak, steepest = right.abs().max(), steepest_of(z, gated)
    reached = gated or peak.item() > mlp.LOW  # else what a scale is made of is no number of a
    if not gated:
        peak, steepest = peak.clamp(min=mlp.LOW), torch.full_like(peak, mlp.STEEP)
    all_ = platform.on_gpu or backend == "torch"
    assert abs(maximum.double() - peak) <= rounded(z, all_) * peak
    assert abs(slope.double() - steepest) <= FP32 * steepest
    made = cast_hidden(z, maximum, gated=gated, backend=backend)
    assert made.rows is not None and made.rows.dtype == E4M3
    assert made.rows.float().abs().max().item() == 448 or not reached
    assert_cast(made, right, peak, z, platform.on_gpu or backend == "torch")
    alone = cast_hidden(z, maximum, gated=gated, columns=False, backend=backend)
    assert alone.columns is None and alone.rows is not None
    assert torch.equal(alone.rows.float(), made.rows.float())
    turned = cast_hidden(z, maximum, gated=gated, rows=False, backend=backend)
    assert turned.rows is None and turned.columns is not None and made.columns is not None
    assert torch.equal(turned.columns.float(), made.columns.float())


def steepest_of(z: Tensor, gated: bool) -> Tensor:
    """The largest derivative of a number of a."""
    ones = torch.ones(z.size(0), z.size(1) // (2 if gated else 1), device=z.device)
    return exact(z, gated, ones).abs().max()


@GATED
@WAYS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("far", [1.0, 2.0**11])
def test_their_gradients_too(
    far: float,
    shape: tuple[int, int],
    backend: str,
    dtype: torch.dtype,
    gated: bool,
    platform: Platform,
) -> None:
    """By a scale of their largest number, and of a bound far above it."""
    z, d = operands(shape, gated, platform, dtype)
    right = exact(z, gated, d)
    bound = (far * right.abs().max()).float()
    made, sums = cast_hidden_gradient(z, d, bound, gated=gated, sums=True, backend=backend)
    alone, nothing = cast_hidden_gradient(z, d, bound, gated=gated, backend=backend)
    assert nothing is None and sums is not None
    assert made.rows is not None and alone.rows is not None and made.rows.dtype == E5M2
    assert torch.equal(alone.rows.float(), made.rows.float())
    assert_cast(made, right, bound.item(), z, platform.on_gpu or backend == "torch")
    # 2^11 too far and E5M2 is as exact: all but what is 2^17 below the largest number
    error = (made.rows.double() * made.scale.double() - right).abs()
    large = right.abs() > right.abs().max() * 2.0**-17
    if platform.on_gpu or backend == "torch":
        assert (error <= (ROUNDING[E5M2][0] + rounded(z, True)) * right.abs())[large].all()
    error = (sums.double() - right.sum(0)).abs()
    assert (error <= (FP32 + right.size(0) * 2.0**-24) * right.abs().sum(0)).all()


def test_what_is_known_of_gelu() -> None:
    z = torch.linspace(-12.0, 12.0, 2_400_001, dtype=torch.float64)
    a, slopes = exact(z[None], False), exact(z[None], False, torch.ones_like(z[None]))
    assert 0.999 * mlp.LOW < a[z[None] < 0].abs().max() < mlp.LOW
    assert 0.999 * mlp.STEEP < slopes.abs().max() < mlp.STEEP
    assert (a[0, 1_200_000:].diff() > 0).all()  # from 0 on the larger z has the larger a


@GATED
def test_no_gradient_exceeds_its_bound(gated: bool, platform: Platform) -> None:
    """Products of equal numbers come closest to it, but for what is rounded."""
    tokens, features, hidden = 16, 32, 48
    options: Any = {"device": platform.device, "dtype": platform.dtype}
    dy, weight = torch.full((tokens, features), -0.7, **options), torch.ones(
        features, hidden, **options
    )  # fmt: skip
    dy8 = cast_tensorwise(dy, absolute_maximum(dy), E5M2, backend="torch")
    weight8 = cast_tensorwise(weight, absolute_maximum(weight), E4M3, backend="torch")
    d = (dy.double() @ weight.double()).to(platform.dtype)
    z = torch.full((tokens, hidden * (2 if gated else 1)), 1.4, **options)  # where gelu' is largest
    _, slope = hidden_maxima(z, gated=gated, backend="torch")
    bound = gradient_bound(slope, dy8.scale, weight8.scale, features).double()
    largest = exact(z, gated, d).abs().max()
    assert largest <= bound <= 1.03 * largest


@GATED
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float, gated: bool, platform: Platform) -> None:
    """Every product with the result is NaN or infinite, so the step is skipped, not poisoned."""
    z, d = operands((17, 40), gated, platform)
    worse = z.clone()
    worse[3, 5] = bad
    maximum, slope = hidden_maxima(worse, gated=gated, backend="triton")
    if bad != -math.inf:  # GELU of it, and SiLU, are 0, or NaN where they are cast
        assert not maximum.isfinite()
        assert not slope.isfinite() or not gated
    d[3, 5] = bad
    made, _ = cast_hidden_gradient(z, d, slope * math.inf, gated=gated, backend="triton")
    assert not made.scale.isfinite()
    if not math.isnan(bad):
        return  # a GPU casts an infinity to the largest number: its bound has to be infinite
    made, _ = cast_hidden_gradient(z, d, torch.ones_like(slope), gated=gated, backend="triton")
    assert made.rows is not None and made.columns is not None
    assert made.rows[3, 5].float().isnan() and made.columns[5, 3].float().isnan()


@GATED
def test_large_inputs_do_not_overflow_on_the_way(gated: bool, platform: Platform) -> None:
    z, d = operands((17, 40), gated, platform, spread=1e4)
    maximum, _ = hidden_maxima(z, gated=gated, backend="triton")
    made, right = cast_hidden(z, maximum, gated=gated, backend="triton"), exact(z, gated)
    assert_cast(made, right, right.abs().max(), z, platform.on_gpu)
    right = exact(z, gated, d)
    bound = right.abs().max().float()
    made, _ = cast_hidden_gradient(z, d, bound, gated=gated, backend="triton")
    assert_cast(made, right, bound.item(), z, platform.on_gpu)


@GATED
def test_library_checks_pass(gated: bool, platform: Platform) -> None:
    z, d = operands((16, 32), gated, platform)
    torch.library.opcheck(*((mlp._gated_maxima, (z,)) if gated else (mlp._largest, (z,))))
    maximum, _ = hidden_maxima(z, gated=gated, backend="triton")
    for rows, columns in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(mlp._cast, (z, None, maximum, gated, rows, columns, False))
    for sums in (True, False):
        torch.library.opcheck(mlp._cast, (z, d, maximum, gated, True, True, sums))


REFUSED: dict[str, tuple[Any, str]] = {
    "backend": (lambda z: hidden_maxima(z, gated=False, backend="cuda"), "'cuda' is not one of"),
    "float64": (lambda z: hidden_maxima(z.double(), gated=False), "z is torch.float64: fp32, bf"),
    "fp32": (
        lambda z: hidden_maxima(z, gated=False, backend="triton"),
        "z is torch.float32: backend=triton casts 16 bits, backend=torch any",
    ),
    "odd": (lambda z: hidden_maxima(z, gated=True), r"z is \[4, 3\]: \[N, 2 F\], gate and value"),
    "empty": (lambda z: hidden_maxima(z[:0], gated=False), r"z is \[0, 3\]: \[N, F\] is needed"),
    "nothing": (
        lambda z: cast_hidden(z, z.max(), gated=False, rows=False, columns=False),
        "nothing is left to write",
    ),
    "d": (
        lambda z: cast_hidden_gradient(z, z[:, :2], z.max(), gated=False),
        r"d is torch.float32 \[4, 2\]: torch.float32 \[4, 3\] is needed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call(torch.ones(4, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_no_activation_exceeds_the_bound_of_lengths(
    aligned: bool, bias: bool, platform: Platform
) -> None:
    """Of a norm's output and a weight, both cast; reached within roundings where a row of one lies
    along a row of the other."""
    N, K, features = 48, 64, 80
    options: Any = {"device": platform.device}
    x, weight = torch.randn(N, K, **options) * 3, torch.randn(features, K, **options) * 0.3
    if aligned:
        weight[5] = 2 * (x[7] - x[7].mean())
    b = torch.randn(features, **options) if bias else None
    ones = torch.ones(K, **options)
    call: Any = {"eps": 1e-5, "centers": True, "backend": "torch"}
    x8, _, _, length = cast_norm(x.bfloat16(), ones, None, **call)
    weight8 = cast_tensorwise(weight, absolute_maximum(weight), E4M3, backend="torch")
    assert x8.rows is not None and weight8.rows is not None
    z = (x8.rows.double() * x8.scale.double()) @ (weight8.rows.double() * weight8.scale).t()
    z = (z if b is None else z + b).bfloat16()
    maximum, slope = hidden_bound(length, longest_row(weight), b)
    most, steepest = hidden_maxima(z, gated=False, backend="torch")
    assert most <= maximum and slope == steepest
    if aligned:
        assert most > 0.8 * maximum
