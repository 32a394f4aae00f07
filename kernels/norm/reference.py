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
