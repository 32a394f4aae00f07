"""AdamW with moments in 16 bits: checks and choice of backend."""

import math

import torch
from torch import Tensor

from kernels.adamw.reference import adamw_reference

BACKENDS = ("auto", "triton", "torch")
MOMENTS = (torch.float32, torch.bfloat16)


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step in place, in one pass; see reference.py for what it computes.

    Args:
        parameter: fp32, contiguous, of any shape.
        gradient: of its shape, any float dtype.
        m, v: first and second moment, of its shape, contiguous, fp32 or bf16.
        step: 0-dim, the number of this step, from 1.
        lr: a number, or 0-dim fp32 on the device.
        eps, weight_decay, beta1, beta2: beta in [0, 1).
        skip: 0-dim fp32; parameter and moments stay as they are where it is not 0. Nobody waits
            for it.
        scale: 0-dim fp32, by which the gradient is divided.
        backend: auto (triton on CUDA, torch elsewhere), triton or torch.

    Raises:
        ValueError: arguments that make no sense.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if not parameter.shape == gradient.shape == m.shape == v.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (parameter, gradient, m, v))
        raise ValueError(f"parameter, gradient, m and v must share a shape, got {shapes}")
    if parameter.dtype != torch.float32 or not {m.dtype, v.dtype} <= set(MOMENTS):
        raise ValueError(
            f"parameter is {parameter.dtype}, m {m.dtype}, v {v.dtype}: an fp32 parameter and "
            "moments in fp32 or bf16 are needed"
        )
    if not all(x.is_contiguous() for x in (parameter, m, v)):
        raise ValueError("parameter, m and v must be contiguous: they are written in place")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1={beta1} and beta2={beta2} must lie in [0, 1)")
    if parameter.numel() == 0:
        return
    if backend == "triton" or (backend == "auto" and parameter.is_cuda):
        # at the first call: `import kernels` must work where Triton is absent
        from kernels.adamw.kernel import launch

        launch(
            parameter, gradient.contiguous(), m, v, step, skip, scale,
            lr=lr, log2_beta1=_log2(beta1), log2_beta2=_log2(beta2), rest1=1 - beta1,
            rest2=1 - beta2, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
    elif skip is None or not bool(skip):
        adamw_reference(
            parameter, gradient if scale is None else gradient / scale, m, v, step,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip


def _log2(beta: float) -> float:
    """beta^t is 2^(t log2 beta); for 0 a power that is none."""
    return math.log2(beta) if beta > 0 else -1e4
