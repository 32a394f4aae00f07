"""Documents to token shards: read, hold a share out, train or load the tokenizer, encode, write.

The output depends on the input and the options only, not on the number of workers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data import corpus
from flashtrain.data.documents import Bad, Document, find_files, read_documents
from flashtrain.data.encode import Split, batches, encode_all
from flashtrain.data.shards import DataError, Manifest
from flashtrain.data.split import TRAIN, VALIDATION, part_size, split_document
from flashtrain.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from flashtrain.data.writer import (
    DEFAULT_SHARD_TOKENS,
    SplitWriter,
    dtype_for,
    new_folder,
    occupied,
    write_manifest,
)

BPE_SAMPLE = 1 << 29  # characters BPE is trained on: the first 0.5 G of the train split


@dataclass(frozen=True)
class Recipe:
    """What decides the shards, besides the text."""

    tokenizer: str = "bpe"  # "bpe", "bytes" or the path of a tokenizer
    vocabulary: int = 4096  # of a BPE trained here
    field: str = "text"
    validation_share: float = 0.05
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def check(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise DataError(
                f"validation share {self.validation_share} must be at least 0 and below 1"
            )
        if self.shard_tokens < 1:
            raise DataError(f"{self.shard_tokens} tokens in a shard must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; a BPE's vocabulary only, and a path's last part only."""
        own = self.tokenizer in ("bpe", "bytes")
        return {
            "tokenizer": self.tokenizer if own else Path(self.tokenizer).name,
            "vocabulary": self.vocabulary if self.tokenizer == "bpe" else None,
            "field": self.field,
            "validation_share": self.validation_share,
            "shard_tokens": self.shard_tokens,
        }


@dataclass(frozen=True)
class Progress:
    stage: str  # "tokenizer" or "tokens"
    documents: int
    tokens: int
    done_bytes: int  # of the input
    all_bytes: int


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Input:
    """Documents that can be gone through again: once for the tokenizer, once for the tokens."""

    read: Callable[[], Iterator[Document]]
    size: int  # bytes
    source: str


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    source: str | None = None,
    workers: int = 1,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Files or folders of text, JSON lines and Parquet -> a folder of token shards at `output`.

    Raises DataError for input that is missing or unreadable, a split that would be empty, and an
    `output` that is not (unless `force`); then nothing is left at `output` that was not there.
    """
    recipe = recipe or Recipe()
    files = find_files(inputs)
    sizes = [file.stat().st_size for file in files]
    if source is None:
        names = ", ".join(file.name for file in files[:3])
        source = names if len(files) <= 3 else f"{names} and {len(files) - 3} more files"

    def read() -> Iterator[Document]:
        before = 0
        for file, size in zip(files, sizes, strict=True):
            for document in read_documents(file, recipe.field):
                yield Document(document.content, before + document.read_bytes)
            before += size

    text = Input(read, sum(sizes), source)
    return _write(text, Path(output), recipe, workers, force, report or _silent)


def prepare_shakespeare(
    folder: str | Path, tokenizer: str, vocabulary: int, report: Report | None = None
) -> None:
    """The embedded text as token shards at `folder`; returns at once if they are there.

    `tokenizer` is "bpe" or "bytes". Several processes may call this at the same time: each works
    in a folder of its own, the first to finish renames it to `folder` and the others keep that.
    Raises DataError if `folder` holds shards of another tokenizer, or without the text.
    """
    if tokenizer not in ("bpe", "bytes"):
        raise DataError(f"tokenizer {tokenizer!r} for the embedded text is neither bpe nor bytes")
    target, recipe = Path(folder), Recipe(tokenizer=tokenizer, vocabulary=vocabulary)
    if not occupied(target):
        texts = [text for _, text in corpus.documents()]
        ends = np.cumsum([len(text.encode()) for text in texts]).tolist()
        documents = [Document(text, end) for text, end in zip(texts, ends, strict=True)]
        text = Input(lambda: iter(documents), ends[-1], corpus.SOURCE)
        try:
            _write(text, target, recipe, 1, False, report or _silent)
        except DataError:
            if not occupied(target):  # otherwise another process was first
                raise
    found = Manifest.load(target).recipe
    if found != recipe.to_dict():
        raise DataError(
            f"{target} was prepared with {_spoken(found)} and this run asks for "
            f"{_spoken(recipe.to_dict())}: name another folder or remove that one"
        )


def _spoken(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in recipe.items() if value is not None)


def _silent(progress: Progress) -> None:
    pass


def _write(
    text: Input, output: Path, recipe: Recipe, workers: int, force: bool, report: Report
) -> Manifest:
    recipe.check()
    with new_folder(output, force=force) as folder:
        split = partial(split_document, share=recipe.validation_share, part=part_size(text.size))
        tokenizer = _tokenizer(text, recipe, split, report)
        tokenizer.save(folder)
        writers = {
            name: SplitWriter(folder, name, tokenizer.size, recipe.shard_tokens)
            for name in (TRAIN, VALIDATION)
        }
        bad: Counter[Bad] = Counter()
        documents = tokens = 0
        encoded = encode_all(batches(text.read()), tokenizer, folder, split, workers)
        for batch, result in encoded:
            for name, (ids, pieces, text_bytes) in result.items():
                writers[name].append(ids, pieces, text_bytes)
                tokens += len(ids)
            bad.update(batch.bad)
            documents += len(batch.texts)
            report(Progress("tokens", documents, tokens, batch.read_bytes, text.size))
        manifest = Manifest(
            dtype=dtype_for(tokenizer.size),
            vocabulary=tokenizer.size,
            end_of_text=tokenizer.end_of_text,
            tokenizer=tokenizer.fingerprint,
            source=text.source,
            recipe=recipe.to_dict(),
            bad_documents={reason.value: n for reason, n in sorted(bad.items(), key=str)},
            splits={name: writer.close() for name, writer in writers.items()},
        )
        _check_splits(manifest, documents, recipe.validation_share)
        write_manifest(folder, manifest)
    return manifest


def _check_splits(manifest: Manifest, documents: int, share: float) -> None:
    if documents == 0:
        raise DataError(
            f"{manifest.source} holds no usable document; left out: {manifest.bad_documents}"
        )
    empty = [name for name, split in manifest.splits.items() if not split.tokens]
    if TRAIN in empty or (VALIDATION in empty and share > 0):
        raise DataError(
            f"all of the {documents} documents fell on one side, so the {empty[0]} split is empty; "
            "give more text or change the validation share (0 holds nothing out)"
        )


def _tokenizer(
    text: Input,
    recipe: Recipe,
    split: Split,
    report: Report,
) -> Tokenizer:
    if recipe.tokenizer == "bytes":
        return ByteTokenizer()
    if recipe.tokenizer != "bpe":
        return load_tokenizer(recipe.tokenizer)

    def train_texts() -> Iterator[str]:
        seen = documents = 0
        for batch in batches(text.read()):
            for side, piece in (cut for content in batch.texts for cut in split(content)):
                if side == TRAIN:  # held-out text teaches the tokenizer nothing either
                    seen += len(piece)
                    yield piece
            documents += len(batch.texts)
            report(Progress("tokenizer", documents, 0, batch.read_bytes, text.size))
            if seen > BPE_SAMPLE:
                return

    return train_bpe(train_texts(), recipe.vocabulary)
