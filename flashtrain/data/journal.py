"""What an interrupted preparation goes on from: one file that says how far the output is complete.

state.npz is replaced as a whole, after everything it speaks of is on disk; hashes.bin only grows.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import xxhash

from flashtrain.data.documents import Bad, Place
from flashtrain.data.mapped import DataError
from flashtrain.data.writer import SplitWriter

STATE, HASHES = "state.npz", "hashes.bin"
DIGEST = 16  # bytes of xxh3-128: at 10^12 documents, two different ones agree with odds of 1e-15


class Seen:
    """Hashes of the documents so far, to leave repeated ones out: some 100 bytes of memory each."""

    def __init__(self) -> None:
        self.count = 0
        self._hashes: set[bytes] = set()
        self._unsaved: list[bytes] = []

    def add(self, text: str) -> bool:
        """Whether `text` is new."""
        digest = xxhash.xxh3_128_digest(text.encode("utf-8"))
        if digest in self._hashes:
            return False
        self._hashes.add(digest)
        self._unsaved.append(digest)
        self.count += 1
        return True

    def save(self, folder: Path, count: int) -> None:
        """Append the first `count` hashes to hashes.bin, less those that are there."""
        new = len(self._unsaved) - (self.count - count)
        with (folder / HASHES).open("ab") as stream:
            stream.write(b"".join(self._unsaved[:new]))
            stream.flush()
            os.fsync(stream.fileno())
        del self._unsaved[:new]

    def restore(self, folder: Path, count: int) -> None:
        with (folder / HASHES).open("r+b") as stream:
            stream.truncate(count * DIGEST)
            data = stream.read()
        self._hashes = {data[at : at + DIGEST] for at in range(0, len(data), DIGEST)}
        self.count = count


@dataclass
class Progressed:
    """Of the input: what the shards written so far hold."""

    after: Place = (0, 0)
    documents: int = 0
    tokens: int = 0
    seen: int = 0  # hashes, if duplicates are left out
    bad: Counter[Bad] | None = None


class Journal:
    """Saves to and restores from the folder that is being filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, progress: Progressed, writers: dict[str, SplitWriter], seen: Seen | None
    ) -> None:
        if seen is not None:
            seen.save(self.folder, progress.seen)
        tree = {
            "after": progress.after,
            "documents": progress.documents,
            "tokens": progress.tokens,
            "seen": progress.seen,
            "bad": {reason.name: count for reason, count in (progress.bad or {}).items()},
            "writers": {name: writer.state() for name, writer in writers.items()},
        }
        counts = {name: writer.counts for name, writer in writers.items()}
        partial = self.folder / (STATE + ".partial")
        with partial.open("wb") as stream:
            np.savez(stream, state=np.array(json.dumps(tree)), **counts)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.folder / STATE)

    def restore(self, writers: dict[str, SplitWriter], seen: Seen | None) -> Progressed:
        """Writers and hashes as they were; progress of nothing where nothing was saved."""
        file = self.folder / STATE
        if not file.is_file():
            (self.folder / HASHES).unlink(missing_ok=True)
            return Progressed(bad=Counter())
        try:
            with np.load(file, allow_pickle=False) as arrays:
                tree = json.loads(str(arrays["state"]))
                for name, writer in writers.items():
                    writer.restore(tree["writers"][name], arrays[name])
        except (ValueError, KeyError, OSError, BadZipFile) as error:
            raise DataError(
                f"{file} cannot be gone on from ({error}); it is removed, start again"
            ) from error
        if seen is not None:
            seen.restore(self.folder, tree["seen"])
        first, second = tree["after"]
        bad = Counter({Bad[name]: count for name, count in tree["bad"].items()})
        return Progressed((first, second), tree["documents"], tree["tokens"], tree["seen"], bad)

    def remove(self) -> None:
        for name in (STATE, HASHES):
            (self.folder / name).unlink(missing_ok=True)
