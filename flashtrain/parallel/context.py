"""Context parallelism: every rank of an axis holds a part of each sequence.

A sequence of T tokens is cut into 2c chunks over c ranks, and rank r holds chunks r and 2c-1-r, in
this order. Under a causal mask an early chunk sees little and its late partner much, so all ranks
have the same work. Everything but attention runs on a rank's own tokens. Attention has three forms:

    gather   all keys and values go to every rank, [B, T, K, D], some heads at a time while others
             are computed (gathered.py); any mask. Plain causal forward is the ring's
    ring     keys and values go round, a rank's at a time (ring.py); causal attention only, but no
             rank ever holds more than two parts of them
    ulysses  tokens are exchanged for heads and back: each rank computes whole sequences for H/c
             of its heads (Jacobs et al. 2023, arXiv:2309.14509); any mask

The axis's ranks see different tokens, so losses and gradients are summed over them as over data
ranks. `documents` are those of whole sequences everywhere: every rank reads them all.

Dims: B batch, T tokens of whole sequences, c ranks, L = T / 2c, H and K query and key/value heads
of this tensor rank, D head size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.config import ContextKind
from flashtrain.data.loader import Batch
from flashtrain.model.attention import Attention
from flashtrain.model.gpt import GPT
from flashtrain.parallel.chunks import cut_parts, join_parts, own_chunks
from flashtrain.parallel.collectives import exchange_ranks
from flashtrain.parallel.gathered import gather_forward
from flashtrain.parallel.mesh import Axis
from flashtrain.parallel.ring import ring_attention
from kernels.attention import attention


def split_context(model: GPT, axis: Axis, kind: ContextKind) -> None:
    """Make a model run on this rank's part of each sequence, in place: `own_part` of its tokens.

    Attention talks over the axis, and positions are those in the whole sequence. An axis of one
    leaves the model as it is.
    """
    if axis.group is None:
        return
    forms: dict[ContextKind, Callable[..., Tensor]] = {
        ContextKind.gather: gather_attention,
        ContextKind.ring: ring_attention,
        ContextKind.ulysses: ulysses_attention,
    }
    parts = _Parts(axis, forms[kind])
    for attention_half in _attentions(model):
        attention_half.attend = parts
    # a hook, because a wrapping module would rename the table of learned positions
    model.position.register_forward_pre_hook(parts.own_places)


@contextlib.contextmanager
def whole_sequences(model: GPT) -> Iterator[None]:
    """In here the model runs whole sequences on every rank of the axis: for text that it makes
    itself, which is short and whose keys and values are kept."""
    parts = next(_attentions(model)).attend
    if not isinstance(parts, _Parts):
        yield
        return
    parts.on = False
    try:
        yield
    finally:
        parts.on = True


class _Parts:
    """What a model does otherwise where it sees a part of each sequence."""

    def __init__(self, axis: Axis, form: Callable[..., Tensor]) -> None:
        self.axis, self.form, self.on = axis, form, True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.on:
            return self.form(q, k, v, axis=self.axis, **options)
        mixed: Tensor = attention(q, k, v, causal=True, **options)
        return mixed

    def own_places(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Ask for the places of this rank's tokens, not for the first ones."""
        length, device, places = arguments
        if not self.on:
            return arguments
        whole = self.axis.size * length
        if places is None:
            places = torch.arange(whole, device=device)
        return whole, device, own_part(places, self.axis, dim=-1)


def _attentions(model: GPT) -> Iterator[Attention]:
    return (module for module in model.modules() if isinstance(module, Attention))


def own_part(x: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """This rank's two chunks of a whole sequence: T along `dim` becomes T/c, in order.

    Raises ValueError when 2c does not divide T.
    """
    if axis.group is None:
        return x
    chunks = 2 * axis.size
    if x.size(dim) % chunks:
        raise ValueError(
            f"a sequence of {x.size(dim)} tokens does not divide into the {chunks} chunks of "
            f"{axis.size} context ranks: pad it to {-(-x.size(dim) // chunks) * chunks}"
        )
    parts = x.chunk(chunks, dim)
    return torch.cat([parts[chunk] for chunk in own_chunks(axis.rank, axis.size)], dim)


def own_batch(batch: Batch, axis: Axis) -> Batch:
    """This rank's tokens and labels, shifted against each other before; the documents of all."""
    if axis.group is None:
        return batch
    return batch._replace(tokens=own_part(batch.tokens, axis), labels=own_part(batch.labels, axis))


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axis: Axis, alibi_slopes: Tensor | None,
    documents: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Causal attention of this rank's queries over whole sequences.

    q [B, T/c, H, D], k and v [B, T/c, K, D]; alibi_slopes [H]; documents [B, 2, T] by
    `document_bounds`. Raises ValueError for a backend that gives no lse: torch on a GPU.
    """
    out, _ = gather_forward(
        q, k, v, alibi_slopes, documents, backend, axis.rank, axis.size, axis.name
    )
    result: Tensor = out
    return result


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axis: Axis, alibi_slopes: Tensor | None,
    documents: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Causal attention of this rank's queries over whole sequences; arguments as above.

    Needs c to divide H and K.
    """
    size = axis.size
    heads = [x.unflatten(2, (size, -1)) for x in (q, k, v)]  # [B, T/c, c, H/c, D]
    counts = [x.shape[3] for x in heads]
    by_rank = torch.cat(heads, dim=3).permute(2, 0, 1, 3, 4)  # [c, B, T/c, (H + 2K)/c, D]
    q, k, v = join_parts(exchange_ranks(by_rank, axis)).split(counts, dim=2)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.chunk(size)[axis.rank]
    mixed = attention(
        q, k, v, causal=True, alibi_slopes=alibi_slopes, documents=documents, backend=backend
    )
    back = exchange_ranks(cut_parts(mixed.chunk(2 * size, 1)), axis)  # [c, B, T/c, H/c, D]
    return back.permute(1, 2, 0, 3, 4).flatten(2, 3)
