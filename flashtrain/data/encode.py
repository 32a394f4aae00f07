"""Documents to token ids, in this process or in several, always in the same order."""

import multiprocessing
import os
import threading
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

from flashtrain.data.documents import Bad, Document, Place
from flashtrain.data.journal import Seen
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
    after: Place
    seen: int  # hashes known when it was complete


def batches(documents: Iterator[Document], seen: Seen | None = None) -> Iterator[TextBatch]:
    """Documents in groups of about BATCH characters, bad ones counted, repeated ones too.

    seen: the documents before these, added to; None keeps duplicates.
    """
    texts: list[str] = []
    bad: Counter[Bad] = Counter()
    size, document = 0, Document(Bad.empty, 0)

    def group() -> TextBatch:
        known = 0 if seen is None else seen.count
        return TextBatch(texts, bad, document.read_bytes, document.after, known)

    for document in documents:
        content = document.content
        if isinstance(content, str) and seen is not None and not seen.add(content):
            content = Bad.duplicate
        if isinstance(content, str):
            texts.append(content)
            size += len(content)
        else:
            bad[content] += 1
        if size >= BATCH:
            yield group()
            texts, bad, size = [], Counter(), 0
    if texts or bad:
        yield group()


def encode(tokenizer: Tokenizer, split: Split, texts: list[str]) -> Encoded:
    """Ids of the pieces of `texts` by split, each piece ended by the end-of-text token."""
    pieces = [piece for text in texts for piece in split(text)]
    encoded = tokenizer.encode_batch([text for _, text in pieces])
    end = np.array([tokenizer.end_of_text], np.uint32)
    result: Encoded = {}
    for name in (TRAIN, VALIDATION):
        own = [n for n, (side, _) in enumerate(pieces) if side == name]
        ids = [part for n in own for part in (encoded[n], end)]
        text_bytes = sum(len(pieces[n][1].encode("utf-8")) for n in own)
        result[name] = np.concatenate([end[:0], *ids]), len(own), text_bytes
    return result


_encode_here: Callable[[list[str]], Encoded]  # in a worker process: set by _start_worker


def _start_worker(folder: Path, split: Split) -> None:
    global _encode_here  # a worker's initialiser has no other way to keep what it loads
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # the other workers have the other cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode_here = partial(encode, load_tokenizer(folder), split)


def _leave_with_parent() -> None:
    """A parent that is killed tells nobody, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode_here(texts)


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
