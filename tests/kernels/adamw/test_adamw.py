"""The step of AdamW against torch's own in float64, in one pass and in plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import adamw_

OPTIONS: dict[str, Any] = {
    "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
}  # fmt: skip
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
STEPS = 4


def tensors(n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, v = (torch.zeros(n, device=device, dtype=dtype) for _ in range(2))
    return torch.randn(n, device=device), m, v, torch.zeros((), device=device)


def gradients(n: int, device: str) -> list[Tensor]:
    """Of all sizes."""
    made = [torch.randn(n, device=device) for _ in range(STEPS)]
    return [g * torch.randn(n, device=device).mul(3).exp() for g in made]


def steps(
    p: Tensor, m: Tensor, v: Tensor, step: Tensor, given: list[Tensor], **options: Any
) -> None:
    for gradient in given:
        step += 1
        adamw_(p, gradient, m, v, step, **{**OPTIONS, **options})


@BACKENDS
@pytest.mark.parametrize("n", [1, 1024, 2500])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_fp32_moments_give_torchs_adamw(n: int, beta1: float, backend: str, device: str) -> None:
    p, m, v, step = tensors(n, device, torch.float32)
    given = gradients(n, device)
    exact = p.double().clone().requires_grad_()
    eager = p.clone().requires_grad_()
    for parameter in (exact, eager):
        optimizer = torch.optim.AdamW(
            [parameter], lr=0.01, betas=(beta1, 0.95), eps=1e-8, weight_decay=0.1
        )
        for gradient in given:
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    steps(p, m, v, step, given, beta1=beta1, backend=backend)
    error, base = ((x.detach() - exact.detach()).abs().max() for x in (p, eager))
    # a step is lr at most, made of a dozen roundings; the parameter is rounded once a step
    limit = 2 * base + STEPS * (12 * 2.0**-23 * 0.01 * 3 + 2.0**-24 * p.abs().max())
    assert error <= limit, (error, limit)


@BACKENDS
def test_bf16_moments_are_those_of_fp32_rounded(backend: str, device: str) -> None:
    """One step from the same bf16 moments: the parameter takes them unrounded."""
    n = 2500
    p, m, v, step = tensors(n, device, torch.bfloat16)
    first, second = gradients(n, device)[:2]
    steps(p, m, v, step, [first], backend=backend)
    wide_p, wide_m, wide_v, wide_step = p.clone(), m.float(), v.float(), step.clone()
    steps(p, m, v, step, [second], backend=backend)
    steps(wide_p, wide_m, wide_v, wide_step, [second], backend=backend)
    assert torch.equal(p, wide_p)
    for ours, wide in ((m, wide_m), (v, wide_v)):
        assert ours.dtype == torch.bfloat16
        if device == "cpu" and backend == "triton":  # the interpreter cuts bits off
            wide = (wide.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(ours, wide.bfloat16())


@BACKENDS
def test_any_gradient_will_do(backend: str, device: str) -> None:
    p, m, v, step = (x.clone() for x in tensors(40, device, torch.bfloat16))
    p, m, v = (x.view(5, 8).contiguous() for x in (p, m, v))
    other = [x.clone() for x in (p, m, v, step)]
    gradient = torch.randn(8, 5, device=device).bfloat16()
    steps(p, m, v, step, [gradient.t()], backend=backend)
    steps(*other, [gradient.t().float().contiguous()], backend=backend)  # type: ignore[arg-type]
    for ours, theirs in zip((p, m, v), other, strict=False):
        assert torch.equal(ours, theirs)


@BACKENDS
def test_a_skipped_step_touches_nothing(backend: str, device: str) -> None:
    p, m, v, step = tensors(40, device, torch.bfloat16)
    steps(p, m, v, step, gradients(40, device), backend=backend)
    before = [x.clone() for x in (p, m, v)]
    bad = torch.full_like(p, float("nan"))
    steps(p, m, v, step, [bad], backend=backend, skip=torch.ones((), device=device))
    for ours, theirs in zip((p, m, v), before, strict=True):
        assert torch.equal(ours, theirs)
    steps(p, m, v, step, [p], backend=backend, skip=torch.zeros((), device=device))
    assert not torch.equal(p, before[0])


@BACKENDS
def test_rate_and_scale_may_be_numbers_on_the_device(backend: str, device: str) -> None:
    ours, theirs = (tuple(x.clone() for x in tensors(40, device, torch.bfloat16)) for _ in "ab")
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)
    given = gradients(40, device)
    rate, scale = torch.full((), 0.01, device=device), torch.full((), 4.0, device=device)
    steps(*ours, given, lr=rate, scale=scale, backend=backend)
    steps(*theirs, [gradient / 4 for gradient in given], backend=backend)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend='cuda' is not one of"),
    "shape": ({"m": torch.zeros(5)}, r"must share a shape, got \[4\], \[4\], \[5\], \[4\]"),
    "dtype": ({"v": torch.zeros(4).half()}, "v torch.float16: an fp32 parameter and moments in"),
    "strides": ({"m": torch.zeros(8)[::2]}, "must be contiguous"),
    "beta": ({"beta2": 1.0}, r"beta2=1.0 must lie in \[0, 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    changes, sentence = REFUSED[name]
    given = {key: torch.zeros(4) for key in ("parameter", "gradient", "m", "v")}
    with pytest.raises(ValueError, match=sentence):
        adamw_(**{**given, "step": torch.ones(()), **OPTIONS, **changes})


@pytest.mark.gpu
def test_the_host_never_waits_for_a_gpu() -> None:
    p, m, v, step = tensors(5000, "cuda", torch.bfloat16)
    skip = torch.zeros((), device="cuda")
    given = gradients(5000, "cuda")
    steps(p, m, v, step, given, skip=skip)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(p, m, v, step, given, skip=skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
