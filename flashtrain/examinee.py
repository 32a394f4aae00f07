"""A model that rank 0 alone asks questions, and that all ranks which hold a part of it answer.

Who asks (perplexity of a text, lm-eval) reads data and draws examples on one rank and may fail
there. What the model is to compute for it is told to the others first, so ranks cannot part.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flashtrain.checkpoint import Peers
from flashtrain.data.tokenizer import Tokenizer
from flashtrain.data.unfinished import cut, stops_at
from flashtrain.engine.decoder import Decoder
from flashtrain.model.generate import complete
from flashtrain.model.sampling import Sampling
from flashtrain.scoring import Request, Score, Scorer

T = TypeVar("T")


class Examinee:
    """Rank 0 calls `score` and `answer` inside of `examine`."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        max_length: int,
        batch_size: int = 8,
        peers: Peers | None = None,
        moved: Callable[[], object] = lambda: None,
    ) -> None:
        """max_length: tokens the model was trained on. peers: all ranks that hold the model.
        moved: called before every batch, on every rank."""
        self.decoder, self.tokenizer, self.max_length = decoder, tokenizer, max_length
        self.batch_size, self.peers, self.moved = batch_size, peers or Peers(), moved
        self.scorer = Scorer(decoder, max_length, batch_size, moved)

    def examine(self, ask: Callable[[], T]) -> T | None:
        """What `ask()` returns or raises, on rank 0; None on the others. Collective."""
        if self.peers.rank == 0:
            try:
                return ask()
            finally:
                self.peers.broadcast(None)
        while (call := self.peers.broadcast(None)) is not None:
            with contextlib.suppress(ValueError):  # rank 0 raises it too
                self._compute(*call)
        return None

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """See `Scorer.score`."""
        return self._together("score", requests)  # type: ignore[no-any-return]

    def answer(
        self, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, stop: Sequence[str]
    ) -> list[str]:
        """What the model says after each prompt: at most so many tokens, to the end of the text or
        the first of the strings `stop`, which is left out."""
        return self._together(  # type: ignore[no-any-return]
            "answer", prompts, tokens, temperature, stop
        )

    def _together(self, *call: Any) -> Any:
        self.peers.broadcast(call)
        return self._compute(*call)

    def _compute(self, name: str, *arguments: Any) -> Any:
        return (self._answer if name == "answer" else self.scorer.score)(*arguments)

    def _answer(
        self, prompts: list[list[int]], tokens: int, temperature: float, stop: list[str]
    ) -> list[str]:
        end = self.tokenizer.end_of_text
        texts: list[str] = []
        for first in range(0, len(prompts), self.batch_size):
            self.moved()
            drawn = complete(
                self.decoder,
                prompts[first : first + self.batch_size],
                tokens,
                max_length=self.max_length,
                sampling=Sampling(temperature=temperature),
                n_ids=self.tokenizer.size,
                end=end,
                stop=stops_at(self.tokenizer, stop),
            )
            whole = (ids[:-1] if ids and ids[-1] == end else ids for ids in drawn)
            texts += [cut(self.tokenizer.decode(ids), stop) for ids in whole]
        return texts
