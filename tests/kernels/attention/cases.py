"""Calls of attention that cross its features, at a size for the interpreter and one for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention.reference import attention_reference


@dataclass(frozen=True)
class Case:
    """One call: sizes, options, and which tensors come with it."""

    T: int
    S: int
    D: int = 16
    Dv: int = 0  # 0: as D
    B: int = 1
    H: int = 2
    H_kv: int = 2
    options: dict[str, Any] = field(default_factory=dict)  # causal, window, softcap, dropout
    alibi: bool = False
    sinks: bool = False
    documents: bool = False
    bias: str | None = None  # the dimensions it has beside keys, of "bht"; with b some are -inf
    key_mask: bool = False

    def on_gpu(self) -> "Case":
        """The same case eight times as long, odd ends included, with heads of a real size."""
        window = self.options.get("window")
        longer = {"window": tuple(8 * n if n > 0 else n for n in window)} if window else {}
        return replace(
            self,
            T=self.T if self.T == 1 else 8 * self.T + self.T % 2,
            S=8 * self.S + self.S % 2,
            D=4 * self.D,
            Dv=4 * self.Dv,
            B=self.B + 1,
            options={**self.options, **longer},
        )


# each feature alone, then crossed; lengths leave ragged last tiles of the interpreter's 32 x 16
CASES = {
    "causal": Case(T=70, S=70, options={"causal": True}),
    "full": Case(T=50, S=50, options={"causal": False}),
    "whole tiles": Case(T=64, S=64, options={"causal": True}),
    "one query": Case(T=1, S=37, options={"causal": True}),
    "one token": Case(T=1, S=1, options={"causal": True}),
    "seventeen": Case(T=17, S=17, H_kv=1, options={"causal": True}),
    "cross, more keys": Case(T=33, S=70, H_kv=1, options={"causal": False}),
    "causal, more keys": Case(T=33, S=70, options={"causal": True}),
    "causal, more queries": Case(T=70, S=33, options={"causal": True}),
    "grouped": Case(T=40, S=40, B=2, H=4, H_kv=2, options={"causal": True}),
    "odd head size": Case(T=40, S=40, D=20, H=1, H_kv=1, options={"causal": True}),
    "alibi": Case(T=70, S=70, H=4, options={"causal": True}, alibi=True),
    "alibi, both sides": Case(T=33, S=50, options={"causal": False}, alibi=True),
    "window": Case(T=70, S=70, options={"causal": True, "window": (20, 0)}),
    "window, both sides": Case(T=50, S=70, options={"causal": False, "window": (12, 5)}),
    "softcap": Case(T=40, S=40, options={"causal": True, "softcap": 1.5}),
    "sinks": Case(T=60, S=40, options={"causal": True}, sinks=True),
    "documents": Case(T=70, S=70, B=2, options={"causal": True}, documents=True),
    "documents, both sides": Case(T=50, S=50, options={"causal": False}, documents=True),
    "everything": Case(
        T=60,
        S=60,
        H=4,
        options={"causal": True, "window": (25, -1), "softcap": 2.0},
        alibi=True,
        sinks=True,
        documents=True,
    ),
    "narrow values": Case(T=40, S=40, D=24, Dv=16, H_kv=1, options={"causal": True}),
    "wide values": Case(T=33, S=50, Dv=40, H=1, H_kv=1, options={"causal": False}),
    "bias of pairs": Case(T=33, S=50, options={"causal": False}, bias="ht"),
    "bias of keys": Case(T=40, S=40, B=2, options={"causal": True}, bias="b"),
    "bias, all its own": Case(
        T=40, S=40, B=2, H_kv=1, options={"causal": True}, alibi=True, bias="bht"
    ),
    "key mask": Case(T=40, S=40, B=2, H_kv=1, options={"causal": True}, key_mask=True),
    "key mask, both sides": Case(T=33, S=50, B=3, options={"causal": False}, key_mask=True),
    "dropout": Case(T=40, S=40, B=2, options={"causal": True, "dropout": 0.3, "dropout_seed": 7}),
    "everything and more": Case(
        T=50,
        S=50,
        B=2,
        Dv=24,
        H=4,
        options={
            "causal": True,
            "window": (25, -1),
            "softcap": 2.0,
            "dropout": 0.2,
            "dropout_seed": 2**40 + 5,
        },
        alibi=True,
        sinks=True,
        documents=True,
        bias="t",
        key_mask=True,
    ),
}


@dataclass
class Inputs:
    """Fresh random tensors of a case, and the gradients that arrive from above."""

    case: Case
    tensors: dict[str, Tensor]  # q, k, v and, where the case has them, sinks and bias
    extras: dict[str, Any]  # the options and tensors that get no gradient
    d_out: Tensor
    d_lse: Tensor


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Normal q, k, v and bias; slopes of a geometric series; documents of random lengths."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    tensors = {
        "q": normal(case.B, case.T, case.H, case.D).to(dtype),
        "k": normal(case.B, case.S, case.H_kv, case.D).to(dtype),
        "v": normal(case.B, case.S, case.H_kv, case.Dv or case.D).to(dtype),
    }
    extras = dict(case.options)
    if case.sinks:
        tensors["sinks"] = normal(case.H)
    if case.alibi:
        extras["alibi_slopes"] = 0.5 ** torch.arange(1.0, case.H + 1, device=device)
    if case.documents:
        # about four documents in each row; ids repeat, because only runs count
        starts = torch.rand(case.B, case.T, device=device) < 4 / case.T
        extras["documents"] = starts.cumsum(1).remainder(3).to(torch.int32)
    if case.bias is not None:
        full = {"b": case.B, "h": case.H, "t": case.T}
        bias = normal(*(n if name in case.bias else 1 for name, n in full.items()), case.S)
        if "b" in case.bias:
            bias = bias.masked_fill(torch.rand_like(bias) < 0.2, float("-inf"))
            bias[-1, :, 0] = float("-inf")  # a query, or all of a batch row, sees nothing
        tensors["bias"] = bias.to(dtype)
    if case.key_mask:
        extras["key_mask"] = padding(case.B, case.S, device)
    d_out = normal(case.B, case.T, case.H, case.Dv or case.D).to(dtype)
    return Inputs(case, tensors, extras, d_out, normal(case.B, case.H, case.T))


def padding(B: int, S: int, device: str) -> Tensor:
    """A mask [B, S] with holes: padded on the left, then on the right, then nothing to see."""
    place, row = torch.arange(S, device=device), torch.arange(B, device=device)[:, None] % 3
    inside = torch.where(row == 0, place >= S // 2, (place < S // 2) & (row == 1))
    return inside & (torch.rand(B, S, device=device) < 0.8)


def run(inputs: Inputs, backend: str, **more: Any) -> dict[str, Tensor]:
    """out, lse and every gradient of `attention`."""
    return run_by(attention, inputs, backend=backend, **more)


def run_by(function: Callable[..., Any], inputs: Inputs, **more: Any) -> dict[str, Tensor]:
    """The same of any function that is called like `attention`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out, lse = function(**leaves, **inputs.extras, return_lse=True, **more)
    return _with_gradients(inputs, leaves, out, lse)


def run_reference(inputs: Inputs, compute: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference, every step in `compute`."""
    leaves = {name: x.detach().to(compute).requires_grad_() for name, x in inputs.tensors.items()}
    out, lse = attention_reference(**leaves, **inputs.extras, compute=compute)
    return _with_gradients(inputs, leaves, out, lse)


def _with_gradients(
    inputs: Inputs, leaves: dict[str, Tensor], out: Tensor, lse: Tensor | None
) -> dict[str, Tensor]:
    outputs, arriving = {"out": out}, [inputs.d_out.to(out.dtype)]
    if lse is not None:
        # a query without keys has lse -inf, and no gradient can come through it
        outputs["lse"] = torch.where(lse.isfinite(), lse, 0.0)
        arriving.append(inputs.d_lse.to(lse.dtype))
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), arriving)
    results = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if lse is not None:
        results["lse"] = lse.detach()
    return {"out": out.detach(), **results}
