"""How likely a model finds a text: log-probabilities of given tokens, perplexity. One process.

Dims: B rows, T tokens, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrain.data.tokenizer import Tokenizer
from flashtrain.model.gpt import GPT

LOGITS = 2**28  # bytes of fp32 logits that are in memory at a time


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


class Scorer:
    def __init__(self, model: GPT, max_length: int, batch_size: int = 8) -> None:
        """max_length: tokens the model may see at a time, the length it was trained on."""
        self.model, self.max_length, self.batch_size = model, max_length, batch_size

    @torch.no_grad()
    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """For each (context, continuation): the continuation's score after the context.

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
        scores: list[Score | None] = [None] * len(rows)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for row, score in zip(batch, self._batch([rows[row] for row in batch]), strict=True):
                scores[row] = score
        return [score for score in scores if score is not None]

    def _batch(self, rows: list[tuple[list[int], int]]) -> Iterator[Score]:
        device = self.model.embedding.weight.device
        length = max(len(ids) for ids, _ in rows) - 1
        # what stands after a row's end is not seen by what stands before it
        padded = [ids[:-1] + [0] * (length + 1 - len(ids)) for ids, _ in rows]
        hidden: Tensor = self.model(torch.tensor(padded, device=device))  # [B, T, D]
        for own, (ids, n_scored) in zip(hidden, rows, strict=True):
            end = len(ids) - 1
            yield self._row(own[end - n_scored : end], torch.tensor(ids[-n_scored:], device=device))

    def _row(self, hidden: Tensor, targets: Tensor) -> Score:
        """hidden [n, D], targets [n] int64."""
        assert self.model.config.vocabulary is not None
        at_once = max(1, LOGITS // (4 * self.model.config.vocabulary))
        total = torch.zeros((), device=hidden.device, dtype=torch.float64)
        greedy = torch.ones((), device=hidden.device, dtype=torch.bool)
        for part, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = self.model.logits(part[None])[0].float()  # [n, V]
            own = logits.gather(1, wanted[:, None])[:, 0]
            total += (own - logits.logsumexp(1)).double().sum()
            greedy &= (logits.argmax(1) == wanted).all()
        return Score(float(total), bool(greedy))


def windows(
    ids: Sequence[int], length: int, stride: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
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


def perplexity(scorer: Scorer, tokenizer: Tokenizer, text: str, stride: int) -> Perplexity:
    """Of a whole text that begins after an end-of-text token; see `windows` for the stride."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    if len(ids) < 2:
        raise ValueError("the text has no tokens")
    scores = scorer.score(list(windows(ids, scorer.max_length, stride)))
    total = sum(score.log_probability for score in scores)
    return Perplexity(len(ids) - 1, len(text.encode()), -total / (len(ids) - 1))
