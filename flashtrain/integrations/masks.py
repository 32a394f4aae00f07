"""Hugging Face masks in the words of `attention`: key padding, window and documents.

transformers describes a mask as a function of (batch, head, query, key). Most are compositions of a
few parts that `attention` computes without a mask in memory; `attention_mask` recognises these and
builds a dense mask for the rest only. What it returns travels through the model to
flashtrain.integrations.transformers.attention, in one of these forms:

- None: nothing is hidden; whether the queries are causal, the layer knows.
- [B, W, L]: causal. A query sees the last W keys up to its own place, the queries are the last of
  the first L keys, and what lies behind those (the unused end of a static cache) is not there.
  bool: the keys that may be seen, the same along W, which takes no memory; with L = 0, all S of
  them. int64: the documents of packed sequences, likewise.
- [B, 1, 1, S] bool or [B, 1, T, S] floating (0 or -inf): the whole truth, causality included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

MaskFunction = Callable[..., Any]

# closures made by the same line of transformers share their code object
_BOTH = masking_utils.and_masks(causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
# transformers >= 5.21 counts places from the start of the document
_RENUMBERED = (
    masking_utils.remap_positions_for_packed_sequence(causal_mask_function, torch.empty(0)).__code__
    if hasattr(masking_utils, "remap_positions_for_packed_sequence")
    else None
)


@dataclass
class Pattern:
    """A mask that `attention` computes from these alone."""

    causal: bool = False
    window: int | None = None  # keys seen, the query's own included
    documents: Tensor | None = None  # [B, T]


def read(function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function; None for one that needs a dense mask."""
    pattern = Pattern()
    for part in _parts(function):
        code = getattr(part, "__code__", None)
        if part is causal_mask_function:
            pattern.causal = True
        elif code is _WINDOW:
            window = _captured(part, "sliding_window")
            pattern.window = window if pattern.window is None else min(window, pattern.window)
        elif code is _PACKED and pattern.documents is None:
            pattern.documents = _captured(part, "packed_sequence_mask")
        elif part is not bidirectional_mask_function:
            return None
    if pattern.causal:
        return pattern
    return pattern if pattern.window is None and pattern.documents is None else None


def _read_compiling(function: MaskFunction, window: int | None) -> Pattern | None:
    """`read` without a look into closures. window: of a mask that is causal but for this."""
    if function is bidirectional_mask_function:
        return Pattern()
    if function is causal_mask_function or window is not None:
        return Pattern(causal=True, window=window)
    return None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The entry in AttentionMaskInterface. attention_mask [B, >= L]: True for tokens, not padding.

    Outside torch.compile it looks, once a forward pass, whether there is padding at all, as the
    kernels without a key mask are faster. Under torch.compile closures cannot be read: packed
    sequences then take a dense mask, and so does a model given neither mask nor cache, because
    transformers cannot tell either whether its sequences are packed.
    """
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask  # made here before, and handed to a model inside the model

    def dense() -> Tensor:
        mask: Tensor = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap,
            device=device,
        )  # fmt: skip
        if q_length == 1:
            return mask  # [B, 1, 1, S]: a mask of keys
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))

    if torch.compiler.is_compiling():
        chunked = getattr(config, "attention_chunk_size", None) is not None
        window = None if chunked or not allow_is_causal_skip else local_size
        pattern = _read_compiling(mask_function, window)
    else:
        pattern = read(mask_function)
    if pattern is None:
        return dense()
    if not pattern.causal:
        visible = _tokens(attention_mask, kv_offset, kv_length)
        if not allow_is_bidirectional_skip:
            return dense()
        return None if visible is None else visible[:, None, None]

    if isinstance(q_offset, Tensor):  # of a static cache; reading it at every token costs time
        if q_length == 1 or torch.compiler.is_compiling():
            return dense()
        q_offset = int(q_offset)
    end = q_offset + q_length - kv_offset  # keys up to the last query
    if end > kv_length or not (allow_is_causal_skip or pattern.documents is not None):
        return dense()
    reach = end if pattern.window is None else min(pattern.window, end)
    if pattern.documents is not None:
        return pattern.documents.expand(batch_size, -1)[:, None].expand(-1, reach, -1)
    visible = _tokens(attention_mask, kv_offset, end)
    if visible is None and end == kv_length and reach == end:
        return None
    if visible is None:
        seen = end if end < kv_length else 0
        visible = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    return visible[:, None].expand(-1, reach, -1)


def _tokens(mask: Tensor | None, start: int, length: int) -> Tensor | None:
    """mask[:, start : start + length], False behind its end; None when it is all True."""
    if mask is None:
        return None
    mask = mask.bool()[:, start : start + length]
    mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _parts(function: MaskFunction) -> Iterator[MaskFunction]:
    code = getattr(function, "__code__", None)
    if code is _BOTH:
        for part in _captured(function, "mask_functions"):
            yield from _parts(part)
    elif code is not None and code is _RENUMBERED:
        yield from _parts(_captured(function, "mask_function"))
    else:
        yield function


def _captured(function: MaskFunction, name: str) -> Any:
    """The value of a variable that a closure holds."""
    place = function.__code__.co_freevars.index(name)
    cells = function.__closure__
    assert cells is not None
    return cells[place].cell_contents
