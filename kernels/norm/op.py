"""The norm with its residual connection as a differentiable op: checks, backends, registration."""

from typing import Any

import torch
from torch import Tensor

from kernels.norm.reference import add_norm_reference, norm_gradient_reference
from kernels.norm.tiles import LONGEST
from kernels.operation import operation, register_fake

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    centers: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(norm(s), s) with s = x + branch, the residual stream; both in x's dtype.

    What comes back along the stream in backward is added in the pass that differentiates the norm,
    so a block needs no addition of its own.

    Args:
        x, branch: [.., D]; branch None: s is x.
        weight, bias: [D]; their gradients are summed in fp32, in a fixed order.
        eps: added to the variance.
        centers: LayerNorm; False: RMSNorm, which has no bias.
        backend: auto (triton on CUDA, torch elsewhere), triton or torch.

    Raises:
        ValueError: arguments that make no sense, or rows longer than 16384 for triton.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(
            f"branch is {branch.dtype} {list(branch.shape)} and x {x.dtype} {list(x.shape)}: they "
            "must be alike"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} {list(parameter.shape)} must be [{x.shape[-1]}]")
    if bias is not None and (not centers or bias.dtype != weight.dtype):
        raise ValueError(f"bias {bias.dtype} is for centers=True, in weight's dtype {weight.dtype}")
    fits = x.dtype in DTYPES and weight.dtype in DTYPES and 0 < x.shape[-1] <= LONGEST
    if backend == "triton" and not fits:
        raise ValueError(
            f"backend='triton' takes rows of up to {LONGEST} numbers in fp32, bf16 or fp16, not "
            f"{x.dtype} {list(x.shape)}: take backend='torch'"
        )
    if backend == "torch" or (backend == "auto" and not (fits and x.is_cuda)) or x.numel() == 0:
        return add_norm_reference(x, branch, weight, bias, eps, centers)
    y, stream = _AddNorm.apply(
        x.reshape(-1, x.shape[-1]), None if branch is None else branch.reshape(-1, x.shape[-1]),
        weight, bias, eps, centers,
    )  # fmt: skip
    return y.view(x.shape), stream.view(x.shape)


class _AddNorm(torch.autograd.Function):
    """On [N, D]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None,
        eps: float, centers: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, stream, mean, rstd = forward(x, branch, weight, bias, eps, centers)
        stream = x if branch is None else stream
        ctx.save_for_backward(stream, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.has_branch, ctx.centers = branch is not None, centers
        return y, stream

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, bias, mean, rstd = ctx.saved_tensors
        if dy is None:  # only the stream went on
            return ds, ds if ctx.has_branch else None, None, None, None, None
        dx, total, _ = backward(dy, ds, stream, weight, bias, mean, rstd, ctx.centers, False, False)
        db = None if bias is None else total[1]
        return dx, dx if ctx.has_branch else None, total[0], db, None, None


def norm_gradient(
    dy: Tensor, ds: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, centers: bool, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx, dw, db) of a norm that somebody else computed (kernels/fp8_cast/norm.py).

    Args:
        dy: [N, D], the gradient of norm(stream); ds: what comes along the stream, added, or None.
        mean: [N] ([0] for RMSNorm) and rstd [N], fp32.
        backend: auto (triton on CUDA, torch elsewhere), triton or torch.
    """
    fits = stream.dtype in DTYPES and stream.shape[-1] <= LONGEST
    if backend == "torch" or (backend == "auto" and not (fits and stream.is_cuda)):
        return norm_gradient_reference(dy, ds, stream, weight, bias, mean, rstd, centers)
    dx, total, _ = backward(dy, ds, stream, weight, bias, mean, rstd, centers, False, False)
    return dx, total[0], None if bias is None else total[1]


# kernels/linear and kernels/fp8_cast build on these, too. A namespace of their own: what attention
# registers is kept through activation checkpointing.


@operation("flashtrain_norm::forward")
def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centers: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, stream ([0] without a branch), mean ([0] for RMSNorm), rstd. x, branch [N, D]."""
    branch, bias = (None if t is None else t.contiguous() for t in (branch, bias))
    return _kernels().forward(x.contiguous(), branch, weight.contiguous(), bias, eps, centers)


@register_fake(forward)
def _(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centers: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = x.shape[0]
    stream = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    mean = x.new_empty(N if centers else 0, dtype=torch.float32)
    return x.new_empty(x.shape), stream, mean, x.new_empty(N, dtype=torch.float32)


@operation("flashtrain_norm::backward")
def backward(
    dy: Tensor, ds: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, centers: bool, again: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx [N, D]; dw, db where there is a bias, and with `sums` the sum of ds over the rows, [1 to
    3, D]; with `again` forward's y, which then need not be kept ([0] without). sums: ds is there.
    """
    ds, bias = (None if t is None else t.contiguous() for t in (ds, bias))
    return _kernels().backward(
        dy.contiguous(), ds, stream.contiguous(), weight.contiguous(), bias, mean, rstd, centers,
        again, sums,
    )  # fmt: skip


@register_fake(backward)
def _(
    dy: Tensor, ds: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, centers: bool, again: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = weight.new_empty(1 + (bias is not None) + sums, dy.shape[1])
    return dy.new_empty(dy.shape), total, dy.new_empty(dy.shape if again else 0)


def _kernels() -> Any:
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.norm import kernel

    return kernel
