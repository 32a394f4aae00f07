"""Token shards: a folder of raw token files and the manifest that says what they hold.

    manifest.json     format, dtype, vocabulary, tokenizer, source, splits; written last
    tokenizer.json    the tokenizer that made them
    train-00000.bin   little-endian uint16 or uint32 ids, nothing else; documents end with the
    ...               end-of-text token and run on over the ends of files
    validation-00000.bin

Opening checks everything that costs no reading: a folder that opens has files of the right sizes
and ids inside the vocabulary. `TokenShards.verify` reads it all and compares checksums.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashtrain.data.ahead import ReadAhead
from flashtrain.data.mapped import DataError as DataError  # the rest of the package imports it here
from flashtrain.data.mapped import Files, MappedTokens, Piece
from flashtrain.data.sampler import splitmix64

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PREPARE = "make it again with `python scripts/prepare_data.py INPUT... --output FOLDER`"
CHUNK = 1 << 24  # tokens that full passes take at a time: 64 MiB at most


class Dataset(Protocol):
    """A line of `tokens` token ids, read anywhere."""

    name: str  # for messages
    tokens: int
    vocabulary: int  # ids are in [0, vocabulary)

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] from `start`, of any unsigned dtype; maybe a read-only view."""

    def advise(self, start: int, length: int) -> None:
        """These will be read at once: where that takes a disk, begin, without waiting."""

    def close(self) -> None:
        """End what is read or fetched ahead, and a read that waits for it."""


class ShardedDataset(Dataset, Protocol):
    """One that lies in several files."""

    @property
    def sections(self) -> list[tuple[int, int]]:
        """First token of each file and the one after its last."""

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Files that are read now and after that; begins to bring them, does not wait."""


@dataclass(frozen=True)
class ShardFile:
    name: str
    tokens: int
    bytes: int
    max_id: int
    xxh3: str  # 64 bits, hex


@dataclass(frozen=True)
class Split:
    tokens: int
    documents: int  # pieces that end with the end-of-text token
    text_bytes: int  # UTF-8 bytes the tokens stand for
    unigram_entropy: float  # nats per token: the loss of a model that knows frequencies only
    files: tuple[ShardFile, ...]


@dataclass(frozen=True)
class Manifest:
    dtype: str
    vocabulary: int  # size of the tokenizer
    end_of_text: int
    tokenizer: str  # its fingerprint
    source: str  # where the text comes from, and its licence
    recipe: dict[str, Any]  # options it was prepared with
    bad_documents: dict[str, int]  # reason -> how many were left out
    splits: dict[str, Split]
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """The checked manifest of `folder`; DataError names what is missing or unknown."""
        if not folder.is_dir():
            raise DataError(f"there is no folder of token shards at {folder}; {PREPARE}")
        file = folder / MANIFEST
        if not file.is_file():
            raise DataError(
                f"{folder} holds no {MANIFEST}, so it is no finished folder of token shards; "
                f"{PREPARE}"
            )
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            version = tree.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error!r}); {PREPARE}") from error
        if version != FORMAT:
            raise DataError(
                f"{file} has format {version!r} and this version of flashtrain reads {FORMAT}; "
                f"{PREPARE}"
            )
        try:
            for name, split in tree["splits"].items():
                files = tuple(ShardFile(**item) for item in split.pop("files"))
                tree["splits"][name] = Split(files=files, **split)
            manifest = Manifest(**tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} lacks or misnames a field ({error}); {PREPARE}") from error
        if manifest.dtype not in DTYPES:
            raise DataError(
                f"{file} has dtype {manifest.dtype!r}, which is not one of {', '.join(DTYPES)}; "
                f"{PREPARE}"
            )
        return manifest


class TokenShards:
    """One split of a folder of token shards as one line of tokens, memory-mapped."""

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        vocabulary: int | None = None,
        bring: Callable[[Sequence[ShardFile]], Files] | None = None,
    ) -> None:
        """vocabulary: the model's, which every id must lie below.

        bring: opens what brings the split's files where `folder` holds the manifest only; their
        sizes are checked as they arrive.
        """
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.name = f"the {split} split of {self.folder}"
        if split not in self.manifest.splits or not self.manifest.splits[split].files:
            held = [name for name, part in self.manifest.splits.items() if part.files]
            raise DataError(
                f"{self.folder} has no {split} tokens (it has: {', '.join(held) or 'none'}); "
                "prepare it with a --validation-share between 0 and 1 that leaves both splits text"
            )
        self.split = self.manifest.splits[split]
        self.vocabulary = self.manifest.vocabulary
        self.end_of_text = self.manifest.end_of_text
        self.fingerprint = self.manifest.tokenizer
        self.text_bytes = self.split.text_bytes
        self.dtype = DTYPES[self.manifest.dtype]
        if vocabulary is not None and self.vocabulary > vocabulary:
            raise DataError(
                f"{self.folder} has a tokenizer of {self.vocabulary} ids and the model's "
                f"vocabulary is {vocabulary}; set model.vocabulary to {self.vocabulary} or more"
            )
        pieces = [Piece(self.folder / f.name, self.dtype, f.tokens) for f in self.split.files]
        for file in self.split.files:
            if bring is None:
                self._check(file)
            self._check_entry(file)
        files = ReadAhead([piece.path for piece in pieces]) if bring is None else None
        self._line = MappedTokens(
            self.name, pieces, bring(self.split.files) if bring is not None else files
        )
        self.tokens = self._line.tokens
        if self.tokens != self.split.tokens:
            raise DataError(
                f"{self.folder / MANIFEST} counts {self.split.tokens:,} tokens in {split} but its "
                f"files hold {self.tokens:,}; {PREPARE}"
            )

    def _check(self, file: ShardFile) -> None:
        path = self.folder / file.name
        if not path.is_file():
            raise DataError(f"{path} is named in {MANIFEST} but is not there; copy it or {PREPARE}")
        size, promised = path.stat().st_size, file.tokens * self.dtype.itemsize
        if file.tokens == 0 or size == 0:
            raise DataError(
                f"{path} is empty ({size} bytes, {file.tokens} tokens in {MANIFEST}); {PREPARE}"
            )
        if size != promised or file.bytes != promised:
            state = "too long" if size > promised else "truncated"
            if size == promised:
                state = f"listed with {file.bytes:,} bytes"
            raise DataError(
                f"{path} is {state}: it has {size:,} bytes, and {file.tokens:,} tokens of "
                f"{self.manifest.dtype} are {promised:,}; copy it again or {PREPARE}"
            )

    def _check_entry(self, file: ShardFile) -> None:
        if file.bytes != file.tokens * self.dtype.itemsize or not file.tokens:
            raise DataError(
                f"{self.folder / MANIFEST} says that {file.name} has {file.bytes:,} bytes and "
                f"{file.tokens:,} tokens of {self.manifest.dtype}; {PREPARE}"
            )
        if file.max_id >= self.vocabulary:
            raise DataError(
                f"{self.folder / file.name} holds id {file.max_id}, outside its tokenizer's "
                f"{self.vocabulary} ids; {PREPARE}"
            )

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] from token `start`: a view inside one file, a copy across files."""
        return self._line.read(start, length)

    def advise(self, start: int, length: int) -> None:
        self._line.advise(start, length)

    @property
    def sections(self) -> list[tuple[int, int]]:
        return self._line.sections

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        self._line.need(now, soon)

    def close(self) -> None:
        self._line.close()

    def verify(self) -> None:
        """Read every byte: DataError for the first file whose checksum or largest id is not so."""
        for index, file in enumerate(self.split.files):
            data, checksum, top = self._line.map(index), xxhash.xxh3_64(), 0
            for at in range(0, len(data), CHUNK):
                part = data[at : at + CHUNK]
                checksum.update(part.data)
                top = max(top, int(part.max()))
            if checksum.hexdigest() != file.xxh3:
                raise DataError(
                    f"{self.folder / file.name} is damaged: its xxh3 is {checksum.hexdigest()} and "
                    f"{MANIFEST} says {file.xxh3}; copy it again or {PREPARE}"
                )
            if top != file.max_id:
                raise DataError(
                    f"{self.folder / file.name} holds id {top} and {MANIFEST} says that "
                    f"{file.max_id} is the largest; {PREPARE}"
                )


class Part:
    """Tokens `start` to `stop` of another data set."""

    def __init__(self, whole: ShardedDataset, start: int, stop: int) -> None:
        if not 0 <= start < stop <= whole.tokens:
            raise DataError(
                f"tokens {start:,} to {stop:,} are no part of {whole.name}, which has "
                f"{whole.tokens:,}: hold fewer tokens out"
            )
        self.whole, self.start, self.tokens = whole, start, stop - start
        self.name, self.vocabulary = f"a part of {whole.name}", whole.vocabulary

    def read(self, start: int, length: int) -> NDArray[Any]:
        if not 0 <= start <= start + length <= self.tokens:
            raise DataError(
                f"tokens {start:,} to {start + length:,} were asked of {self.name}, which has "
                f"{self.tokens:,}"
            )
        return self.whole.read(self.start + start, length)

    def advise(self, start: int, length: int) -> None:
        self.whole.advise(self.start + start, length)

    @property
    def sections(self) -> list[tuple[int, int]]:
        """Of all files of the whole; those outside the part have no tokens here."""
        clip = [(min(max(t - self.start, 0), self.tokens) for t in s) for s in self.whole.sections]
        return [(first, stop) for first, stop in clip]

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        self.whole.need(now, soon)

    def close(self) -> None:
        self.whole.close()


class RandomTokens:
    """Uniform ids without a file: token i is a hash of (seed, i), so every reader sees the same."""

    def __init__(self, vocabulary: int, seed: int, tokens: int = 1 << 40) -> None:
        if vocabulary < 1:
            raise DataError(f"random tokens need a vocabulary of at least 1, got {vocabulary}")
        self.name = f"random tokens of seed {seed}"
        self.vocabulary = vocabulary
        self.tokens = tokens
        self._key = splitmix64(np.uint64(seed & ((1 << 64) - 1)))

    def read(self, start: int, length: int) -> NDArray[Any]:
        """Ids [length] uint32."""
        where = np.arange(start, start + length, dtype=np.uint64)
        return (splitmix64(where ^ self._key) % np.uint64(self.vocabulary)).astype(np.uint32)

    def advise(self, start: int, length: int) -> None:
        pass  # nothing lies anywhere

    def close(self) -> None:
        pass


def count_tokens(dataset: Dataset) -> NDArray[np.int64]:
    """How often each id occurs: [vocabulary] int64, one pass over all tokens."""
    counts = np.zeros(dataset.vocabulary, np.int64)
    for start in range(0, dataset.tokens, CHUNK):
        ids = dataset.read(start, min(CHUNK, dataset.tokens - start))
        counts += np.bincount(ids, minlength=dataset.vocabulary)
    return counts


def entropy(counts: NDArray[np.int64]) -> float:
    """Shannon entropy in nats of the distribution that `counts` are proportional to."""
    share = counts[counts > 0] / counts.sum()
    return float((share * -np.log(share)).sum())


def unigram_entropy(shards: Dataset) -> float:
    """Nats per token that a model which knows only how frequent each token is would lose.

    A training loss below it shows that context is being used. The manifest stores the same number
    for each split (`TokenShards.split.unigram_entropy`); this counts it again.
    """
    return entropy(count_tokens(shards))
