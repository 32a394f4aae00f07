"""A norm's output cast as it is computed, against float64; sums that come with a cast."""

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
    cast_gradient,
    cast_norm,
    cast_tensorwise,
    norm,
)
from tests.kernels.fp8_cast.conftest import KERNELS
from tests.kernels.fp8_cast.rounding import assert_cast
from tests.kernels.interpreter import Platform, platforms

EPS = 1e-5
SHAPES = [(1, 16), (16, 32), (17, 40), (5, 66), (70, 3)]
KINDS = pytest.mark.parametrize("kind", ["layernorm", "no bias", "rmsnorm"])
WAYS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float32)],
    ids=["triton", "torch", "torch-fp32"],
)
# the kernels cast 16 bits
platform = platforms(*KERNELS, cpu=(torch.bfloat16,), cuda=(torch.bfloat16,))


def inputs(
    shape: tuple[int, int], kind: str, platform: Platform, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, off centre, with a row of equal numbers; weight and bias. Several tiles of a GPU's."""
    N, D = (shape[0] * 31, shape[1] * 33) if platform.on_gpu else shape
    options: Any = {"device": platform.device, "dtype": torch.float32}
    x = torch.randn(N, D, **options) * 3 + 1
    x[0] = 0.5
    weight, bias = torch.randn(D, **options), torch.randn(D, **options)
    return x.to(dtype), weight, bias if kind == "layernorm" else None


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """By PyTorch in float64."""
    wide = x.double()
    if kind == "rmsnorm":
        return F.rms_norm(wide, weight.shape, weight.double(), EPS)
    bias = None if bias is None else bias.double()
    return F.layer_norm(wide, weight.shape, weight.double(), bias, EPS)


def bound_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    most = weight.double().abs().max() * math.sqrt(weight.numel())
    return most if bias is None else most + bias.double().abs().max()


@KINDS
@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_is_cast_as_it_is_computed(
    shape: tuple[int, int], backend: str, dtype: torch.dtype, kind: str, platform: Platform
) -> None:
    x, weight, bias = inputs(shape, kind, platform, dtype)
    call: Any = {"eps": EPS, "centers": kind != "rmsnorm", "backend": backend}
    made, mean, rstd, length = cast_norm(x, weight, bias, **call)
    right = exact(x, weight, bias, kind)
    assert made.rows is not None and made.rows.dtype == E4M3
    all_ = platform.on_gpu or backend == "torch"
    # what a row is normalised by is small where its numbers are alike
    wide = x.double()
    centre = wide.mean(1) if kind != "rmsnorm" else torch.zeros_like(wide[:, 0])
    scatter = (wide - centre[:, None]).square().mean(1)
    assert_cast(made, right, bound_of(weight, bias), x, all_)
    torch.testing.assert_close(rstd.double(), (scatter + EPS).rsqrt(), rtol=1e-5, atol=0)
    assert mean.shape == (x.size(0) if kind != "rmsnorm" else 0,)
    if kind != "rmsnorm":
        torch.testing.assert_close(mean.double(), centre, rtol=1e-5, atol=1e-6)
    longest = right.norm(dim=1).max()
    assert longest <= length.double() * (1 + 1e-6)
    alone, *_ = cast_norm(x, weight, bias, columns=False, **call)
    assert alone.columns is None and alone.rows is not None
    assert torch.equal(alone.rows.float(), made.rows.float())


@KINDS
@WAYS
def test_nothing_exceeds_the_bound(
    backend: str, dtype: torch.dtype, kind: str, platform: Platform
) -> None:
    """Reached by a row with a single number in it, at the largest weight."""
    D = 64
    x = torch.zeros(16, D, device=platform.device, dtype=dtype)
    x[:, 3] = 1000.0
    weight = torch.full((D,), 0.25, device=platform.device)
    weight[3] = 3.0
    bias = torch.full((D,), 0.5, device=platform.device) if kind == "layernorm" else None
    made, _, _, length = cast_norm(
        x, weight, bias, eps=EPS, centers=kind != "rmsnorm", backend=backend
    )
    assert made.rows is not None
    largest = made.rows.float().abs().max().item()
    assert largest == 448
    longest = exact(x, weight, bias, kind).norm(dim=1).max().item()
    # of a layernorm with a bias both would have to point one way
    assert 0.8 * length.item() < longest <= length.item() * (1 + 1e-6)


@KINDS
def test_what_is_not_a_number_stays_so(kind: str, platform: Platform) -> None:
    """In its row; of a weight, in all of them, by the scale. Triton's interpreter makes numbers of
    NaN in fp8, so there the row's statistics have to show it."""
    x, weight, bias = inputs((16, 32), kind, platform)
    call: Any = {"eps": EPS, "centers": kind != "rmsnorm", "backend": "triton"}
    spoiled = x.clone()
    spoiled[3, 5] = math.nan
    made, _, rstd, _ = cast_norm(spoiled, weight, bias, **call)
    assert made.rows is not None and made.scale.isfinite()
    assert rstd.isnan().nonzero().tolist() == [[3]]
    if platform.on_gpu:
        assert made.rows.float().isnan().any(1).nonzero().tolist() == [[3]]
    weight[7] = math.nan
    made, *_ = cast_norm(x, weight, bias, **call)
    assert made.scale.isnan()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_is_summed_in_the_pass_that_casts_it(
    shape: tuple[int, int], backend: str, platform: Platform
) -> None:
    dy, *_ = inputs(shape, "rmsnorm", platform)
    maximum = absolute_maximum(dy, backend)
    made, sums = cast_gradient(dy, maximum, sums=True, backend=backend)
    alone, nothing = cast_gradient(dy, maximum, sums=False, backend=backend)
    assert nothing is None and sums is not None and sums.dtype == torch.float32
    plain = cast_tensorwise(dy, maximum, E5M2, backend=backend)
    for one in (made, alone):
        for ours, theirs in zip(one, plain, strict=True):
            assert ours is not None and theirs is not None
            assert torch.equal(ours.float(), theirs.float())
    right = dy.double().sum(0)
    # each of N additions in fp32 is off by 2^-24 of the sum at most
    limit = 2.0**-24 * dy.size(0) * dy.double().abs().sum(0)
    assert ((sums.double() - right).abs() <= limit).all()


def test_library_checks_pass(platform: Platform) -> None:
    for kind in ("layernorm", "rmsnorm"):
        x, weight, bias = inputs((16, 32), kind, platform)
        for columns in (True, False):
            torch.library.opcheck(norm._cast, (x, weight, bias, EPS, kind != "rmsnorm", columns))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of auto, triton, torch"),
    "dtype": ({"x": torch.ones(3, 4).double()}, "x is torch.float64"),
    "vector": ({"x": torch.ones(4)}, r"x is \[4\]: \[N, D\] is needed"),
    "weight": ({"weight": torch.ones(5)}, r"weight \[5\] must be \[4\]"),
    "bias": ({"bias": torch.ones(4), "centers": False}, "RMSNorm .* has no bias"),
    "fp32": ({"backend": "triton"}, "backend=triton takes rows of up to 16384 numbers of 16 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    given, sentence = REFUSED[name]
    call: Any = {"x": torch.ones(3, 4), "weight": torch.ones(4), "bias": None, "centers": True}
    call |= given
    with pytest.raises(ValueError, match=sentence):
        cast_norm(call.pop("x"), call.pop("weight"), call.pop("bias"), eps=EPS, **call)
