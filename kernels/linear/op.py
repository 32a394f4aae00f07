"""A linear layer and a GELU MLP as differentiable ops: fp32 gradients, nothing between products.

The products of backward are three `torch.library` ops; on Hopper cuBLASLt computes them with their
epilogues (cublaslt.py), elsewhere plain PyTorch does (reference.py). Everything else is PyTorch.

Dims: N tokens, K input features, F output features (hidden ones of an MLP), E those after an MLP.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear import reference
from kernels.linear.cublaslt import Epilogue, Matrix, Plan, UnsupportedError, available, row_major

log = logging.getLogger("kernels.linear")

BACKENDS = ("auto", "cublaslt", "torch")
HOPPER = (9, 0)  # where the epilogues were measured; before, some run as kernels of their own
ALIGNMENTS = (256, 16)  # bytes, of all addresses


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """x weight^T + bias [.., F] in x's dtype; the weight is cast to it.

    In backward the weight's gradient leaves its product in the weight's dtype, fp32 for master
    weights, and on Hopper that product adds up the bias's gradient on its way.

    Args:
        x: [.., K]; weight: [F, K]; bias: [F] or None.
        backend: of backward's products: cublaslt, torch, or auto (cublaslt on Hopper).

    Raises:
        ValueError: arguments that make no sense.
    """
    _check(x, backend, weight=weight, bias=bias)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def gelu_mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    keeps: bool = True,
    backend: str = "auto",
) -> Tensor:
    """gelu(x up^T + up_bias) down^T + down_bias [.., E] in x's dtype, GELU in its tanh form.

    Args:
        x: [.., K]; up: [F, K]; down: [E, F]; the biases: [F] and [E], or None.
        keeps: whether gelu's output is kept for backward beside its input, [N, F] both; False
            makes it again there.
        backend: as in `linear`.

    Raises:
        ValueError: arguments that make no sense.
    """
    _check(x, backend, up=up, up_bias=up_bias, down=down, down_bias=down_bias)
    y: Tensor = _GeluMLP.apply(
        x.reshape(-1, x.shape[-1]), up, up_bias, down, down_bias, keeps, backend
    )
    return y.view(*x.shape[:-1], down.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtypes = [weight.dtype, None if bias is None else bias.dtype]
        ctx.backend = backend
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:3]
        dx = dy @ weight if needs_x else None
        of_weight, of_bias = _wanted(ctx.dtypes, needs)
        dw, db = parameter_gradients(dy, x, of_weight, of_bias, ctx.backend)
        return dx, dw, db, None


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
        down_bias: Tensor | None, keeps: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        up16, down16 = up.to(x.dtype), down.to(x.dtype)
        z, a = _gelu_forward(x, up16, None if up_bias is None else up_bias.to(x.dtype), backend)
        ctx.save_for_backward(x, z, up16, down16, *([a] if keeps else []))
        ctx.dtypes = [None if p is None else p.dtype for p in (up, up_bias, down, down_bias)]
        ctx.backend = backend
        return F.linear(a, down16, None if down_bias is None else down_bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, up, down, *kept = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:5]
        of_up, of_up_bias, of_down, of_down_bias = _wanted(ctx.dtypes, needs)
        dz, total = _gelu_backward(dy, down, z, of_up_bias is not None, ctx.backend)
        a = kept[0] if kept else F.gelu(z, approximate="tanh")
        d_down, d_down_bias = parameter_gradients(dy, a, of_down, of_down_bias, ctx.backend)
        dx = dz @ up if needs_x else None
        d_up, _ = parameter_gradients(dz, x, of_up, None, ctx.backend)
        d_up_bias = None if of_up_bias is None else total.to(of_up_bias)
        return dx, d_up, d_up_bias, d_down, d_down_bias, None, None


def _wanted(dtypes: list[Any], needs: list[bool]) -> list[Any]:
    """The dtypes of those gradients that are needed, None for the others."""
    return [dtype if need else None for dtype, need in zip(dtypes, needs, strict=True)]


def parameter_gradients(
    dy: Tensor,
    x: Tensor,
    of_weight: torch.dtype | None,
    of_bias: torch.dtype | None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """dW = dy^T x [F, K] and db = the sum of dy [F], each in its dtype; None: not wanted.

    For who computes them apart from the rest of backward. dy [N, F], x [N, K].
    """
    if of_weight is None:
        return None, None if of_bias is None else dy.sum(0, dtype=of_bias)
    dw, db = _weight_gradient(dy, x, of_weight, of_bias is not None, backend)
    return dw, None if of_bias is None else db.to(of_bias)


# A namespace of their own: what attention registers is kept through activation checkpointing.


@torch.library.custom_op("flashtrain_linear::gelu_forward", mutates_args=())
def _gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """As reference.gelu_forward."""
    if _takes_cublaslt(x, backend):
        z, a = (x.new_empty(x.shape[0], weight.shape[0]) for _ in "za")
        epilogue = Epilogue.gelu_aux if bias is None else Epilogue.gelu_aux_bias
        plan = _plan(row_major(weight, True), row_major(x), row_major(a), epilogue,
                     _alignment(x, weight, z, a, bias), backend)  # fmt: skip
        if plan is not None:
            plan.run(weight, x, a, z, bias)
            return z, a
    return reference.gelu_forward(x, weight, bias)


@_gelu_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("flashtrain_linear::gelu_backward", mutates_args=())
def _gelu_backward(
    dy: Tensor, weight: Tensor, z: Tensor, sums: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """As reference.gelu_backward, and with `sums` the sum of that over tokens [F], else [0]."""
    dy = dy.contiguous()
    if _takes_cublaslt(dy, backend):
        dz, total = torch.empty_like(z), z.new_empty(z.shape[1] if sums else 0)
        epilogue = Epilogue.dgelu_bgrad if sums else Epilogue.dgelu
        plan = _plan(row_major(weight), row_major(dy), row_major(dz), epilogue,
                     _alignment(dy, weight, z, dz), backend)  # fmt: skip
        if plan is not None:
            plan.run(weight, dy, dz, z, total if sums else None)
            return dz, total
    dz = reference.gelu_backward(dy, weight, z)
    return dz, reference.bias_gradient(dz, z.dtype) if sums else z.new_empty(0)


@_gelu_backward.register_fake
def _(dy: Tensor, weight: Tensor, z: Tensor, sums: bool, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[1] if sums else 0)


@torch.library.custom_op("flashtrain_linear::weight_gradient", mutates_args=())
def _weight_gradient(
    dy: Tensor, x: Tensor, dtype: torch.dtype, sums: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """As reference.weight_gradient, and with `sums` reference.bias_gradient, else [0]."""
    dy, x = dy.contiguous(), x.contiguous()
    if _takes_cublaslt(dy, backend):
        dw = dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
        total = dy.new_empty(dy.shape[1] if sums else 0, dtype=dtype)
        epilogue = Epilogue.bgradb if sums else Epilogue.none
        plan = _plan(row_major(x), row_major(dy, True), row_major(dw), epilogue,
                     _alignment(dy, x, dw), backend)  # fmt: skip
        if plan is not None:
            plan.run(x, dy, dw, bias=total if sums else None)
            return dw, total
    dw = reference.weight_gradient(dy, x, dtype)
    return dw, reference.bias_gradient(dy, dtype) if sums else dw.new_empty(0)


@_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, dtype: torch.dtype, sums: bool, backend: str) -> tuple[Tensor, Tensor]:
    total = dy.new_empty(dy.shape[1] if sums else 0, dtype=dtype)
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype), total


_plans: dict[tuple[object, ...], Plan | None] = {}
MOST_PLANS = 1024


def _plan(
    a: Matrix, b: Matrix, d: Matrix, epilogue: Epilogue, alignment: int, backend: str
) -> Plan | None:
    """Made once for each product; None where the library has no way and another backend may."""
    key = (a, b, d, epilogue, alignment, torch.cuda.current_device())
    if key not in _plans:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        try:
            _plans[key] = Plan(a, b, d, epilogue, alignment)
        except UnsupportedError as error:
            if backend == "cublaslt":
                raise
            log.warning("%s: PyTorch's operations compute it", error)
            _plans[key] = None
    return _plans[key]


def _takes_cublaslt(x: Tensor, backend: str) -> bool:
    """Rows of 16 bytes are the library's wish for its fast kernels, and no row at all is nothing
    it computes."""
    if backend == "cublaslt":
        return True
    fits = x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0 and x.shape[0] > 0
    return backend == "auto" and x.is_cuda and fits and _is_hopper(x.device) and available()


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


def _alignment(*tensors: Tensor | None) -> int:
    together = 0
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return next((n for n in ALIGNMENTS if together % n == 0), 2)


def _check(x: Tensor, backend: str, **parameters: Tensor | None) -> None:
    """Sizes that fit together; the names of `parameters` are those of the caller."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    features = x.shape[-1]
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.dim() == 2:
            if parameter.shape[1] != features:
                raise ValueError(
                    f"{name} {list(parameter.shape)} takes {parameter.shape[1]} features, and gets "
                    f"{features}"
                )
            features = parameter.shape[0]
        elif parameter.shape != (features,):
            raise ValueError(f"{name} {list(parameter.shape)} must be [{features}]")
