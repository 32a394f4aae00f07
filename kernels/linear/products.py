"""The products and passes of layers as `torch.library` ops: which way computes them, and fakes.

A namespace of their own: what attention registers is kept through activation checkpointing.

Dims: N tokens, K input features, F output features (of an MLP: hidden), E features after it.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.device import on_device
from kernels.linear import reference
from kernels.linear.cublaslt import Epilogue, Plan, UnsupportedError, available, row_major
from kernels.linear.tiles import rounds_gradient
from kernels.operation import operation, register_fake

log = logging.getLogger("kernels.linear")

# cublaslt: passes in Triton, products by cuBLASLt; triton: passes in Triton, products by PyTorch
BACKENDS = ("auto", "cublaslt", "triton", "torch")
SMALL = (torch.bfloat16, torch.float16)
HOPPER = (9, 0)  # where the epilogues were measured; before, some run as kernels of their own
ALIGNMENTS = (256, 16)  # bytes, of all addresses


def resolve(x: Tensor, backend: str) -> str:
    """`torch` where that is what `auto` means for x. Which other backend it means is for the ops to
    ask: torch.compile can look neither at a card nor for a library while it traces."""
    if backend == "auto" and (not x.is_cuda or x.dtype not in SMALL or x.numel() == 0):
        return "torch"
    return backend


@operation("flashtrain_linear::add_product")
def add_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor, backend: str
) -> Tensor:
    """As reference.add_product, by cuBLASLt rounded once."""
    stream = stream.contiguous()  # as the fake says of the sum
    if _takes_cublaslt(x, backend):
        x, weight, bias = _as_they_count(x, weight, bias)
        y = x.new_empty(x.shape[0], weight.shape[0])
        epilogue = Epilogue.none if bias is None else Epilogue.bias
        with on_device(x):
            plan = _plan(weight, x, y, epilogue, True, stream, bias)
            if plan is not None:
                plan.run(weight, x, y, c=stream, bias=bias)
                return y
    return reference.add_product(x, weight, bias, stream)


@register_fake(add_product)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operation("flashtrain_linear::add_float8_product")
def add_float8_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, stream: Tensor,
    fast: bool, backend: str,
) -> Tensor:  # fmt: skip
    """As reference.add_float8_product, by cuBLASLt rounded once; checks: float8.py."""
    stream = stream.contiguous()
    a, b, bias = _as_they_count(a, b, bias)
    if stream.dtype in SMALL and _takes_cublaslt(a, backend):
        y = torch.empty_like(stream)
        epilogue = Epilogue.none if bias is None else Epilogue.bias
        with on_device(a):
            plan = _plan(b, a, y, epilogue, True, stream, bias, fast=fast)
            if plan is not None:
                plan.run(b, a, y, c=stream, bias=bias, scales=(b_scale, a_scale))
                return y
    return reference.add_float8_product(a, b, a_scale, b_scale, bias, stream, fast)


@register_fake(add_float8_product)
def _(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, stream: Tensor,
    fast: bool, backend: str,
) -> Tensor:  # fmt: skip
    return stream.new_empty(stream.shape)


@operation("flashtrain_linear::gelu_product")
def gelu_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """As reference.gelu_product."""
    if _takes_cublaslt(x, backend):
        x, weight, bias = _as_they_count(x, weight, bias)
        z, a = (x.new_empty(x.shape[0], weight.shape[0]) for _ in "za")
        epilogue = Epilogue.gelu_aux if bias is None else Epilogue.gelu_aux_bias
        with on_device(x):
            plan = _plan(weight, x, a, epilogue, True, z, bias)
            if plan is not None:
                plan.run(weight, x, a, aux=z, bias=bias)
                return z, a
    return reference.gelu_product(x, weight, bias)


@register_fake(gelu_product)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


@operation("flashtrain_linear::gelu_gradient")
def gelu_gradient(
    dy: Tensor, weight: Tensor, z: Tensor, sums: bool, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.gelu_gradient; then, each [0] if not wished, the sum of that over tokens [F] and
    gelu(z) [N, F], which then need not be kept."""
    dz = dy @ weight
    total, a = _kernels().gelu_backward(dz, z.contiguous(), sums, again)
    return dz, total, a


@register_fake(gelu_gradient)
def _(
    dy: Tensor, weight: Tensor, z: Tensor, sums: bool, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = z.new_empty(z.shape[1] if sums else 0, dtype=torch.float32)
    return z.new_empty(z.shape), total, z.new_empty(z.shape if again else 0)


@operation("flashtrain_linear::swiglu_gradient")
def swiglu_gradient(d: Tensor, z: Tensor, sums: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.swiglu_gradient; then, each [0] if not wished, the sum of that over tokens [2 F]
    and swiglu(z) [N, F], which then need not be kept."""
    return _kernels().swiglu_backward(d.contiguous(), z.contiguous(), sums, again)


@register_fake(swiglu_gradient)
def _(d: Tensor, z: Tensor, sums: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = z.new_empty(z.shape[1] if sums else 0, dtype=torch.float32)
    return z.new_empty(z.shape), total, d.new_empty(d.shape if again else 0)


@operation("flashtrain_linear::weight_gradient")
def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """As reference.weight_gradient; where that is slow, rounded to dy's dtype on the way."""
    dy, x = dy.contiguous(), x.contiguous()
    if dtype != dy.dtype and rounds_gradient(dy.shape[1], x.shape[1], dy.device):
        return (dy.t() @ x).to(dtype)
    if _takes_cublaslt(dy, backend):
        dw = dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
        with on_device(dy):
            plan = _plan(x, dy, dw, Epilogue.none, False)
            if plan is not None:
                plan.run(x, dy, dw)
                return dw
    return reference.weight_gradient(dy, x, dtype)


@register_fake(weight_gradient)
def _(dy: Tensor, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


@operation("flashtrain_linear::column_sums")
def column_sums(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """As reference.column_sums."""
    return _kernels().column_sums(dy.contiguous(), dtype)


@register_fake(column_sums)
def _(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(dy.shape[1], dtype=dtype)


@operation("flashtrain_linear::cast")
def cast(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, again: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias ([0]: none) in another dtype, by one launch.

    again: nothing but a difference between forward's cast and backward's, which a compiler would
    otherwise keep instead.
    """
    bias = None if bias is None else bias.contiguous()
    return _kernels().cast(weight.contiguous(), bias, dtype)


@register_fake(cast)
def _(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, again: bool
) -> tuple[Tensor, Tensor]:
    size = 0 if bias is None else bias.numel()
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(size, dtype=dtype)


@register_flop_formula(
    [
        torch.ops.flashtrain_linear.add_product,
        torch.ops.flashtrain_linear.add_float8_product,
        torch.ops.flashtrain_linear.gelu_product,
    ]
)
def _forward_flops(x: Any, weight: Any, *_: Any, **_options: Any) -> int:
    """PyTorch's counter sees the op, not what it calls; arguments come as shapes."""
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.flashtrain_linear.gelu_gradient)
def _gelu_gradient_flops(dy: Any, weight: Any, *_: Any, **_options: Any) -> int:
    return 2 * dy[0] * dy[1] * weight[1]


@register_flop_formula(torch.ops.flashtrain_linear.weight_gradient)
def _weight_gradient_flops(dy: Any, x: Any, *_: Any, **_options: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]


def _kernels() -> Any:
    # at the first call: `import kernels` must work where Triton is absent
    from kernels.linear import kernel

    return kernel


_plans: dict[tuple[object, ...], Plan | None] = {}
MOST_PLANS = 1024


def _as_they_count(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With nothing between their numbers: the library is told sizes alone."""
    return x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


def _plan(
    a: Tensor, b: Tensor, d: Tensor, epilogue: Epilogue, turns_a: bool, *others: Tensor | None,
    fast: bool = False,
) -> Plan | None:  # fmt: skip
    """Made once for each product, on the current device; None where the library has no way, and
    PyTorch computes it.

    turns_a: A is used as its transpose, else B is. others: whose addresses the library reads, too.
    """
    alignment, device = _alignment(a, b, d, *others), torch.cuda.current_device()
    # d's sizes are those of a and b
    key = (a.shape, b.shape, a.dtype, b.dtype, d.dtype, epilogue, turns_a, fast, alignment, device)
    if key not in _plans:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        matrices = row_major(a, turns_a), row_major(b, not turns_a), row_major(d)
        try:
            _plans[key] = Plan(*matrices, epilogue, alignment, fast=fast)
        except UnsupportedError as error:
            log.warning("%s: PyTorch's operations compute it", error)
            _plans[key] = None
    return _plans[key]


def _takes_cublaslt(x: Tensor, backend: str) -> bool:
    """Rows of 16 bytes are the library's wish for its fast kernels, and no row at all is nothing
    it computes."""
    if backend == "auto" and not (_is_hopper(x.device) and available()):
        return False
    row_bytes = x.shape[1] * x.element_size()
    return backend in ("auto", "cublaslt") and row_bytes % 16 == 0 and x.shape[0] > 0


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


def _alignment(*tensors: Tensor | None) -> int:
    together = 0
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return next((n for n in ALIGNMENTS if together % n == 0), 2)
