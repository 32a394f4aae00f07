"""Documents to token ids, in this process or in several, always in the same order."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashtrain.data.documents import Bad, Document
from flashtrain.data.split import TRAIN, VALIDATION
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 20  # characters of text a worker takes at a time

Split = Callable[[str], Iterator[tuple[str, str]]]  # text -> (split, piece) in order
Encoded = dict[str, tuple[NDArray[Any], int, int]]  # split -> ids, pieces, text bytes


@dataclass(frozen=True)
class TextBatch:
    texts: list[str]
    bad: Counter[Bad]
    read_bytes: int


def batches(documents: Iterator[Document]) -> Iterator[TextBatch]:
    """Documents in groups of about BATCH characters, bad ones counted."""
    texts: list[str] = []
    bad: Counter[Bad] = Counter()
    size = read_bytes = 0
    for document in documents:
        read_bytes = document.read_bytes
        content = document.content
        if isinstance(content, str):
            texts.append(content)
            size += len(content)
        else:
            bad[content] += 1
        if size >= BATCH:
            yield TextBatch(texts, bad, read_bytes)
            texts, bad, size = [], Counter(), 0
    yield TextBatch(texts, bad, read_bytes)


def encode(tokenizer: Tokenizer, split: Split, texts: list[str]) -> Encoded:
    """Ids of the pieces of `texts` by split, each piece ended by the end-of-text token."""
    pieces = [piece for text in texts for piece in split(text)]
    encoded = tokenizer.encode_batch([text for _, text in pieces])
    result: Encoded = {}
    for name in (TRAIN, VALIDATION):
        ids: list[int] = []
        count = text_bytes = 0
        for (side, text), found in zip(pieces, encoded, strict=True):
            if side == name:
                ids += found
                ids.append(tokenizer.end_of_text)
                count += 1
                text_bytes += len(text.encode("utf-8"))
        result[name] = np.array(ids, np.uint32), count, text_bytes
    return result


_encode_here: Callable[[list[str]], Encoded]  # in a worker process: set by _start_worker


def _start_worker(folder: Path, split: Split) -> None:
    global _encode_here  # a worker's initialiser has no other way to keep what it loads
    _encode_here = partial(encode, load_tokenizer(folder), split)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode_here(texts)


def encode_all(
    batches: Iterator[TextBatch],
    tokenizer: Tokenizer,
    folder: Path,
    split: Split,
    workers: int,
) -> Iterator[tuple[TextBatch, Encoded]]:
    """Every batch with its ids, in order; `workers` processes above 1, this one alone at 1."""
    if workers <= 1:
        for batch in batches:
            yield batch, encode(tokenizer, split, batch.texts)
        return
    # forkserver: a fork of this process would inherit the tokenizer's threads half-way
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, _start_worker, (folder, split)) as pool:
        waiting: deque[tuple[TextBatch, Future[Encoded]]] = deque()
        try:
            while True:
                # a few batches ahead of the writer, not the whole input in memory
                for batch in islice(batches, 2 * workers - len(waiting)):
                    waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
                if not waiting:
                    return
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
