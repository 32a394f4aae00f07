"""The step of AdamW as one pass over parameter, gradient and moments. See reference."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.device import on_device
from kernels.launch import run
from kernels.sizes import cdiv

# numbers of a program: 8 a thread, two 16-byte accesses of fp32 and one of bf16
BLOCK, WARPS = 1024, 4


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr,  # [n]
    step_ptr,  # 0-dim fp32: this step's number
    skip_ptr,  # 0-dim fp32: nothing is touched where it is not 0
    scale_ptr,  # 0-dim fp32, divides the gradient
    lr_ptr,  # 0-dim fp32, in place of lr
    n, lr, log2_beta1, log2_beta2, rest1, rest2, eps, weight_decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """rest: 1 - beta, rounded once. The last three pointers may be None."""
    skip = 0.0
    if skip_ptr is not None:
        skip = tl.load(skip_ptr)
    if skip == 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        step = tl.load(step_ptr)
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            g = tl.div_rn(g, tl.load(scale_ptr))
        if lr_ptr is not None:
            lr = tl.load(lr_ptr)
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m += rest1 * (g - m)
        v += rest2 * (g * g - v)
        size = tl.sqrt_rn(tl.div_rn(v, 1.0 - tl.exp2(step * log2_beta2))) + eps
        rate = lr / (1.0 - tl.exp2(step * log2_beta1))
        p = p * (1.0 - lr * weight_decay) - rate * tl.div_rn(m, size)
        tl.store(p_ptr + at, p, mask=inside)
        tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)


def launch(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    skip: Tensor | None,
    scale: Tensor | None,
    *,
    lr: float | Tensor,
    log2_beta1: float,
    log2_beta2: float,
    rest1: float,
    rest2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """All contiguous and on one device."""
    n = parameter.numel()
    with on_device(parameter):
        run(
            adamw_kernel, (cdiv(n, BLOCK),),
            parameter, gradient, m, v, step, skip, scale, lr if isinstance(lr, Tensor) else None,
            n, 0.0 if isinstance(lr, Tensor) else lr, log2_beta1, log2_beta2, rest1, rest2, eps,
            weight_decay, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
