"""One step of AdamW in plain PyTorch (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        t-th step
    p <- (1 - lr decay) p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

All of it in fp32; m and v are rounded to the dtype they are kept in, to nearest, after p took them
unrounded.
"""

import torch
from torch import Tensor


def adamw_reference(
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
) -> None:
    """In place on `parameter`, `m` and `v`; `step` counts this step."""
    gradient = gradient.to(torch.float32)
    new_m = torch.lerp(m.to(torch.float32), gradient, 1 - beta1)
    new_v = torch.lerp(v.to(torch.float32), gradient.square(), 1 - beta2)
    m.copy_(new_m)
    v.copy_(new_v)
    count = step.to(parameter.device)
    size = (new_v / (1 - beta2**count)).sqrt_().add_(eps)
    parameter.mul_(1 - lr * weight_decay).sub_(new_m.div_(size).mul_(lr / (1 - beta1**count)))
