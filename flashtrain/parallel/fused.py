"""The same products by PyTorch's own fused operators over symmetric memory (`torch.ops.symm_mem`).

Dims as in `overlap.py`. Parts of tokens lie one after the other in memory, so the dimension that is
gathered and scattered is the outermost, where these operators move nothing beforehand. They exist
once `torch.distributed._symmetric_memory` is imported.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.parallel.collectives import finish_gather, start_gather


class FusedGatherLinear(torch.autograd.Function):
    """x_r [B, T/n, I], weight [O, I], bias [O] or None -> [B, T, O]; keeps its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: int, name: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.name = size, name
        _, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
            x.flatten(0, 1), [weight.T], 0, name, return_A=False
        )
        whole: Tensor = y.view(x.size(0), -1, weight.size(0))
        return whole if bias is None else whole + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, 1).contiguous()
        gathering = start_gather(x, ctx.size, ctx.name)
        dx = torch.ops.symm_mem.fused_matmul_reduce_scatter(rows, weight, "sum", 0, ctx.name)
        dw = rows.T @ finish_gather(gathering, ctx.size).flatten(0, 1)
        return dx.view_as(x), dw, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


class FusedLinearScatter(torch.autograd.Function):
    """x_r [B, T, I], weight [O, I] -> [B, T/n, O]; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name = name
        rows = x.flatten(0, 1).contiguous()
        y: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(rows, weight.T, "sum", 0, name)
        return y.view(x.size(0), -1, weight.size(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        whole, (dx,) = torch.ops.symm_mem.fused_all_gather_matmul(
            grad.flatten(0, 1).contiguous(), [weight], 0, ctx.name, return_A=True
        )
        return dx.view_as(x), whole.T @ x.flatten(0, 1), None
