"""Loss and both gradients are as accurate as eager PyTorch with all logits in memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import Platform
from tests.kernels.linear_cross_entropy.cases import (
    CASES,
    SCALE,
    Case,
    Inputs,
    inputs_of,
    run,
    run_in_shards,
    run_loss,
    run_reference,
)


def inputs_on(platform: Platform, case: Case) -> Inputs:
    sized = case.on_gpu() if platform.on_gpu else case
    return inputs_of(sized, platform.device, platform.dtype)


def check(inputs: Inputs, ours: dict[str, Tensor]) -> None:
    eager, exact = (run_reference(inputs, x) for x in (inputs.hidden.dtype, torch.float64))
    # one number may be right by luck: what eager's loss stands for is the spread of its errors
    eager["loss"] = exact["loss"] + loss_spread(inputs)
    gradient = 3.0 if "softcap" in inputs.case.options else 2.0
    for name in exact:
        assert_as_accurate(
            ours[name],
            eager[name],
            exact[name],
            factor=4.0 if name == "loss" else gradient,  # four standard deviations
            name=name,
            terms=terms_of(inputs)[name],
        )


def loss_spread(inputs: Inputs) -> Tensor:
    """Standard deviation of the loss by rounding every logit to the dtype, nothing else."""
    options = {"ignore_index": -100, "softcap": None, "z_loss": 0.0, **inputs.case.options}
    logits = inputs.hidden.double() @ inputs.weight.double().t()

    def losses(logits: Tensor) -> Tensor:
        cap = options["softcap"]
        x = logits if cap is None else cap * torch.tanh(logits / cap)
        lse = x.logsumexp(-1)
        picked = x.gather(-1, inputs.labels.clamp(min=0)[:, None]).squeeze(-1)
        return lse - picked + options["z_loss"] * lse.square()

    errors = losses(logits.to(inputs.hidden.dtype).double()) - losses(logits)
    return errors[inputs.labels != options["ignore_index"]].square().sum().sqrt()


def terms_of(inputs: Inputs) -> dict[str, float]:
    """How large the terms are that each result sums in fp32, and their errors, in roundings.

    Of G, |G| <= 1 + 2 z lse, an error is as many roundings as a logit is large. In units of the
    result's dtype, so that 16-bit gradients get fp32's roundings and no more.
    """
    hidden, weight = (x.abs().max().item() for x in (inputs.hidden, inputs.weight))
    logit = (inputs.hidden @ inputs.weight.t()).abs().max().item()
    fp32 = torch.finfo(torch.float32).eps / torch.finfo(inputs.hidden.dtype).eps
    gradient = max(logit, 1.0) * fp32
    return {
        "loss": 2 * logit * inputs.case.N,
        "d_hidden": weight * gradient,
        "d_weight": hidden * gradient,
    }


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_eager(name: str, backend: str, platform: Platform) -> None:
    inputs = inputs_on(platform, CASES[name])
    check(inputs, run(inputs, backend))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "z_loss": 0.02}], ids=["plain", "both"])
def test_shards_of_the_vocabulary_add_up(
    options: dict[str, float], backend: str, platform: Platform
) -> None:
    inputs = inputs_on(platform, Case(V=120, options=options))
    check(inputs, run_in_shards(inputs, backend, 3))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_loss_alone_is_the_same_loss(backend: str, platform: Platform) -> None:
    inputs = inputs_on(platform, CASES["everything"])
    loss = run(inputs, backend)["loss"]
    with torch.no_grad():
        assert torch.equal(run_loss(inputs, backend), loss)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_counts_when_all_labels_are_ignored(backend: str, platform: Platform) -> None:
    inputs = inputs_on(platform, Case(ignored=2.0))
    for name, result in run(inputs, backend).items():
        assert result.count_nonzero() == 0, name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_strides_will_do(backend: str, platform: Platform) -> None:
    inputs = inputs_on(platform, CASES["ragged"])
    strided = replace(
        inputs,
        hidden=inputs.hidden.t().contiguous().t(),
        weight=inputs.weight.t().contiguous().t(),
        labels=inputs.labels.repeat_interleave(2)[::2],
    )
    check(inputs, run(strided, backend))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_gradient_of_the_loss_is_not_rounded(backend: str, platform: Platform) -> None:
    inputs = inputs_on(platform, CASES["ragged"])
    hidden = inputs.hidden.requires_grad_()
    whole, scaled = (
        torch.autograd.grad(factor * run_loss(inputs, backend), hidden)[0]
        for factor in (1.0, SCALE)
    )
    factor = torch.tensor(SCALE, device=platform.device)  # fp32, as the loss
    assert torch.equal(scaled, (whole.float() * factor).to(platform.dtype))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fp32_weights_get_fp32_gradients(backend: str, platform: Platform) -> None:
    """Master weights: products in hidden's dtype, the gradient summed and handed over in fp32."""
    inputs = inputs_on(platform, CASES["ragged"])
    ours = run(replace(inputs, weight=inputs.weight.float()), backend)
    assert ours["d_weight"].dtype == torch.float32
    assert ours["d_hidden"].dtype == platform.dtype
    rounded = {**ours, "d_weight": ours["d_weight"].to(platform.dtype)}
    check(inputs, rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [50257, 50304, 128256, 262144])
def test_large_vocabularies_on_a_gpu(vocabulary: int) -> None:
    case = Case(N=1500, V=vocabulary, D=256, chunk=512)
    inputs = inputs_of(case, "cuda", torch.bfloat16)
    check(inputs, run(inputs, "triton"))


@pytest.mark.gpu
def test_a_label_outside_makes_the_loss_nan_on_a_gpu() -> None:
    inputs = inputs_of(Case(), "cuda", torch.bfloat16)
    inputs.labels[3] = inputs.case.V
    assert run_loss(inputs, "triton").isnan()
    assert run_loss(inputs, "torch").isnan()


@pytest.mark.gpu
def test_the_host_never_waits_for_a_gpu() -> None:
    inputs = inputs_of(Case(), "cuda", torch.bfloat16)
    run(inputs, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_is_a_chunk_of_logits() -> None:
    """Beside inputs and gradients: one chunk and a few numbers a token."""
    case = Case(N=8192, V=32768, D=128, chunk=512)
    inputs = inputs_of(case, "cuda", torch.bfloat16)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    run_loss(inputs, "triton").backward()  # libraries take their workspaces
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_loss(inputs, "triton").backward()
    taken = torch.cuda.max_memory_allocated() - before
    gradients = hidden.nbytes + 3 * weight.nbytes  # dW: fp32, then its bf16 copy
    logits, chunk = 2 * case.N * case.V, 2 * 512 * case.V
    assert taken < gradients + chunk + 64 * case.N
    assert chunk < logits / 10
