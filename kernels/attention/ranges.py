"""Masks as intervals: where documents begin and end, which keys of a batch row may be seen.

Everything stays on the device: nothing here waits for the GPU or breaks a graph.
Dims: B batch, T queries, S keys.
"""

import torch
from torch import Tensor


def document_ids(documents: Tensor, batch: int, length: int) -> Tensor:
    """Ids [B, T] of documents in any form that `attention` takes.

    Args:
        documents: [B, T] ids, or [n + 1] ascending: where documents start among the B * T tokens
            in row-major order, and where the last one ends; tokens after it are one more document.
            Or [B, 2, T], what `document_bounds` makes of either.
    """
    if documents.dim() == 2:
        return documents
    if documents.dim() == 3:
        return documents[:, 0]  # where a document starts is a name for it
    places = torch.arange(batch * length, dtype=documents.dtype, device=documents.device)
    return torch.searchsorted(documents, places, right=True).view(batch, length)


def document_bounds(documents: Tensor, batch: int = 1, length: int = 0) -> Tensor:
    """Where each token's document starts and ends (exclusive): [B, 2, T] int32.

    What the kernels read. It takes a dozen small kernels to find, so a model computes it once and
    gives it to every layer.

    Args:
        documents: [B, T] ids, or cu_seqlens [n + 1] over batch * length tokens.
    """
    if documents.dim() == 3:
        return documents
    documents = document_ids(documents, batch, length)
    T = documents.shape[1]
    place = torch.arange(T, dtype=torch.int32, device=documents.device)
    changed = documents[:, 1:] != documents[:, :-1]
    starts = torch.nn.functional.pad(changed, (1, 0), value=True)
    ends = torch.nn.functional.pad(changed, (0, 1), value=True)
    start = torch.where(starts, place, 0).cummax(1).values
    end = torch.where(ends, place + 1, T).flip(1).cummin(1).values.flip(1)
    return torch.stack([start, end], 1).to(torch.int32)


def key_range(key_mask: Tensor) -> Tensor:
    """First and last key that each batch row may see: [B, 2] int32; (S, -1) where there is none.

    Args:
        key_mask: [B, S] bool.
    """
    B, S = key_mask.shape
    if S == 0:
        return torch.zeros((B, 2), dtype=torch.int32, device=key_mask.device)
    place = torch.arange(S, device=key_mask.device)  # int64: torch 2.11 compiles no int32 here
    first = torch.where(key_mask, place, S).amin(1)
    last = torch.where(key_mask, place, -1).amax(1)
    return torch.stack([first, last], 1).to(torch.int32)
