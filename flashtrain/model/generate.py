"""Text from a model: prompts go through it once, then one token of each at a time over a cache.

Dims: B prompts, V vocabulary. A sequence that outgrows what the model was trained on forgets its
older half: what is left goes through the model again, with positions from 0, whatever their kind.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashtrain.model.cache import KVCache
from flashtrain.model.sampling import Sampling, draw, uniform_numbers


class NextToken(Protocol):
    """A model to draw from: flashtrain/engine/decoder.py."""

    multiple: int  # the batch and the tokens of a prompt are padded to it

    @property
    def device(self) -> torch.device: ...

    def empty_cache(self, batch: int, room: int) -> KVCache: ...

    def logits(
        self, tokens: Tensor, last: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor: ...


def generate(
    model: NextToken,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    max_length: int,
    sampling: Sampling | None = None,
    n_ids: int | None = None,
    end: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    graph: bool = False,
) -> Iterator[list[int | None]]:
    """At most `n_tokens` times: the next id of every prompt, None for those that have ended.

    Args:
        max_length: tokens a sequence may have before it forgets its older half; the length that
            the model was trained on. A multiple of the model's `multiple`.
        n_ids: only ids below it are drawn, for a vocabulary that was rounded up.
        end: a sequence ends after this id.
        stop: asked with the ids drawn for a prompt so far whether it ends there. Given the same
            ids it must say the same on every rank.
        graph: replay a CUDA graph for each token, captured once; for one process.

    Raises ValueError for an empty prompt or no prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt has no tokens: give at least one to go on from")
    if max_length < 1 or max_length % model.multiple:
        raise ValueError(
            f"max_length={max_length} must be at least 1 and a multiple of {model.multiple}, the "
            "ranks that share the model"
        )
    drawing = _Drawing(model, prompts, n_tokens, max_length, sampling or Sampling(), n_ids, graph)
    open_rows = set(range(len(prompts)))
    drawn: list[list[int]] = [[] for _ in prompts]
    for _ in range(n_tokens):
        ids: list[int | None] = [None] * len(prompts)
        for row, token in enumerate(drawing.next()):
            if row not in open_rows:
                continue
            ids[row] = token
            drawn[row].append(token)
            if token == end or (stop is not None and stop(drawn[row])):
                open_rows.remove(row)
        yield ids
        if not open_rows:
            return


def complete(
    model: NextToken, prompts: Sequence[Sequence[int]], n_tokens: int, **settings: object
) -> list[list[int]]:
    """What `generate` draws for each prompt, as lists; settings as there."""
    drawn: list[list[int]] = [[] for _ in prompts]
    for ids in generate(model, prompts, n_tokens, **settings):  # type: ignore[arg-type]
        for row, token in enumerate(ids):
            if token is not None:
                drawn[row].append(token)
    return drawn


class _Drawing:
    """The state of one call: what lies on the device, and the ids so far on the host."""

    def __init__(
        self,
        model: NextToken,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        max_length: int,
        sampling: Sampling,
        n_ids: int | None,
        graph: bool,
    ) -> None:
        self.model, self.sampling, self.n_ids = model, sampling, n_ids
        self.prompts = len(prompts)
        device, self.batch = model.device, _up(len(prompts), model.multiple)
        self.ids = [list(prompt) for prompt in prompts]
        self.ids += [[0] for _ in range(self.batch - self.prompts)]  # padding
        longest = max(len(prompt) for prompt in prompts) + n_tokens
        self.room = min(max_length, _up(longest, model.multiple))
        self.cache = model.empty_cache(self.batch, self.room)
        uniform = uniform_numbers(sampling.seed, self.batch, max(1, n_tokens))
        self.uniform = uniform.to(device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # tokens drawn so far
        self.tokens = torch.zeros(1, self.batch, dtype=torch.int64, device=device)
        self.host = torch.empty(1, self.batch, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.graph = self._capture() if graph else None
        self.fresh = True

    def next(self) -> list[int]:
        """Draw one token of every prompt."""
        if self.fresh or max(map(len, self.ids)) > self.room:
            self._fill()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.fresh = False
        found: list[int] = self.host.copy_(self.tokens)[0].tolist()
        for row, token in enumerate(found[: self.prompts]):
            self.ids[row].append(token)
        return found[: self.prompts]

    def _fill(self) -> None:
        """Run what each sequence remembers through the model, and draw from its end."""
        kept = [
            ids if len(ids) <= self.room else ids[-(self.room - self.room // 2) :]
            for ids in self.ids
        ]
        self.ids = [list(ids) for ids in kept]
        longest = _up(max(map(len, kept)), self.model.multiple)
        rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids in kept])
        lengths = torch.tensor([len(ids) for ids in kept])
        device = self.tokens.device
        rows, lengths = rows.to(device), lengths.to(device)
        self.cache.filling = True
        self._draw(self.model.logits(rows, lengths - 1, self.cache))
        self.cache.filling = False
        self.cache.lengths.copy_(lengths)

    def _step(self) -> None:
        """Run the tokens drawn last, and draw the next: on the device alone, so it can be
        captured."""
        logits = self.model.logits(self.tokens, cache=self.cache)
        self.cache.lengths.add_(1)
        self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        uniform = self.uniform.index_select(0, self.number)[0]
        self.tokens.copy_(draw(logits[:, : self.n_ids], uniform, self.sampling).unsqueeze(0))
        self.number.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Runs it a few times first, as capturing asks for, on no text."""
        self.cache.filling = False
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
                self._reset()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _reset(self) -> None:
        self.cache.lengths.zero_()
        self.number.zero_()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
