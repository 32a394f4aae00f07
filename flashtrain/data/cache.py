"""A folder that holds at most so many bytes of downloaded files, shared by processes of a machine.

    NAME                 a whole file; whoever may read it holds a shared lock (flock) on it
    NAME.SIZE.partial    one on its way; its writer holds an exclusive lock, SIZE counts as taken
    lock                 held while space is counted and files appear or go

Locks end with their process, so what a killed one left is free again: a whole file is used by the
next one, a partial one is removed. What nobody holds goes when room is needed, the file first that
was last needed longest ago. The folder has to be on a file system with flock, which is any local
one, and NFS.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

PARTIAL = ".partial"
LOCK = "lock"


class NoRoomError(Exception):
    """Files in use leave no room for another one."""


class Claim(NamedTuple):
    """The right to write one file."""

    name: str
    partial: Path
    stream: IO[bytes]


class ShardCache:
    """Names are paths inside `folder`, one folder deep: SOURCE/FILE."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes of all files together. Makes `folder` where it is absent."""
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def pin(self, name: str, size: int) -> IO[bytes] | None:
        """The open file, locked against eviction until it is closed; None where it is not here."""
        path = self.folder / name
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for nobody but one who is removing it
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == size:
            os.utime(file.fileno())  # needed now
            return file
        file.close()
        if status.st_nlink:  # a crash of the machine left part of it
            with self._locked():
                path.unlink(missing_ok=True)
        return None

    def release(self, file: IO[bytes]) -> None:
        os.utime(file.fileno())  # needed until now
        file.close()

    def claim(self, name: str, size: int) -> Claim | None:
        """To write `name` of `size` bytes; None where it is here or another process writes it.

        Removes what it must to make room. Raises NoRoomError where that is in use.
        """
        with self._locked():
            (self.folder / name).parent.mkdir(exist_ok=True)
            partial = self._partial(name, size)
            if (self.folder / name).exists():
                return None
            taken = self._count()
            if partial.exists():  # still, so somebody writes it
                return None
            if taken + size > self.limit and taken + size - self._evict(taken + size) > self.limit:
                raise NoRoomError(
                    f"{taken / 1e9:.2f} of {self.limit / 1e9:.2f} GB in {self.folder} are in use"
                )
            # unbuffered: others see by its size that it grows
            stream = partial.open("wb", buffering=0)
            fcntl.flock(stream, fcntl.LOCK_EX)
            return Claim(name, partial, stream)

    def publish(self, claim: Claim) -> IO[bytes]:
        """What was written becomes the file; returned as from `pin`."""
        os.fsync(claim.stream.fileno())
        with self._locked():  # taking the weaker lock gives up the stronger one for a moment
            claim.partial.rename(self.folder / claim.name)
            fcntl.flock(claim.stream, fcntl.LOCK_SH)
        return claim.stream

    def drop(self, claim: Claim) -> None:
        """Give up writing."""
        with self._locked():
            claim.partial.unlink(missing_ok=True)
            claim.stream.close()

    def size(self) -> int:
        """Bytes of all files, those that are promised included."""
        with self._locked():
            return self._count()

    def arrived(self, name: str, size: int) -> int:
        """Bytes of `name` that are here, whoever writes them."""
        for path in (self._partial(name, size), self.folder / name):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    def _partial(self, name: str, size: int) -> Path:
        return self.folder / f"{name}.{size}{PARTIAL}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _count(self) -> int:
        """Likewise, under the lock. Removes what killed writers left."""
        total = 0
        for path in self.folder.glob(f"*/*{PARTIAL}"):
            if not _remove(path):
                total += int(path.name.split(".")[-2])
        return total + sum(path.stat().st_size for path in self.folder.glob("*/*.bin"))

    def _evict(self, taken: int) -> int:
        """Bytes removed until `taken` is within the limit, or nothing is left to remove."""
        removed = 0
        files = [(path.stat(), path) for path in self.folder.glob("*/*.bin")]
        for status, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if taken - removed <= self.limit:
                break
            if _remove(path):
                removed += status.st_size
        return removed


def _remove(path: Path) -> bool:
    """Whether it could be: whether nobody holds a lock on it."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
