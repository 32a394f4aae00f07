"""The norm with its residual connection in plain PyTorch, which torch.compile can fuse, too."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centers: bool
) -> tuple[Tensor, Tensor]:
    """(norm(s), s) with s = x + branch, both in x's dtype; statistics in fp32 at least.

    x, branch [.., D]; weight, bias [D]. centers: LayerNorm (Ba et al. 2016, arXiv:1607.06450), else
    RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).
    """
    stream = x if branch is None else x + branch
    wide = torch.promote_types(stream.dtype, torch.float32)
    values, weight = stream.to(wide), weight.to(wide)
    if centers:
        bias = None if bias is None else bias.to(wide)
        y = F.layer_norm(values, weight.shape, weight, bias, eps)
    else:
        y = F.rms_norm(values, weight.shape, weight, eps)
    return y.to(x.dtype), stream


def norm_gradient_reference(
    dy: Tensor, ds: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, centers: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dx [N, D], dw, db [D] (None without a bias) in the dtypes of stream and weight, by the
    equations in kernel.py."""
    h = stream.to(torch.float32)
    if centers:
        h = h - mean[:, None]
    h = h * rstd[:, None]
    dy = dy.to(torch.float32)
    g = dy * weight.to(torch.float32)
    dx = g - h * (g * h).mean(1, keepdim=True)
    if centers:
        dx = dx - g.mean(1, keepdim=True)
    dx = dx * rstd[:, None]
    if ds is not None:
        dx = dx + ds
    db = None if bias is None else dy.sum(0).to(weight.dtype)
    return dx.to(stream.dtype), (dy * h).sum(0).to(weight.dtype), db
