"""Heads that stay one tensor on their way to attention, and those that must not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.config import PositionConfig, PositionKind, Target
from flashtrain.model.attention import Attention
from flashtrain.model.gpt import GPT
from tests.flashtrain.model.test_gpt import build, some_tokens, tiny

ROPE, LEARNED = PositionKind.rope, PositionKind.learned
# model, positions, whether heads stay together
CASES: dict[str, tuple[dict[str, Any], PositionConfig, bool]] = {
    "none": ({}, PositionConfig(PositionKind.none), True),
    "learned": ({"bias": True}, PositionConfig(LEARNED, [Target.embedding]), True),
    "slopes": ({}, PositionConfig(PositionKind.alibi), True),
    "rotated": ({"n_kv_heads": 2}, PositionConfig(ROPE), True),
    "a part rotated": ({}, PositionConfig(ROPE, partial_rotary_factor=0.5), True),
    "queries rotated": ({}, PositionConfig(ROPE, [Target.q]), False),
    "all rotated": ({}, PositionConfig(ROPE, [Target.q, Target.k, Target.v]), False),
    "learned on k": ({}, PositionConfig(LEARNED, [Target.k]), False),
    "normed": ({"qk_norm": True}, PositionConfig(PositionKind.none), False),
    "normed and rotated": ({"qk_norm": True, "n_kv_heads": 2}, PositionConfig(ROPE), False),
}


def run(model: GPT, tokens: Tensor, documents: Tensor | None) -> list[Tensor]:
    """Output and gradients."""
    hidden = model(tokens, documents)
    torch.manual_seed(1)
    seed = torch.randn(hidden.shape, device=hidden.device).to(hidden.dtype)
    found = torch.autograd.grad(hidden, list(model.parameters()), seed, allow_unused=True)
    return [hidden, *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("packs", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("name", CASES)
def test_together_or_apart_they_are_the_same(
    name: str, packs: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, position, together = CASES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(tiny(head_size=64, **changes), position, dtype=dtype).to(device)
    tokens = some_tokens().to(device)
    table = model.position(tokens.shape[1], torch.device(device))
    attended = model.blocks[0].attention
    assert attended._stays_packed(None if model.position_on_embedding else table) == together
    documents = (torch.arange(tokens.shape[1], device=device) // 4).expand_as(tokens).contiguous()
    given = (tokens, documents if packs else None)
    found = run(model, *given)
    monkeypatch.setattr(Attention, "_stays_packed", lambda *_: False)
    # on a GPU the sums of attention's gradients have no fixed order
    bound = 0.02 if device == "cuda" else 1e-5
    for ours, apart in zip(found, run(model, *given), strict=True):
        assert_close(ours, apart, rtol=bound, atol=bound * float(apart.detach().abs().max()))
