"""Which weights dropout keeps: Philox 4x32-10 (Salmon et al. 2011) of the weight's own place.

The seed is the key and (key place, query row, batch * H + head, 0) the counter of one block of
four random words, of which the first decides. So the mask needs no memory and no order: every
backend, tile size and pass sees the same one.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by each round
_ROUNDS = 10


def threshold(dropout: float) -> int:
    """A weight is kept when its random word, an unsigned 32-bit number, is at least this."""
    return int(dropout * 2**32)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as int64 [1] on the device; None draws one from PyTorch's generator there."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, dropout: float, shape: tuple[int, int, int, int]) -> Tensor:
    """True where a weight is kept, [B, H, T, S] = shape; seed is int64 [1]."""
    B, H, T, S = shape
    key = torch.arange(S, device=seed.device)
    query = torch.arange(T, device=seed.device)[:, None]
    head = torch.arange(B * H, device=seed.device).view(B, H, 1, 1)
    word = philox((key, query, head, torch.zeros_like(key)), (seed & _WORD, seed >> 32 & _WORD))[0]
    return word >= threshold(dropout)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for four counter words and two key words, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # products of two words wrap around in int64, and still have the right 64 bits
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return torch.broadcast_tensors(c0, c1, c2, c3)
