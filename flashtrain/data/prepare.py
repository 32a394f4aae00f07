"""Documents to token shards: read, hold a share out, train or load the tokenizer, encode, write.

The output depends on the input and the options only: not on the number of workers, nor on how
often it was interrupted.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data import corpus
from flashtrain.data.documents import LONGEST, Document
from flashtrain.data.encode import Split, batches, encode_all
from flashtrain.data.folders import new_folder, occupied, work_folder
from flashtrain.data.inputs import Input, open_input
from flashtrain.data.journal import Journal, Progressed, Seen
from flashtrain.data.manifest import Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.published import find_tokenizer
from flashtrain.data.split import TRAIN, VALIDATION, part_size, split_document
from flashtrain.data.tokenizer import (
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from flashtrain.data.writer import DEFAULT_SHARD_TOKENS, SplitWriter, dtype_for, write_manifest

BPE_SAMPLE = 1 << 29  # characters BPE is trained on: the first 0.5 G of the train split
SAVE_SECONDS = 10.0  # between two notes of what an interruption need not do again


@dataclass(frozen=True)
class Recipe:
    """What decides the shards, besides the text."""

    tokenizer: str = "bpe"  # "bpe", "bytes", or what `published.find_tokenizer` takes
    vocabulary: int = 4096  # of a BPE trained here
    field: str = "text"
    validation_share: float = 0.05
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    deduplicate: bool = False  # leave out documents whose text came before, by its hash
    longest: int = LONGEST  # bytes of a document

    def check(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise DataError(
                f"validation share {self.validation_share} must be at least 0 and below 1"
            )
        if self.shard_tokens < 1:
            raise DataError(f"{self.shard_tokens} tokens in a shard must be at least 1")
        if self.longest < 1:
            raise DataError(f"a longest document of {self.longest} bytes must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; a BPE's vocabulary only, a path's last part only, and of the younger
        options those that differ from what was always done."""
        own = self.tokenizer in ("bpe", "bytes")
        tree: dict[str, Any] = {
            "tokenizer": self.tokenizer if own else Path(self.tokenizer).name,
            "vocabulary": self.vocabulary if self.tokenizer == "bpe" else None,
            "field": self.field,
            "validation_share": self.validation_share,
            "shard_tokens": self.shard_tokens,
        }
        if self.deduplicate:
            tree["deduplicate"] = True
        if self.longest != LONGEST:
            tree["longest"] = self.longest
        return tree


@dataclass(frozen=True)
class Progress:
    stage: str  # "tokenizer" or "tokens"
    documents: int
    tokens: int
    done_bytes: int  # of the input
    all_bytes: int | None


Report = Callable[[Progress], None]


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    source: str | None = None,
    workers: int = 1,
    force: bool = False,
    report: Report | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Manifest:
    """What `inputs.open_input` takes -> a folder of token shards at `output`.

    Interrupted, the same call goes on where the last one was at most `save_seconds` before. Raises
    DataError for input that is missing or unreadable, a split that would be empty, and an `output`
    that is not (unless `force`); then nothing is left at `output` that was not there.
    """
    recipe = recipe or Recipe()
    recipe.check()
    text = open_input(inputs, recipe.field, recipe.longest)
    source = text.source if source is None else source
    job = {"input": text.identity, "source": source, **recipe.to_dict()}
    job["tokenizer"] = recipe.tokenizer  # with its folder
    with work_folder(Path(output), job, force=force) as folder:
        journal = Journal(folder)
        manifest = _write(
            text, folder, recipe, source, workers, report or _silent, journal, save_seconds
        )
        journal.remove()
        write_manifest(folder, manifest)
    return manifest


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
        size = ends[-1]
        text = Input(lambda start: iter(documents), corpus.SOURCE, size, part_size(size))
        try:
            with new_folder(target) as work:
                done = _write(text, work, recipe, corpus.SOURCE, 1, report or _silent)
                write_manifest(work, done)
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
    text: Input,
    folder: Path,
    recipe: Recipe,
    source: str,
    workers: int,
    report: Report,
    journal: Journal | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Manifest:
    """Tokenizer and shards in `folder`; the manifest that has to go there too."""
    split = partial(split_document, share=recipe.validation_share, part=text.part)
    tokenizer = _tokenizer(text, folder, recipe, split, report)
    writers = {
        name: SplitWriter(folder, name, tokenizer.size, recipe.shard_tokens)
        for name in (TRAIN, VALIDATION)
    }
    seen = Seen() if recipe.deduplicate else None
    done = journal.restore(writers, seen) if journal else Progressed(bad=Counter())
    assert done.bad is not None
    report(Progress("tokens", done.documents, done.tokens, 0, text.size))  # rates count from here
    saved = time.monotonic()
    groups = batches(text.read(done.after), seen)
    for batch, result in encode_all(groups, tokenizer, folder, split, workers):
        for name, (ids, pieces, text_bytes) in result.items():
            writers[name].append(ids, pieces, text_bytes)
            done.tokens += len(ids)
        done.bad.update(batch.bad)
        done.documents += len(batch.texts)
        done.after, done.seen = batch.after, batch.seen
        if journal and time.monotonic() - saved >= save_seconds:
            journal.save(done, writers, seen)
            saved = time.monotonic()
        report(Progress("tokens", done.documents, done.tokens, batch.read_bytes, text.size))
    manifest = Manifest(
        dtype=dtype_for(tokenizer.size),
        vocabulary=tokenizer.size,
        end_of_text=tokenizer.end_of_text,
        tokenizer=tokenizer.fingerprint,
        source=source,
        recipe=recipe.to_dict(),
        bad_documents={reason.value: n for reason, n in sorted(done.bad.items(), key=str)},
        splits={name: writer.close() for name, writer in writers.items()},
    )
    _check_splits(manifest, done.documents, recipe.validation_share)
    return manifest


def _check_splits(manifest: Manifest, documents: int, share: float) -> None:
    if documents == 0:
        bad = manifest.bad_documents.items()
        left_out = ", ".join(f"{count:,} documents, {reason}" for reason, count in bad)
        raise DataError(
            f"{manifest.source} holds no usable document; left out: {left_out or 'none'}"
        )
    empty = [name for name, split in manifest.splits.items() if not split.tokens]
    if TRAIN in empty or (VALIDATION in empty and share > 0):
        raise DataError(
            f"all {documents} documents fell on one side, so the {empty[0]} split is empty: the "
            "split is by whole documents, and a .txt or .md file is one of them; give more or "
            "change --validation-share (0 holds nothing out)"
        )


def _tokenizer(
    text: Input, folder: Path, recipe: Recipe, split: Split, report: Report
) -> Tokenizer:
    """The one of an interrupted preparation in `folder`, else made or found, and saved there."""
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder)
    if recipe.tokenizer == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif recipe.tokenizer == "bpe":
        pieces = train_texts(text, split, recipe, report)
        tokenizer = train_bpe(pieces, recipe.vocabulary)
    else:
        tokenizer = find_tokenizer(recipe.tokenizer)
    partial_file = folder / (TOKENIZER_FILE + ".partial")
    tokenizer.save(partial_file)
    partial_file.rename(folder / TOKENIZER_FILE)
    return tokenizer


def train_texts(
    text: Input, split: Split, recipe: Recipe, report: Report, sample: int = BPE_SAMPLE
) -> Iterator[str]:
    """The first `sample` characters, or a little more, of what is not held out."""
    seen = documents = 0
    for batch in batches(text.read((0, 0)), Seen() if recipe.deduplicate else None):
        for side, piece in (cut for content in batch.texts for cut in split(content)):
            if side == TRAIN:  # held-out text teaches the tokenizer nothing either
                seen += len(piece)
                yield piece
        documents += len(batch.texts)
        report(Progress("tokenizer", documents, 0, batch.read_bytes, text.size))
        if seen > sample:
            return
