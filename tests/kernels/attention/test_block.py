"""Gradients block by block add up to those of the whole, as accurately as eager PyTorch's."""

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_block_backward
from tests.accuracy import assert_as_accurate
from tests.kernels.attention.cases import Case, Inputs, inputs_of, run_reference
from tests.kernels.attention.test_accuracy import float32_terms
from tests.kernels.interpreter import Platform

CASES = {
    "grouped": Case(T=64, S=64, B=2, H=4, H_kv=2, options={"causal": True}),
    "ragged": Case(T=70, S=70, H_kv=1, options={"causal": True}),
    "wide values": Case(T=40, S=40, Dv=40, options={"causal": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_blocks_add_up(name: str, backend: str) -> None:
    check(inputs_of(CASES[name], "cpu", torch.float32), backend, factor=3.0)


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_the_kernels_add_up(name: str, platform: Platform) -> None:
    case = CASES[name].on_gpu() if platform.on_gpu else CASES[name]
    check(inputs_of(case, platform.device, platform.dtype), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
def test_blocks_of_a_long_sequence_add_up(head_size: int) -> None:
    case = Case(T=4096, S=4096, D=head_size, H=2, H_kv=1, options={"causal": True})
    check(inputs_of(case, "cuda", torch.bfloat16), "auto")


def check(inputs: Inputs, backend: str, factor: float = 2.0) -> None:
    """Two blocks on the diagonal and the one below them."""
    q, k, v = (inputs.tensors[name] for name in "qkv")
    half = q.shape[1] // 2
    early, late = slice(0, half), slice(half, None)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    ours: dict[str, Tensor] = {
        f"d{name}": torch.zeros_like(inputs.tensors[name], dtype=torch.float32) for name in "qkv"
    }
    for rows, columns, causal in ((early, early, True), (late, late, True), (late, early, False)):
        terms = attention_block_backward(
            inputs.d_out[:, rows], q[:, rows], k[:, columns], v[:, columns],
            out[:, rows], lse[:, :, rows], causal=causal, backend=backend,
        )  # fmt: skip
        for key, places, term in zip(ours, (rows, columns, columns), terms, strict=True):
            ours[key][:, places] += term
    inputs.d_lse.zero_()
    eager, exact = run_reference(inputs, q.dtype), run_reference(inputs, torch.float64)
    bounds = float32_terms(inputs) if q.dtype == torch.float32 else {}
    for key, found in ours.items():
        assert_as_accurate(
            found.to(q.dtype), eager[key], exact[key], factor=factor, name=key,
            terms=bounds.get(key, 0.0),
        )  # fmt: skip


MASKED = {
    "more keys": Case(T=33, S=70, H=4, options={"causal": True}),
    "full": Case(T=33, S=70, options={"causal": False}),
    "alibi": Case(T=33, S=70, H=4, options={"causal": True}, alibi=True),
    "documents": Case(T=70, S=70, B=2, options={"causal": True}, alibi=True, documents=True),
    "key mask": Case(T=40, S=40, B=2, H_kv=1, options={"causal": True}, key_mask=True),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_block_with_a_mask(name: str, backend: str) -> None:
    check_masked(inputs_of(MASKED[name], "cpu", torch.float32), backend, factor=3.0)


@pytest.mark.parametrize("name", MASKED)
def test_a_block_with_a_mask_in_the_kernels(name: str, platform: Platform) -> None:
    case = MASKED[name].on_gpu() if platform.on_gpu else MASKED[name]
    inputs = inputs_of(case, platform.device, platform.dtype)
    check_masked(inputs, "auto" if platform.on_gpu and not case.key_mask else "triton")


def check_masked(inputs: Inputs, backend: str, factor: float = 2.0) -> None:
    """The block is all there is, but for two queries, which are told that they see nothing."""
    q, k, v = (inputs.tensors[name] for name in "qkv")
    out, lse = attention(q, k, v, return_lse=True, backend=backend, **inputs.extras)
    lse[lse.isinf()] = float("inf")  # the mask hides all keys
    lse[:, :, 5:7] = float("inf")
    found = attention_block_backward(
        inputs.d_out, q, k, v, out, lse, backend=backend, **inputs.extras
    )
    inputs.d_out[:, 5:7] = 0  # the same in every gradient
    inputs.d_lse.zero_()
    eager, exact = run_reference(inputs, q.dtype), run_reference(inputs, torch.float64)
    bounds = float32_terms(inputs) if q.dtype == torch.float32 else {}
    for name, grad in zip(("dq", "dk", "dv"), found, strict=True):
        assert_as_accurate(
            grad, eager[name], exact[name], factor=factor, name=name, terms=bounds.get(name, 0.0)
        )


def test_a_causal_block_has_a_key_for_every_query() -> None:
    q, k = torch.zeros(1, 6, 2, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="6 queries and 4 keys has queries that see nothing"):
        attention_block_backward(q, q, k, k, q, torch.zeros(1, 2, 6), causal=True)
