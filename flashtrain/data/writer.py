"""Writes token shards and their manifest; can put a writer back to where its state was taken."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashtrain.data.dataset import CHUNK
from flashtrain.data.manifest import DTYPES, MANIFEST, Manifest, ShardFile, Split
from flashtrain.data.mapped import DataError

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
        self._stream: IO[Any] | None = None
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

    def state(self) -> dict[str, Any]:
        """JSON of where the writer stands, without `counts`; what it wrote so far is on disk."""
        if self._stream is not None:
            self._sync()
        return {
            "files": [asdict(file) for file in self._files],
            "open_tokens": 0 if self._stream is None else self._tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
        }

    def restore(self, state: dict[str, Any], counts: NDArray[np.int64]) -> None:
        """Go back, in a writer that has written nothing, to a `state` and its counts.

        Files begun since are removed, tokens since are cut off.
        """
        self.counts[:] = counts
        self.documents, self.text_bytes = state["documents"], state["text_bytes"]
        self._files = [ShardFile(**file) for file in state["files"]]
        kept = {file.name for file in self._files}
        tokens = state["open_tokens"]
        if tokens:
            self._begin("r+b")
            kept.add(self._name)
            self._reread(tokens)
        for path in self.folder.glob(f"{self.split}-*.bin"):
            if path.name not in kept:
                path.unlink()

    def _reread(self, tokens: int) -> None:
        assert self._stream is not None
        size, there = tokens * self.dtype.itemsize, os.fstat(self._stream.fileno()).st_size
        if there < size:
            raise DataError(f"{self.folder / self._name} lost {size - there} of {size} bytes")
        self._stream.truncate(size)
        while data := self._stream.read(CHUNK * self.dtype.itemsize):
            self._checksum.update(data)
            part = np.frombuffer(data, self.dtype)
            self._tokens += len(part)
            self._max_id = max(self._max_id, int(part.max()))

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

    def _begin(self, mode: str = "wb") -> None:
        self._name = f"{self.split}-{len(self._files):05d}.bin"
        self._stream = (self.folder / self._name).open(mode)
        self._checksum = xxhash.xxh3_64()
        self._tokens = self._max_id = 0

    def _sync(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _end(self) -> None:
        assert self._stream is not None
        self._sync()
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


def entropy(counts: NDArray[np.int64]) -> float:
    """Shannon entropy in nats of the distribution that `counts` are proportional to."""
    share = counts[counts > 0] / counts.sum()
    return float((share * -np.log(share)).sum())
