"""A model asked for its next token, on any layout of ranks."""

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrain.model.attention import Attention
from flashtrain.model.cache import KVCache
from flashtrain.model.gpt import GPT
from flashtrain.parallel.collectives import all_gather, gather_sequence, slice_sequence
from flashtrain.parallel.context import whole_sequences
from flashtrain.parallel.mesh import SINGLE, Axis


class Decoder:
    """What `flashtrain.model.generate` draws from. Every call is collective over the tensor ranks
    (and, where weights are sharded, over those that hold them)."""

    def __init__(
        self, model: GPT, tensor: Axis = SINGLE, after: Callable[[], object] = lambda: None
    ) -> None:
        """after: called at the end of every pass."""
        self.model, self.tensor, self.after = model, tensor, after
        # rows of one pass, tokens of one prompt: tensor ranks split both
        self.multiple = tensor.size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.model.embedding.dtype

    def empty_cache(self, batch: int, room: int) -> KVCache:
        attention = next(iter(self.model.blocks)).get_submodule("attention")
        assert isinstance(attention, Attention)
        return KVCache(
            self.model.config,
            batch,
            room,
            kv_heads=attention.kv_heads,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, last: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [B, V] fp32 of the token that follows each sequence, whole on every rank.

        Whole sequences, with a cache to fill or without one: tokens [B, T] int64 and last [B]
        int64, where each ends. With a filled cache: tokens [1, B], one new token of each.
        """
        # a training step compiled the blocks for its own shapes; nobody waits for more of that
        eager: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if "torch._dynamo" in sys.modules:
            eager = torch.compiler.set_stance("force_eager")
        with eager, whole_sequences(self.model):
            logits = self._logits(tokens, last, cache)
        self.after()
        return logits

    def _logits(self, tokens: Tensor, last: Tensor | None, cache: KVCache | None) -> Tensor:
        return self._project(self.model(tokens, cache=cache), self.model, last)

    def _project(self, hidden: Tensor, model: GPT, last: Tensor | None) -> Tensor:
        """Logits [B, V] of hidden states [B, T/n, D], each at its `last`, or of [1, B/n, D]."""
        rows = hidden.shape[1] * self.tensor.size
        if last is not None:
            rows = len(last)
            whole = gather_sequence(hidden, self.tensor)
            ends = whole[torch.arange(rows, device=last.device), last]
            ends = F.pad(ends, (0, 0, 0, -rows % self.multiple)).unsqueeze(0)
            hidden = slice_sequence(ends, self.tensor)
        logits = model.logits(hidden)[0, :rows].float()  # [B, V / n]
        if self.tensor.group is not None:
            parts = all_gather(logits, self.tensor.size, self.tensor.name)
            logits = parts.transpose(0, 1).flatten(1)
        return logits


@torch.no_grad()
def cast_weights(model: GPT) -> None:
    """Keep the matrices in the dtype they are used in, for a model that is not trained any more.

    The same numbers come out: every use casts them anyway, and reads twice the memory for it.
    """
    for name, module in model.named_modules():
        if "norm" not in name.rpartition(".")[2]:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(model.embedding.dtype)
