"""A product with its collectives: the one place that says how tensor-parallel layers talk.

Dims: B batch, T tokens, n ranks, I input features, O this rank's output features; parts are of all
B T tokens in order (collectives.py). Forms of the same two functions:

    plain      a collective, then the product, or the other way round; the backward runs some of
               both at the same time
    pipelined  part by part, each product while another part travels (pipelined.py)
    fused      PyTorch's operators for the same (fused.py)
"""

import importlib
import logging
import os
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import ConfigError, Overlap
from flashtrain.parallel.collectives import (
    check_divides,
    finish_gather,
    finish_scatter,
    gather_sequence,
    scatter_sequence,
    start_gather,
    start_scatter,
)
from flashtrain.parallel.fused import FusedGatherLinear, FusedLinearScatter
from flashtrain.parallel.mesh import Axis
from flashtrain.parallel.peer_memory import PeerMemory, peers_missing
from flashtrain.parallel.pipelined import gather_linear as pipelined_gather_linear
from flashtrain.parallel.pipelined import linear_scatter as pipelined_linear_scatter
from flashtrain.parallel.transport import MessageTransport, use_transport
from kernels.linear import linear, parameter_gradients

log = logging.getLogger("flashtrain.parallel")

Form = Enum("Form", ["plain", "pipelined", "fused"])
PLAIN = Form.plain


def overlap_layers(model: nn.Module, axis: Axis, wanted: Overlap, device: torch.device) -> Form:
    """Tell every tensor-parallel layer of a model how to talk over `axis`; see `choose_form`."""
    form = choose_form(axis, wanted, device)
    for module in model.modules():
        if hasattr(module, "form"):
            module.form = form  # type: ignore[assignment]
    return form


def choose_form(axis: Axis, wanted: Overlap, device: torch.device) -> Form:
    """What `parallel.overlap` means on these ranks, ready for use. Collective over `axis`.

    auto: pipelined where all GPUs see each other's memory, else plain, and the log says why. on,
    fused: raises ConfigError where they do not; on a CPU `on` sends messages, for tests.
    """
    if axis.group is None or wanted is Overlap.off:
        return Form.plain
    if device.type != "cuda" and wanted is Overlap.on:
        use_transport(axis.name, MessageTransport(axis.group))
        return Form.pipelined
    missing = peers_missing(axis.group, device)
    if missing and wanted is not Overlap.auto:
        raise ConfigError(
            f"parallel.overlap={wanted.name} needs tensor ranks that see each other's GPU memory, "
            f"and {missing}: use parallel.overlap=auto or off"
        )
    if missing:
        if device.type == "cuda" and dist.get_rank() == 0:
            log.warning("parallel.overlap=auto: transfers are not hidden, since %s", missing)
        return Form.plain
    # nothing here sends to all GPUs at once, and setting that up fails on some hosts
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if wanted is Overlap.fused:
        importlib.import_module("torch.distributed._symmetric_memory")  # torch.ops.symm_mem
        return Form.fused
    use_transport(axis.name, PeerMemory(axis.group, device))
    return Form.pipelined


def gather_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, form: Form = PLAIN
) -> Tensor:
    """`F.linear(gather_sequence(x), weight, bias)`: [B, T/n, I] -> [B, T, O], weight and bias cast
    to x's dtype.

    forward   y_r = X W_r^T + b_r  with X = concat over s of x_s
    backward  dX_r = dy_r W_r             while X is gathered once more
              dW_r = dy_r^T X             while dx = (sum over s of dX_s)[part r] is scattered
              db_r = sum of dy_r over tokens

    As two ops, autograd would run both products before the scatter, and keep X [B, T, I] for each
    layer: the one activation that more ranks do not make smaller. Here x is kept. torch.compile
    merges the two gathers of the plain form and keeps X after all (2.13): it sends less and holds
    more.
    """
    y: Tensor
    bias = None if bias is None else bias.to(x.dtype)
    if axis.group is None:
        y = linear(gather_sequence(x, axis), weight, bias)
    elif form is Form.pipelined:
        low = _low(weight, x.dtype)
        y = pipelined_gather_linear(x.contiguous(), low, weight, bias, axis.size, axis.name)
    elif form is Form.fused:
        low = weight.to(x.dtype)
        y = FusedGatherLinear.apply(x.contiguous(), low, bias, axis.size, axis.name)
    else:
        y = _GatherLinear.apply(x, weight, bias, axis.size, axis.name)
    return y


def linear_scatter(x: Tensor, weight: Tensor, axis: Axis, form: Form = PLAIN) -> Tensor:
    """`scatter_sequence(F.linear(x, weight))`: [B, T, I] -> [B, T/n, O], the weight cast to x's
    dtype.

    forward   y_r = (sum over s of x_s W_s^T)[part r]
    backward  dx_r = dY W_r, dW_r = dY^T x_r  with dY = concat over s of dy_s

    Raises ValueError when n does not divide T.
    """
    if axis.group is None or form is Form.plain:
        return scatter_sequence(linear(x, weight, None), axis)
    check_divides(x.size(1), axis.size)
    y: Tensor
    if form is Form.pipelined:
        low = _low(weight, x.dtype)
        y = pipelined_linear_scatter(x.contiguous(), low, weight, axis.size, axis.name)
    else:
        y = FusedLinearScatter.apply(x, weight.to(x.dtype), axis.name)
    return y


def _low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What products read; its gradient is the weight's own. In the dtype already, it is the weight
    and no view of it: DeepSpeed's ZeRO 3 takes a parameter's memory away after forward, and a view
    that is kept for backward would hold it."""
    return weight if weight.dtype == dtype else weight.detach().to(dtype)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: int, name: str
    ) -> Tensor:
        low = weight.to(x.dtype)  # not an argument of its own: the compiler takes no tensor twice
        ctx.save_for_backward(x, low)
        ctx.size, ctx.name = size, name
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(finish_gather(start_gather(x, size, name), size), low, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        gathering = start_gather(x, ctx.size, ctx.name)
        scattering = start_scatter(grad @ low, ctx.size, ctx.name)
        rows = grad.flatten(0, 1)  # [B T, O]
        gathered = finish_gather(gathering, ctx.size).flatten(0, 1)
        dw, db = parameter_gradients(rows, gathered, *ctx.dtypes)
        return finish_scatter(scattering), dw, db, None, None
