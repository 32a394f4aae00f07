"""Token shards that `scripts/prepare_data.py` made, opened and checked.

Opening checks everything that costs no reading: a folder that opens has files of the right sizes
and ids inside the vocabulary. `TokenShards.verify` reads it all and compares checksums.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from flashtrain.data.dataset import CHUNK
from flashtrain.data.manifest import DTYPES, MANIFEST, PREPARE, Manifest, ShardFile
from flashtrain.data.mapped import DataError as DataError  # the other packages import it here
from flashtrain.data.mapped import Files, MappedTokens, Piece


class TokenShards(MappedTokens):
    """One split of a folder of token shards."""

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
            self._check_entry(file)
            if bring is None:
                self._check_file(file)
        files = bring(self.split.files) if bring is not None else None
        super().__init__(f"the {split} split of {self.folder}", pieces, files)
        if self.tokens != self.split.tokens:
            raise DataError(
                f"{self.folder / MANIFEST} counts {self.split.tokens:,} tokens in {split} but its "
                f"files hold {self.tokens:,}; {PREPARE}"
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

    def _check_file(self, file: ShardFile) -> None:
        path = self.folder / file.name
        if not path.is_file():
            raise DataError(f"{path} is named in {MANIFEST} but is not there; copy it or {PREPARE}")
        if path.resolve().parent != self.folder.resolve():
            raise DataError(f"{path} is a link that leads out of its folder: copy the file there")
        size = path.stat().st_size
        if size != file.bytes:
            raise DataError(
                f"{path} is {'too long' if size > file.bytes else 'truncated'}: it has {size:,} "
                f"bytes, and {file.tokens:,} tokens of {self.manifest.dtype} are {file.bytes:,}; "
                f"copy it again or {PREPARE}"
            )

    def verify(self) -> None:
        """Read every byte: DataError for the first file whose checksum or largest id is not so."""
        for index, file in enumerate(self.split.files):
            data, checksum, top = self.map(index), xxhash.xxh3_64(), 0
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
