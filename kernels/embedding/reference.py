"""Rows of a table by number, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding_reference(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens [..], weight [V, D] -> [.., D] in dtype."""
    return F.embedding(tokens, weight).to(dtype)


def gradient_reference(tokens: Tensor, dy: Tensor, words: int, dtype: torch.dtype) -> Tensor:
    """dW [V, D]: row v is the sum of those dy [N, D] whose tokens [N] are v; summed in fp32."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = torch.zeros((words, dy.shape[1]), dtype=wide, device=dy.device)
    return total.index_add_(0, tokens, dy.to(wide)).to(dtype)
