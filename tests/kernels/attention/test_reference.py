"""The reference means what the documentation says: against loops over single scores, and SDPA."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kernels.attention import attention
from kernels.attention.dropout import keep_mask
from kernels.attention.reference import attention_reference
from tests.kernels.attention.cases import CASES, Inputs, inputs_of


def by_loops(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Attention one score at a time, straight from the docstring of `attention`."""
    q, k, v = (inputs.tensors[name].double() for name in "qkv")
    case, options = inputs.case, inputs.extras
    out = torch.zeros(case.B, case.T, case.H, v.shape[3], dtype=torch.float64)
    lse = torch.full((case.B, case.H, case.T), -math.inf, dtype=torch.float64)
    dropout = options.get("dropout", 0.0)
    if dropout:
        seed = torch.tensor([options["dropout_seed"]])
        mask = keep_mask(seed, dropout, (case.B, case.H, case.T, case.S))
    left, right = options.get("window") or (-1, -1)
    for b in range(case.B):
        for h in range(case.H):
            kv = h * case.H_kv // case.H
            for t in range(case.T):
                place = t + case.S - case.T
                weights: dict[int | str, float] = {}
                for s in range(case.S):
                    hidden = options["causal"] and s > place
                    hidden |= left >= 0 and s < place - left
                    hidden |= right >= 0 and s > place + right
                    if case.documents:
                        between = options["documents"][b, min(s, t) : max(s, t) + 1]
                        hidden |= bool((between != between[0]).any())
                    if case.key_mask:
                        hidden |= not options["key_mask"][b, s]
                    if hidden:
                        continue
                    score = float(q[b, t, h] @ k[b, s, kv]) * case.D**-0.5
                    if "softcap" in options:
                        score = options["softcap"] * math.tanh(score / options["softcap"])
                    if case.alibi:
                        score -= float(options["alibi_slopes"][h]) * abs(s - place)
                    if case.bias is not None:
                        bias = inputs.tensors["bias"].expand(case.B, case.H, case.T, case.S)
                        score += float(bias[b, h, t, s])
                    if score > -math.inf:
                        weights[s] = math.exp(score)
                if case.sinks:
                    weights["sink"] = math.exp(float(inputs.tensors["sinks"][h]))
                total = sum(weights.values())
                if total:
                    lse[b, h, t] = math.log(total)
                for s, weight in weights.items():
                    if s != "sink":
                        kept = not dropout or bool(mask[b, h, t, int(s)])
                        out[b, t, h] += kept * weight / total / (1 - dropout) * v[b, int(s), kv]
    return out, lse


@pytest.mark.parametrize(
    "name",
    [
        "seventeen",
        "causal, more queries",
        "alibi, both sides",
        "window, both sides",
        "everything",
        "wide values",
        "bias, all its own",
        "everything and more",
    ],
)
def test_reference_is_the_definition(name: str) -> None:
    inputs = inputs_of(CASES[name], "cpu", torch.float64)
    out, lse = attention_reference(**inputs.tensors, **inputs.extras, compute=torch.float64)
    expected_out, expected_lse = by_loops(inputs)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_agrees_with_pytorch(causal: bool) -> None:
    q, k, v = (torch.randn(2, 9, 4, 8, dtype=torch.float64) for _ in range(3))
    out, _ = attention_reference(q, k, v, causal=causal, compute=torch.float64)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal
    )
    assert_close(out, expected.transpose(1, 2))


def test_reference_gradients_are_right_where_a_query_sees_nothing() -> None:
    q, k, v = (torch.randn(1, n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (5, 3, 3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def visible_rows(*leaves: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(*leaves, causal=True, compute=torch.float64, **more)
        return out, lse[..., 0 if more else 2 :]  # the first two queries see no key

    assert torch.autograd.gradcheck(visible_rows, (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: visible_rows(*x[:3], sinks=x[3]), (q, k, v, sinks))


def test_backend_reference_computes_what_float64_asks() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float64) for _ in range(3))
    out, lse = attention(q, k, v, causal=True, backend="reference", return_lse=True)
    expected, expected_lse = attention_reference(q, k, v, causal=True, compute=torch.float64)
    assert out.dtype == torch.float64
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
