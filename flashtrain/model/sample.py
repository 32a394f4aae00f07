"""Text from a model: one token at a time, the whole sequence run again for each.

No key/value cache: this is for looking at a run while it trains, on any layout of GPUs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (tokens [1, T] int64, position) -> logits [V] of the token that follows `position`
NextTokenLogits = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def sample(
    next_token_logits: NextTokenLogits,
    prompt: Sequence[int],
    n_tokens: int,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    n_ids: int | None = None,
) -> list[int]:
    """`prompt` and `n_tokens` more ids; each sees at most the `max_length` ids before it.

    Draws from softmax(logits / temperature), 0 being the likeliest token always, cut to the `top_k`
    likeliest tokens and then to the fewest that hold `top_p` of the probability. `n_ids`: only ids
    below it are drawn, for a vocabulary that was rounded up. The same seed and logits give the same
    ids on any device, so ranks that share a model stay together. Raises ValueError for an empty
    prompt or a setting out of range.
    """
    _check(len(prompt), max_length, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(n_tokens):
        seen = ids[-max_length:]
        # always max_length long: a compiled model sees one shape and a sharded one a length that
        # divides; causal attention cannot look at the padding on the right
        tokens = torch.zeros(1, max_length, dtype=torch.int64)
        tokens[0, : len(seen)] = torch.tensor(seen)
        logits = next_token_logits(tokens.to(device), len(seen) - 1)[:n_ids].float().cpu()
        ids.append(_draw(logits, temperature, top_k, top_p, generator))
    return ids


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One id from logits [V] fp32 on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / temperature).sort(descending=True, stable=True)
    ordered, ids = ordered[:top_k], ids[:top_k]
    shares = ordered.softmax(0)
    if top_p is not None:
        before = shares.cumsum(0) - shares  # the likeliest token has nothing before it
        shares = shares[before < top_p]
    return int(ids[torch.multinomial(shares, 1, generator=generator)])


def _check(
    prompt: int, max_length: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt < 1:
        raise ValueError("the prompt has no tokens: give at least one to go on from")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (likeliest token) or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and at most at 1, or be left out")
