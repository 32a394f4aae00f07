"""Dropout: Philox is Philox, weights are kept at the stated rate, all backends keep the same."""

import math

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention.dropout import keep_mask, philox
from tests.kernels.interpreter import Platform

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((FULL,) * 4, (FULL,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    # the known answers of Random123, philox4x32-10
    words = philox(tuple(map(torch.tensor, counter)), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_weights_are_kept_at_the_stated_rate_along_every_axis(dropout: float) -> None:
    kept = keep_mask(torch.tensor([11]), dropout, (4, 6, 40, 50)).double()
    for axis in (0, 1, 2, 3, None):
        rates = kept.mean() if axis is None else kept.transpose(0, axis).flatten(1).mean(1)
        n = kept.numel() / rates.numel()
        sigma = math.sqrt(dropout * (1 - dropout) / n)
        assert (rates - (1 - dropout)).abs().max() < 5 * sigma
    # neighbours are independent: the covariance of bits next to each other is 0
    bits = kept - (1 - dropout)
    for axis in range(4):
        other = bits.roll(1, axis)
        assert (bits * other).mean().abs() < 5 * dropout * (1 - dropout) / math.sqrt(bits.numel())


def test_another_seed_is_another_mask() -> None:
    masks = [keep_mask(torch.tensor([s]), 0.5, (1, 2, 30, 30)) for s in (0, 1, 2**32, -1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            agreement = (a == b).double().mean().item()
            assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(a.numel())


def test_kernels_drop_the_weights_of_the_reference(platform: Platform) -> None:
    # equal scores, and values that are the identity: out is the mask itself, scaled
    T, S, H = (200, 128, 3) if platform.on_gpu else (40, 32, 2)
    q = torch.zeros(2, T, H, 16, device=platform.device, dtype=platform.dtype)
    k = torch.zeros(2, S, H, 16, device=platform.device, dtype=platform.dtype)
    v = torch.eye(S, device=platform.device, dtype=platform.dtype)[None, :, None].expand(2, S, H, S)
    for seed in (3, 2**40 + 1, -5):
        out = attention(
            q, k, v, causal=False, dropout=0.25, dropout_seed=seed, backend="triton"
        )  # [B, T, H, S]
        kept = keep_mask(torch.tensor([seed], device=platform.device), 0.25, (2, H, T, S))
        assert torch.equal(out.transpose(1, 2) > 0, kept)
        expected = kept.transpose(1, 2).float() / (0.75 * S)
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_backward_drop_the_same_weights(compiled: bool, platform: Platform) -> None:
    # out is linear in v, so out * d_out and v * dv have one sum, if and only if P is the same
    q, k, v, d_out = (torch.randn(2, 37, 2, 16, device=platform.device) for _ in range(4))

    def call(v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, dropout=0.5, backend="triton") * 1.0

    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    v.requires_grad_()
    out = call(v)
    (dv,) = torch.autograd.grad(out, v, d_out)
    torch.testing.assert_close((out * d_out).sum(), (v * dv).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_seed_repeats_and_no_seed_follows_pytorchs_generator(
    backend: str, platform: Platform
) -> None:
    q = torch.randn(1, 20, 2, 16, device=platform.device, dtype=platform.dtype)

    def call(seed: int | Tensor | None, dropout: float = 0.5) -> Tensor:
        return attention(q, q, q, causal=True, dropout=dropout, dropout_seed=seed, backend=backend)

    assert torch.equal(call(9), call(torch.tensor(9, device=platform.device)))
    assert not torch.equal(call(9), call(10))
    torch.manual_seed(1)
    first, second = call(None), call(None)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(None), first)
    assert torch.equal(call(9, 0.0), attention(q, q, q, causal=True, backend=backend))
