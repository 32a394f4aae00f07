"""What a call means beside its tensors, and the checks at the door.

Dims: N tokens, D width, V words of this shard.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VocabularyShard:
    """This caller holds words [first_word, first_word + V) of `vocabulary`; others hold the rest.

    combine: from the statistics of this shard, [2, n] (`Terms`), to those of the whole vocabulary:
        row 0 is the logsumexp over shards, row 1 the sum over shards. Called once for each chunk
        of tokens, on every shard in the same order, so it may talk to the others.
    """

    first_word: int
    vocabulary: int
    combine: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Terms:
    """The loss of one token with logits x over the shard's words, and what the rows kernels need.

    statistics [2, n]: lse = log sum exp(x), and the logit of the label where the shard holds it,
    else 0. Both are 0 for an ignored label. loss = lse - logit + z_loss lse^2.
    """

    ignore_index: int
    softcap: float  # c > 0: x = c tanh(y / c) of the product y; 0: x = y
    z_loss: float
    first_word: int


def describe(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    shard: VocabularyShard | None,
    chunk: int | None,
    backend: str,
) -> Terms:
    """Check a call of `linear_cross_entropy`; ValueError for what means nothing."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden [.., D] and weight [V, D] must share D, got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden of shape {list(hidden.shape)} needs labels of shape "
            f"{list(hidden.shape[:-1])}, not {list(labels.shape)}"
        )
    if hidden.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: floats are needed")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels.dtype}: int64 or int32 are needed")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden, weight and labels must share a device, got {hidden.device}, "
            f"{weight.device} and {labels.device}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0; None turns it off")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss} must be 0 or more")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; None takes the default")
    words, first = weight.shape[0], 0 if shard is None else shard.first_word
    if shard is not None and not 0 <= first <= first + words <= shard.vocabulary:
        raise ValueError(
            f"a shard of {words} words from word {first} does not lie in a vocabulary of "
            f"{shard.vocabulary}"
        )
    vocabulary = words if shard is None else shard.vocabulary
    if labels.device.type == "cpu":
        _check_labels(labels, vocabulary, ignore_index)
    return Terms(ignore_index, softcap or 0.0, z_loss, first)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """On a GPU nobody waits to look: there a label out of range makes the loss NaN."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        raise ValueError(
            f"label {int(labels[bad][0])} is neither in the vocabulary of {vocabulary} words nor "
            f"ignore_index={ignore_index}"
        )
