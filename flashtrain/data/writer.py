"""Writes a folder of token shards: under a temporary name, manifest last, then renamed.

Nobody ever sees half a folder. Of two processes that prepare the same folder at once, one renames
first and the other one finds a finished folder in its place.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashtrain.data.shards import DTYPES, MANIFEST, DataError, Manifest, ShardFile, Split, entropy

DEFAULT_SHARD_TOKENS = 100_000_000  # 200 MB of uint16


def dtype_for(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


class SplitWriter:
    """Appends ids to `<split>-00000.bin`, `<split>-00001.bin`, ... of `limit` tokens each."""

    def __init__(self, folder: Path, split: str, vocabulary: int, limit: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.dtype = DTYPES[dtype_for(vocabulary)]
        self.counts = np.zeros(vocabulary, np.int64)
        self.documents = 0
        self.text_bytes = 0
        self._files: list[ShardFile] = []
        self._stream: IO[bytes] | None = None
        self._tokens = self._max_id = 0  # of the file that is open

    def append(self, ids: NDArray[Any], documents: int, text_bytes: int) -> None:
        """`ids` [n] hold `documents` whole documents made of `text_bytes` bytes of text."""
        self.documents += documents
        self.text_bytes += text_bytes
        if len(ids):
            self.counts += np.bincount(ids, minlength=len(self.counts))
        ids = ids.astype(self.dtype, copy=False)
        while len(ids):
            if self._stream is None:
                self._begin()
            assert self._stream is not None
            part = ids[: self.limit - self._tokens]
            self._stream.write(part.data)
            self._checksum.update(part.data)
            self._tokens += len(part)
            self._max_id = max(self._max_id, int(part.max()))
            ids = ids[len(part) :]
            if self._tokens == self.limit:
                self._end()

    def close(self) -> Split:
        if self._stream is not None:
            self._end()
        return Split(
            tokens=int(self.counts.sum()),
            documents=self.documents,
            text_bytes=self.text_bytes,
            # 6 digits: the last bits of a sum differ between processors, the file must not
            unigram_entropy=round(entropy(self.counts), 6) if self._files else 0.0,
            files=tuple(self._files),
        )

    def _begin(self) -> None:
        self._name = f"{self.split}-{len(self._files):05d}.bin"
        self._stream = (self.folder / self._name).open("wb")
        self._checksum = xxhash.xxh3_64()
        self._tokens = self._max_id = 0

    def _end(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        self._files.append(
            ShardFile(
                name=self._name,
                tokens=self._tokens,
                bytes=self._tokens * self.dtype.itemsize,
                max_id=self._max_id,
                xxh3=self._checksum.hexdigest(),
            )
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The file that makes the folder one of token shards: whole or not there."""
    partial = folder / (MANIFEST + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(folder / MANIFEST)


def occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well.

    Raises DataError where something is already there, unless `force`; also when it appeared while
    the block ran. An error in the block leaves nothing behind.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file: name another --output")
    if occupied(target) and not force:
        raise DataError(f"{target} is not empty: name another --output or add --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder = target.parent / f".{target.name}.tmp-{mark}"
    folder.mkdir()
    try:
        yield folder
        old = target.parent / f".{target.name}.old-{mark}"
        if force and occupied(target):
            target.rename(old)
        try:
            folder.rename(target)  # fails on a folder with files in it, which is the lock
        except OSError as error:
            if old.exists() and not target.exists():
                old.rename(target)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise DataError(
                f"{target} was filled by another process meanwhile: use it, or add --force"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
