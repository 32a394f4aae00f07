"""Whether a run still reads the tokens it began with: from one start to the next by what manifests
promise, within a start by the files themselves.

Another order or other ids under the same names would train without a word: every size fits.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from flashtrain.data.manifest import MANIFEST, Manifest
from flashtrain.data.mapped import DataError

Look = tuple[int, int, int]  # inode, bytes, ns when it was last written to


class Unchanged:
    """Told of every source at a start; small enough to be kept in checkpoints."""

    def __init__(self) -> None:
        self.contents: dict[str, str] = {}  # by path as configured: hash of what lies there
        self._looks: dict[Path, Look] = {}

    def add(self, name: str, manifest: Manifest, folder: Path | None) -> None:
        """Shards of our own. folder: None where they lie elsewhere and are checked on arrival."""
        files = [file for split in manifest.splits.values() for file in split.files]
        self.contents[name] = _hash(f"{file.tokens} {file.xxh3}" for file in files)
        if folder is not None:
            self._watch([folder / MANIFEST, *(folder / file.name for file in files)])

    def add_foreign(self, name: str, files: Iterable[Path]) -> None:
        """Files without checksums: their sizes stand for them."""
        files = sorted(files)
        self.contents[name] = _hash(f"{file.name} {file.stat().st_size}" for file in files)
        self._watch(files)

    def refuse_other(self, before: Mapping[str, str], checkpoint: Path) -> None:
        """DataError where a source is another than when `checkpoint` was written.

        before: its `contents`. Sources that the configuration has not named before are its choice.
        """
        for name, content in self.contents.items():
            if before.get(name, content) != content:
                raise DataError(
                    f"{name} holds other tokens than when {checkpoint} was written: bring those "
                    "back, or name what is new by another path; model.weights begins a new run "
                    "with the weights of this one"
                )

    def refuse_changed(self) -> None:
        """DataError where a file is not what it was when this start began."""
        for path, look in self._looks.items():
            try:
                now = _look(path)
            except OSError as error:
                raise DataError(f"{path} is gone while a run reads it: {error.strerror}") from error
            if now != look:
                raise DataError(
                    f"{path} was changed while a run reads it: what was trained since the newest "
                    "checkpoint may be garbage; bring the file back and go on from there"
                )

    def _watch(self, files: Iterable[Path]) -> None:
        self._looks |= {file: _look(file) for file in files}


def _look(path: Path) -> Look:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _hash(lines: Iterable[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
