"""Masks of transformers in the words of our attention: the same answer, and nothing dense."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'flashtrain[dev]'")

from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from flashtrain.integrations.masks import attention_mask
from flashtrain.integrations.transformers import attention_forward

LEFT = torch.arange(12) >= torch.tensor([[5], [0]])
RIGHT = torch.arange(12) < torch.tensor([[7], [12]])
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1], [1] * 12]).bool()
WINDOW = sliding_window_causal_mask_function(4)
DOCUMENTS = packed_sequence_mask_function(torch.arange(12).repeat(2, 1) // 5)
PREFIX = or_masks(causal_mask_function, lambda b, h, q, k: k < 3)
# the form it takes, the mask function, and what else is given: 12 queries and keys otherwise
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "causal": ("none", causal_mask_function, {}),
    "causal, left": ("causal", causal_mask_function, dict(attention_mask=LEFT)),
    "causal, right": ("causal", causal_mask_function, dict(attention_mask=RIGHT)),
    "causal, holes": ("causal", causal_mask_function, dict(attention_mask=HOLES)),
    "no padding in the mask": (
        "none", causal_mask_function, dict(attention_mask=torch.ones_like(LEFT)),
    ),
    "after a cache": (
        "causal", causal_mask_function, dict(q_length=5, q_offset=7, attention_mask=LEFT),
    ),
    "window": ("causal", WINDOW, dict(local_size=4)),
    "window, left": ("causal", WINDOW, dict(local_size=4, attention_mask=LEFT)),
    "window of a sliding cache": (
        "causal", WINDOW,
        dict(q_length=3, q_offset=9, kv_length=6, kv_offset=6, attention_mask=HOLES),
    ),
    "wide window": ("none", sliding_window_causal_mask_function(12), dict(local_size=12)),
    "static cache": ("causal", causal_mask_function, dict(q_length=5)),
    "static cache, left": (
        "causal", causal_mask_function, dict(q_length=5, attention_mask=LEFT[:, 2:7]),
    ),
    "static cache, second piece": (
        "causal", causal_mask_function, dict(q_length=4, q_offset=torch.tensor(5)),
    ),
    "static cache, one token": (
        "keys", causal_mask_function, dict(q_length=1, q_offset=torch.tensor(5)),
    ),
    "static cache, window": ("causal", WINDOW, dict(q_length=7, attention_mask=LEFT)),
    "packed": ("causal", and_masks(causal_mask_function, DOCUMENTS), dict(allow=False)),
    "packed, window": ("causal", and_masks(DOCUMENTS, WINDOW), dict(allow=False)),
    "both ways": ("none", bidirectional_mask_function, dict(both=True)),
    "both ways, left": ("keys", bidirectional_mask_function, dict(both=True, attention_mask=LEFT)),
    "both ways, cross": (
        "keys", bidirectional_mask_function, dict(both=True, q_length=5, attention_mask=HOLES),
    ),
    "both ways, window": ("dense", sliding_window_bidirectional_mask_function(3), dict(both=True)),
    "prefix": ("dense", PREFIX, dict(allow=False, use_vmap=True)),
    "prefix, left": ("dense", PREFIX, dict(allow=False, use_vmap=True, attention_mask=LEFT)),
}  # fmt: skip


def form(mask: Tensor | None) -> str:
    if mask is None:
        return "none"
    if mask.dim() == 3:
        return "causal"
    return "dense" if mask.is_floating_point() else "keys"


@pytest.mark.parametrize(("expected", "function", "given"), CASES.values(), ids=CASES.keys())
def test_the_same_as_a_dense_mask(expected: str, function: Any, given: dict[str, Any]) -> None:
    given = {"q_length": 12, "kv_length": 12, **given}
    both, allow = given.pop("both", False), given.pop("allow", True)
    mask = attention_mask(
        2, mask_function=function, allow_is_causal_skip=allow and not both,
        allow_is_bidirectional_skip=both, **given,
    )  # fmt: skip
    assert form(mask) == expected
    if expected == "causal":
        assert mask is not None and mask.stride(1) == 0  # the window takes no memory
    if expected == "keys":
        assert mask is not None and mask.shape[1:3] == (1, 1)

    dense = sdpa_mask(2, mask_function=function, allow_is_causal_skip=False, **given)
    q = torch.randn(2, 4, given["q_length"], 8)
    k, v = torch.randn(2, 2, 2, given["kv_length"], 8)
    layer = torch.nn.Module()
    layer.is_causal = not both
    out, _ = attention_forward(layer, q, k, v, mask)
    expected_out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, enable_gqa=True
    )
    # queries without a key: 0 here, NaN or anything there
    sees = dense.any(-1, keepdim=True).expand_as(expected_out)
    torch.testing.assert_close(
        out.transpose(1, 2)[sees], expected_out[sees], msg=lambda text: f"{expected}: {text}"
    )


def test_a_mask_made_here_comes_back_as_it_is() -> None:
    mask = attention_mask(2, 12, 12, mask_function=WINDOW, attention_mask=LEFT, local_size=4)
    assert attention_mask(2, 12, 12, attention_mask=mask) is mask


def test_a_mask_made_elsewhere_is_refused() -> None:
    q = torch.randn(2, 4, 12, 8)
    with pytest.raises(ValueError, match=r"got a mask \[2, 12\]"):
        attention_forward(torch.nn.Module(), q, q, q, LEFT)
