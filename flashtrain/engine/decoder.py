"""A model asked for its next token, on any layout of ranks."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtrain.model.attention import Attention
from flashtrain.model.cache import KVCache
from flashtrain.model.gpt import GPT
from flashtrain.parallel.collectives import all_gather, gather_sequence, slice_sequence
from flashtrain.parallel.context import whole_sequences
from flashtrain.parallel.mesh import SINGLE, Axis

LOGITS = 2**28  # bytes of fp32 logits that `scores` has in memory at a time


class Decoder:
    """What `flashtrain.model.generate` draws from, and `flashtrain.scoring` asks. Every call is
    collective over the tensor ranks (and, where weights are sharded, over those that hold them).

    Dims: B sequences, T tokens, N places of them, D width, V vocabulary, n tensor ranks.
    """

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
        with self._whole():
            logits = self._logits(tokens, last, cache)
        self.after()
        return logits

    @torch.no_grad()
    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How likely the model finds given tokens; whole on every rank.

        Args:
            tokens: whole sequences [B, T] int64, T a multiple of `multiple`.
            places: [N] int64, b T + t for token t of sequence b.
            targets: [N] int64, the token that follows each.

        Returns:
            Its natural log-probability [N] fp32, and whether no other is likelier [N] bool.
        """
        with self._whole():
            own, best = self._scores(tokens, places, targets)
        self.after()
        return own, best > 0

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        # a training step compiled the blocks for its own shapes; nobody waits for more of that
        eager: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if "torch._dynamo" in sys.modules:
            eager = torch.compiler.set_stance("force_eager")
        with eager, whole_sequences(self.model):
            yield

    def _logits(self, tokens: Tensor, last: Tensor | None, cache: KVCache | None) -> Tensor:
        return self._project(self.model(tokens, cache=cache), self.model, last)

    def _scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        return self._judge(self.model(tokens), self.model, places, targets)

    def _project(self, hidden: Tensor, model: GPT, last: Tensor | None) -> Tensor:
        """Logits [B, V] of hidden states [B, T/n, D], each at its `last`, or of [1, B/n, D]."""
        rows = hidden.shape[1] * self.tensor.size
        if last is not None:
            rows = len(last)
            whole = gather_sequence(hidden, self.tensor)
            hidden = self._part(whole[torch.arange(rows, device=last.device), last])
        logits = model.logits(hidden)[0, :rows].float()  # [B, V / n]
        if self.tensor.group is not None:
            parts = all_gather(logits, self.tensor.size, self.tensor.name)
            logits = parts.transpose(0, 1).flatten(1)
        return logits

    def _judge(self, hidden: Tensor, model: GPT, places: Tensor, targets: Tensor) -> Tensor:
        """[2, N] fp32, as `scores` returns it, of hidden states [B, T/n, D]."""
        whole = gather_sequence(hidden, self.tensor).flatten(0, 1)
        vocabulary = model.config.vocabulary
        assert vocabulary is not None
        rows = max(1, LOGITS // (4 * vocabulary)) * self.multiple
        judged = []
        for at, wanted in zip(places.split(rows), targets.split(rows), strict=True):
            logits = model.logits(self._part(whole[at]))[0, : len(at)].float()  # [N, V / n]
            local = wanted - self.tensor.rank * logits.shape[1]
            here = (local >= 0) & (local < logits.shape[1])
            own = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
            part = torch.stack([logits.logsumexp(1), own.masked_fill(~here, 0), logits.amax(1)])
            if self.tensor.group is not None:
                parts = all_gather(part, self.tensor.size, self.tensor.name)  # [n, 3, N]
                lses, owns, peaks = parts.unbind(1)
                part = torch.stack([lses.logsumexp(0), owns.sum(0), peaks.amax(0)])
            lse, own, peak = part
            judged.append(torch.stack([own - lse, (own >= peak).float()]))
        return torch.cat(judged, 1)

    def _part(self, rows: Tensor) -> Tensor:
        """This rank's part of hidden states [N, D], padded: [1, N/n, D]."""
        padded = F.pad(rows, (0, 0, 0, -len(rows) % self.multiple)).unsqueeze(0)
        return slice_sequence(padded, self.tensor)


@torch.no_grad()
def cast_weights(model: GPT) -> None:
    """Keep the matrices in the dtype they are used in, for a model that is not trained any more.

    The same numbers come out: every use casts them anyway, and reads twice the memory for it.
    """
    for name, module in model.named_modules():
        if "norm" not in name.rpartition(".")[2]:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(model.embedding.dtype)
