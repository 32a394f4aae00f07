"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in plain PyTorch."""

import torch
from torch import Tensor


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn dims i and i + R/2 of every head by its position's angle (the rotate-half pairing).

    x [B, T, H, D], table [T, R] or [B, T, R] fp32 with cos in its first half and sin in its second,
    R <= D; dims from R on pass through.
    Computed in fp32, returned in x's dtype.
    """
    half = table.shape[-1] // 2
    cos, sin = table.unsqueeze(-2).chunk(2, dim=-1)  # [T, 1, R / 2] each
    a, b, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    # cast before joining: the fp32 products then never leave the registers of the fused kernel
    turned = ((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype))
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)


def turned_back(table: Tensor) -> Tensor:
    """The table of the transpose, which is what a gradient is turned by: sin with the other sign.

    It is not the inverse where cos and sin carry a factor.
    """
    cos, sin = table.chunk(2, dim=-1)
    return torch.cat((cos, -sin), dim=-1)
