"""The Triton kernels are as accurate as eager PyTorch: out, lse and every gradient."""

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_as_accurate
from tests.kernels.attention.cases import CASES, Case, Inputs, inputs_of, run, run_reference
from tests.kernels.interpreter import Platform

# what float16 and, on GPUs, float32 add over the dtype the other cases run in
FEW = ("causal", "cross, more keys", "alibi", "everything", "bias of pairs", "everything and more")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_eager(name: str, platform: Platform) -> None:
    check(inputs_of(sized(CASES[name], platform), platform.device, platform.dtype))


@pytest.mark.parametrize("name", FEW)
def test_other_dtypes_are_as_accurate_as_eager(name: str, other_platform: Platform) -> None:
    platform = other_platform
    check(inputs_of(sized(CASES[name], platform), platform.device, platform.dtype))


@pytest.mark.parametrize("sizes", [1, 33, 80, 88, 96, (192, 128), 256], ids=str)
def test_every_head_size_is_accurate(sizes: int | tuple[int, int], platform: Platform) -> None:
    T = 300 if platform.on_gpu else 20
    D, Dv = (sizes, sizes) if isinstance(sizes, int) else sizes
    case = Case(T=T, S=T, D=D, Dv=Dv, H=1, H_kv=1, options={"causal": True})
    check(inputs_of(case, platform.device, platform.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_size", [64, 128])
def test_long_sequences_are_accurate(head_size: int, causal: bool, backend: str) -> None:
    case = Case(T=4096, S=4096, D=head_size, H=2, H_kv=1, options={"causal": causal})
    check(inputs_of(case, "cuda", torch.bfloat16), backend)


def sized(case: Case, platform: Platform) -> Case:
    return case.on_gpu() if platform.on_gpu else case


def check(inputs: Inputs, backend: str = "triton") -> None:
    ours = run(inputs, backend)
    eager = run_reference(inputs, inputs.tensors["q"].dtype)
    exact = run_reference(inputs, torch.float64)
    factor = 3.0 if "softcap" in inputs.extras else 2.0
    terms = float32_terms(inputs) if inputs.d_out.dtype == torch.float32 else {}
    if "dsinks" in exact and inputs.d_out.dtype != torch.float32:
        terms["dsinks"] = rounded_out_term(exact["out"], inputs.d_out)
    for name in exact:
        assert_as_accurate(
            ours[name],
            eager[name],
            exact[name],
            factor=factor,
            name=name,
            terms=terms.get(name, 0.0),
        )


def rounded_out_term(out: Tensor, d_out: Tensor) -> float:
    """What the rounding of `out` to 16 bits adds to delta = rowsum(out * d_out) and so to dsinks,
    in units of float32's; with few rows to sum over, eager may be better by luck."""
    one_row = (out * d_out).square().sum(-1).sqrt().max().item()
    return one_row * torch.finfo(d_out.dtype).eps / 2 / torch.finfo(torch.float32).eps


def float32_terms(inputs: Inputs) -> dict[str, float]:
    """How large the terms are that each result sums: P V, P^T dO, dS K and dS^T Q with |P| <= 1."""
    q, k, v = (inputs.tensors[name].abs().max().item() for name in "qkv")
    d_out = inputs.d_out.abs().max().item()
    # dS = P (dO V^T - delta): a sum of D products, of about sqrt(D) times one product's size
    ds = d_out * v  # times scale = D ** -0.5
    terms = {"out": v, "dv": d_out, "dq": ds * k, "dk": ds * q, "dsinks": ds, "dbias": ds}
    scale = 1 / (1 - inputs.extras.get("dropout", 0.0))
    return {name: size * scale for name, size in terms.items()}
