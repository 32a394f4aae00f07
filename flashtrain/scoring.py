"""How likely a model finds a text: log-probabilities of given tokens, perplexity.

Dims: B rows, T tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flashtrain.data.tokenizer import Tokenizer
from flashtrain.engine.decoder import Decoder

Request = tuple[Sequence[int], Sequence[int]]  # context, continuation


@dataclass(frozen=True)
class Score:
    log_probability: float  # natural, of all tokens together
    greedy: bool  # each token is the likeliest at its place


@dataclass(frozen=True)
class Perplexity:
    """Of one text. Bits per byte compare models with different tokenizers."""

    tokens: int
    bytes: int
    loss: float  # nats per token

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)


class Scores(Protocol):
    """Who scores: a Scorer, or an Examinee (examinee.py)."""

    max_length: int

    def score(self, requests: Sequence[Request]) -> list[Score]: ...


class Scorer:
    """See `Scores`. Collective over the ranks that share the model, and alike on all of them."""

    def __init__(
        self,
        decoder: Decoder,
        max_length: int,
        batch_size: int = 8,
        moved: Callable[[], object] = lambda: None,
    ) -> None:
        """max_length: tokens the model may see at a time, the length it was trained on. moved:
        called before every batch."""
        self.decoder, self.max_length = decoder, max_length
        self.batch_size, self.moved = batch_size, moved

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """For each request the continuation's score after the context.

        A context that does not fit loses its beginning. Raises ValueError for a context or
        continuation without tokens, and for a continuation above max_length.
        """
        rows = []
        for context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"a context of {len(context)} tokens and a continuation of "
                    f"{len(continuation)}: both need at least one, and a continuation at most "
                    f"{self.max_length}, the length that the model was trained on"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            rows.append((ids, len(continuation)))
        # rows of about one length go together, the longest first: memory runs out at once or never
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
        scores: dict[int, Score] = {}
        for first in range(0, len(order), self.batch_size):
            self.moved()
            batch = order[first : first + self.batch_size]
            scores |= zip(batch, self._batch([rows[row] for row in batch]), strict=True)
        return [scores[row] for row in range(len(rows))]

    def _batch(self, rows: list[tuple[list[int], int]]) -> list[Score]:
        """rows: tokens, and how many of the last ones count."""
        multiple, device = self.decoder.multiple, self.decoder.device
        length = -(-max(len(ids) - 1 for ids, _ in rows) // multiple) * multiple
        # what stands after a row's end is not seen by what stands before it
        tokens = [ids[:-1] + [0] * (length + 1 - len(ids)) for ids, _ in rows]
        places = [
            place
            for row, (ids, n) in enumerate(rows)
            for place in range(row * length + len(ids) - 1 - n, row * length + len(ids) - 1)
        ]
        targets = [token for ids, n in rows for token in ids[-n:]]
        own, best = self.decoder.scores(
            *(torch.tensor(numbers, device=device) for numbers in (tokens, places, targets))
        )
        counts = [n for _, n in rows]
        return [
            Score(float(sums), bool(greedy))
            for sums, greedy in zip(
                [part.sum() for part in own.double().cpu().split(counts)],
                [part.all() for part in best.cpu().split(counts)],
                strict=True,
            )
        ]


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[Request]:
    """(context, continuation) pairs that score every id but the first, each exactly once.

    Pairs advance by `stride` ids; each sees as many of the `length` before its end as there are,
    so that at least length - stride stand before any id but the first ones. Raises ValueError for a
    stride above the length.
    """
    if not 1 <= stride <= length:
        raise ValueError(
            f"a stride of {stride} must lie between 1 and {length}, the length that the model was "
            "trained on"
        )
    done = 1
    while done < len(ids):
        end = min(done + (length if done == 1 else stride), len(ids))
        yield ids[max(0, end - length - 1) : done], ids[done:end]
        done = end


def perplexity(scorer: Scores, tokenizer: Tokenizer, text: str, stride: int) -> Perplexity:
    """Of a whole text that begins after an end-of-text token; see `windows` for the stride."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    if len(ids) < 2:
        raise ValueError("the text has no tokens")
    scores = scorer.score(list(windows(ids, scorer.max_length, stride)))
    total = sum(score.log_probability for score in scores)
    return Perplexity(len(ids) - 1, len(text.encode()), -total / (len(ids) - 1))
