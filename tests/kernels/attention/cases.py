"""Calls of attention that cross its features, at a size for the interpreter and one for a GPU."""

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
    B: int = 1
    H: int = 2
    H_kv: int = 2
    options: dict[str, Any] = field(default_factory=dict)  # causal, window, softcap
    alibi: bool = False
    sinks: bool = False
    documents: bool = False

    def on_gpu(self) -> "Case":
        """The same case eight times as long, odd ends included, with heads of a real size."""
        window = self.options.get("window")
        longer = {"window": tuple(8 * n if n > 0 else n for n in window)} if window else {}
        return replace(
            self,
            T=self.T if self.T == 1 else 8 * self.T + self.T % 2,
            S=8 * self.S + self.S % 2,
            D=4 * self.D,
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
}


@dataclass
class Inputs:
    """Fresh random tensors of a case, and the gradients that arrive from above."""

    case: Case
    tensors: dict[str, Tensor]  # q, k, v and, where the case has them, sinks
    extras: dict[str, Any]  # the options and tensors that get no gradient
    d_out: Tensor
    d_lse: Tensor


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Normal q, k, v; slopes of a geometric series; documents of random lengths."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    tensors = {
        "q": normal(case.B, case.T, case.H, case.D).to(dtype),
        "k": normal(case.B, case.S, case.H_kv, case.D).to(dtype),
        "v": normal(case.B, case.S, case.H_kv, case.D).to(dtype),
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
    d_out = normal(case.B, case.T, case.H, case.D).to(dtype)
    return Inputs(case, tensors, extras, d_out, normal(case.B, case.H, case.T))


def run(inputs: Inputs, backend: str, **more: Any) -> dict[str, Tensor]:
    """out, lse and every gradient of `attention`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out, lse = attention(**leaves, **inputs.extras, return_lse=True, backend=backend, **more)
    return _with_gradients(inputs, leaves, out, lse)


def run_reference(inputs: Inputs, compute: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference, every step in `compute`."""
    leaves = {name: x.detach().to(compute).requires_grad_() for name, x in inputs.tensors.items()}
    out, lse = attention_reference(**leaves, **inputs.extras, compute=compute)
    return _with_gradients(inputs, leaves, out, lse)


def _with_gradients(
    inputs: Inputs, leaves: dict[str, Tensor], out: Tensor, lse: Tensor
) -> dict[str, Tensor]:
    # a query without keys has lse -inf, and no gradient can come through it
    seen = lse.isfinite()
    grads = torch.autograd.grad(
        [out, torch.where(seen, lse, 0.0)],
        list(leaves.values()),
        [inputs.d_out.to(out.dtype), inputs.d_lse.to(lse.dtype)],
    )
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}
