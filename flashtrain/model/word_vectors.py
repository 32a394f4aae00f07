"""Token embeddings that start from word2vec or GloVe vectors instead of noise.

Formats: GloVe text (`word v1 .. vd` a line), word2vec text (the same under a line `n d`) and
word2vec binary (that line, then word, space, d little-endian fp32), each also as `.gz`. A file
opening with two whole numbers is word2vec; it is binary when its first entry is not printable.

A token takes the vector of its own text without one leading space (byte-pair tokens carry the
space before a word), else that of its lower-case text: files of lower-case words then serve "The"
too. Tokens of spaces only, or pieces of words that the file does not list, keep their random start.
"""

import gzip
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from flashtrain.config import ConfigError
from flashtrain.model.shard import Box

LONGEST = 1 << 20  # bytes of a line or word; beyond, the file is something else
Floats = np.ndarray[tuple[int], np.dtype[np.float32]]


class WordVectors(NamedTuple):
    values: Tensor  # [n, d_model] fp32, as in the file
    ids: Tensor  # [n] int64, ascending: the tokens they belong to
    matched_share: float  # n / tokens of the vocabulary


def load_word_vectors(path: str | Path, vocabulary: Mapping[str, int], d_model: int) -> WordVectors:
    """Vectors for those tokens (text -> id) that `path` lists.

    Raises ConfigError when the file is absent, malformed (naming the line or word), of another size
    than `d_model`, or matches no token at all.
    """
    exact: dict[bytes, list[int]] = {}
    lower: dict[bytes, list[int]] = {}
    for text, token in vocabulary.items():
        own = text.removeprefix(" ")
        if own and not own.isspace():
            exact.setdefault(own.encode(), []).append(token)
            if own != own.lower():
                lower.setdefault(own.lower().encode(), []).append(token)
    found: dict[int, Floats] = {}
    by_lower: dict[int, Floats] = {}
    for word, row in _read(Path(path), exact.keys() | lower.keys(), d_model):
        for token in exact.get(word, ()):
            found.setdefault(token, row)  # a word listed twice: the first counts
        for token in lower.get(word, ()):
            by_lower.setdefault(token, row)
    found = by_lower | found
    if not found:
        raise ConfigError(
            f"model.word_vectors={path}: none of its words is among the {len(vocabulary)} tokens; "
            "leave model.word_vectors out or use a vocabulary of the same language"
        )
    ids = sorted(found)
    values = torch.from_numpy(np.stack([found[token] for token in ids]))
    return WordVectors(values, torch.tensor(ids), len(ids) / len(vocabulary))


@torch.no_grad()
def start_from_word_vectors(
    memory: Tensor, parts: Iterable[Box], vectors: WordVectors, init_std: float
) -> None:
    """Overwrite those rows of `embedding.weight` as far as this rank holds them.

    memory: what it holds; parts: which boxes of the whole table that is.

    All vectors are multiplied by one factor that gives them root mean square `init_std`: they start
    as large as the random rows around them, and keep their directions and relative lengths. The
    factor comes from the whole file, so it is the same on every rank.
    """
    values = vectors.values * (init_std / vectors.values.double().square().mean().sqrt().float())
    for box in parts:
        (first, left), (count, width) = box.start, box.shape
        here = (vectors.ids >= first) & (vectors.ids < first + count)
        rows = vectors.ids[here] - first
        box.view(memory)[rows.to(memory.device)] = values[here, left : left + width].to(
            memory.device, memory.dtype
        )


def _read(path: Path, wanted: set[bytes], d_model: int) -> Iterator[tuple[bytes, Floats]]:
    """The wanted (word, vector) entries of the file, in its order."""
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.readline(LONGEST)
            fields = head.split()
            counted = len(fields) == 2 and all(field.isdigit() for field in fields)
            size = int(fields[1]) if counted else len(fields) - 1
            if not counted and (size < 1 or not _printable(head)):
                raise ConfigError(
                    f"model.word_vectors={path}: line 1 is neither `word v1 v2 ..` nor `n d`, so "
                    "this is no GloVe or word2vec file"
                )
            if size != d_model:
                raise ConfigError(
                    f"model.word_vectors={path} holds vectors of size {size}, but model.d_model="
                    f"{d_model}: choose a file of that size or set model.d_model={size}"
                )
            count = int(fields[0]) if counted else None
            first = file.readline(LONGEST) if counted else head
            if counted and not _printable(first):
                yield from _binary(path, file, first, int(fields[0]), size, wanted)
            else:
                yield from _text(path, file, first, count, size, wanted)
    except (OSError, EOFError) as error:
        raise ConfigError(f"model.word_vectors={path} cannot be read: {error}") from error


def _text(
    path: Path, file: BinaryIO, line: bytes, count: int | None, size: int, wanted: set[bytes]
) -> Iterator[tuple[bytes, Floats]]:
    number = offset = 1 if count is None else 2  # of the line
    while line:
        word, *numbers = line.rstrip().rsplit(b" ", size)  # GloVe 840B lists words with spaces
        if len(numbers) != size:
            raise ConfigError(
                f"model.word_vectors={path}: line {number} has {len(numbers)} numbers after its "
                f"word instead of {size}: mend or remove the line"
            )
        if word in wanted:
            try:
                row = np.array(numbers, dtype=np.float32)
            except ValueError as error:
                raise ConfigError(f"model.word_vectors={path}: line {number}: {error}") from error
            yield word, _finite(row, path, f"line {number}")
        number, line = number + 1, file.readline(LONGEST)
    if count is not None and number - offset != count:
        raise ConfigError(
            f"model.word_vectors={path}: line 1 promises {count} words, the file holds "
            f"{number - offset}: fetch it again"
        )


def _binary(
    path: Path, file: BinaryIO, rest: bytes, count: int, size: int, wanted: set[bytes]
) -> Iterator[tuple[bytes, Floats]]:
    """`rest`: what was read past the header already."""
    at, length = 0, 4 * size  # of the entry in `rest`, of its vector
    for number in range(1, count + 1):
        while (end := rest.find(b" ", at) + 1) == 0 or len(rest) < end + length:
            more = file.read(LONGEST)
            if not more:
                raise ConfigError(
                    f"model.word_vectors={path} ends inside word {number} of the {count} that its "
                    "first line promises: fetch it again"
                )
            rest, at = rest[at:] + more, 0
        word = rest[at : end - 1].lstrip(b"\n")  # some writers end each vector with a newline
        if word in wanted:
            row = np.frombuffer(rest, "<f4", size, end).astype(np.float32)
            yield word, _finite(row, path, f"word {number}")
        at = end + length


def _printable(line: bytes) -> bool:
    try:
        return line.decode().rstrip().replace("\t", " ").isprintable()
    except UnicodeDecodeError:
        return False


def _finite(row: Floats, path: Path, where: str) -> Floats:
    if not np.isfinite(row).all():
        raise ConfigError(f"model.word_vectors={path}: {where} holds a number that is not finite")
    return row
