"""Rows of a table by number, as a differentiable op: checks, choice of backend, registration."""

from typing import Any

import torch
from torch import Tensor

from kernels.embedding.reference import embedding_reference
from kernels.operation import operation, register_fake

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embedding(
    tokens: Tensor, weight: Tensor, dtype: torch.dtype, *, backend: str = "auto"
) -> Tensor:
    """weight[tokens] [.., D] in dtype. Its gradient is summed in fp32, in a fixed order.

    Args:
        tokens: [..] int64 or int32. One that is no row of weight makes NaN with triton, where
            nobody waits for the device to look.
        weight: [V, D].
        backend: auto (triton on CUDA, torch elsewhere), triton or torch.

    Raises:
        ValueError: arguments that make no sense. IndexError: torch on a CPU, a token out of range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if tokens.dtype not in (torch.int64, torch.int32) or weight.dim() != 2:
        raise ValueError(
            f"tokens are {tokens.dtype}, weight {list(weight.shape)}: int64 or int32 and [V, D]"
        )
    if weight.dtype not in DTYPES or dtype not in DTYPES or tokens.numel() == 0:
        backend = "torch"
    if backend == "torch" or (backend == "auto" and not weight.is_cuda):
        return embedding_reference(tokens, weight, dtype)
    y: Tensor = _Embedding.apply(tokens.reshape(-1), weight, dtype)
    return y.view(*tokens.shape, weight.shape[1])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.words, ctx.dtype = weight.shape[0], weight.dtype
        return _gather(tokens, weight, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return None, _gradient(tokens, dy, ctx.words, ctx.dtype), None


# A namespace of their own: what attention registers is kept through activation checkpointing.


@operation("flashtrain_embedding::gather")
def _gather(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _kernels().gather(tokens.contiguous(), weight.contiguous(), dtype)


@register_fake(_gather)
def _(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((tokens.shape[0], weight.shape[1]), dtype=dtype)


@operation("flashtrain_embedding::gradient")
def _gradient(tokens: Tensor, dy: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    """As gradient_reference."""
    return _kernels().gradient(tokens.contiguous(), dy.contiguous(), words, dtype)


@register_fake(_gradient)
def _(tokens: Tensor, dy: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((words, dy.shape[1]), dtype=dtype)


def _kernels() -> Any:
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.embedding import kernel

    return kernel
