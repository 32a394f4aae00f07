"""Brings remote shards into the cache, in the background, before they are read.

One thread a process downloads what is needed first and is not here; several processes of a machine
share the files, so each takes one that no other is at. A file counts once its size and checksum are
those of the manifest. What fails is tried again, later each time. A reader that waits gives up when
no byte of its shard has arrived for `patience` seconds, whatever the reason.
"""

import errno
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import xxhash

from flashtrain.data.cache import NoRoomError, ShardCache
from flashtrain.data.manifest import ShardFile
from flashtrain.data.mapped import DataError
from flashtrain.data.remote import (
    BLOCK,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PERMANENT,
    Remote,
    in_a_line,
    place_of,
)

POLL = 0.1  # seconds between looks at what other processes do
FULL_POLL = 1.0  # likewise, for room, which takes counting all files


class Fetcher:
    """`mapped.Files` of one split of a remote folder."""

    def __init__(
        self, remote: Remote, cache: ShardCache, files: Sequence[ShardFile], patience: float
    ) -> None:
        self.remote, self.cache, self.files, self.patience = remote, cache, files, patience
        self.on_release: Callable[[], None] | None = None
        self._changed = threading.Condition()  # guards all below
        self._pins: dict[int, IO[bytes]] = {}  # shards that are here and stay
        self._now: list[int] = []
        self._soon: list[int] = []
        self._asked: list[int] = []  # readers wait for these
        self._trouble: dict[int, str] = {}  # what went wrong last
        self._lost: dict[int, str] = {}  # what will not go right
        self._again: dict[int, tuple[float, float]] = {}  # when to try again, and the pause then
        self._closed = False
        self._thread: threading.Thread | None = None

    def path(self, index: int) -> Path:
        """The file, once it is here; it stays until `need` names neither it nor `close` is called.

        Raises DataError where the shard is not there, or nothing of it came for `patience` seconds.
        """
        file = self.files[index]
        with self._changed:
            self._asked.append(index)
            self._start()
            self._changed.notify_all()  # a thread at rest looks at it at once
            furthest, moved = -1, time.monotonic()
            try:
                while index not in self._pins:
                    if self._closed:
                        raise RuntimeError("these shards are closed")
                    if index in self._lost:
                        raise DataError(self._lost[index])
                    arrived = self.cache.arrived(self._name(file), file.bytes)
                    if arrived > furthest:
                        furthest, moved = arrived, time.monotonic()
                    if time.monotonic() - moved > self.patience:
                        raise DataError(self._given_up(index))
                    self._changed.wait(min(POLL, self.patience / 4))
            finally:
                self._asked.remove(index)
        return self.cache.folder / self._name(file)

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        with self._changed:
            if [*now] == self._now and [*soon] == self._soon:
                return
            self._now, self._soon = [*now], [*soon]
            self._let_go(set(self._pins) - {*now, *soon, *self._asked})
            self._start()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._let_go(set(self._pins))
            self._changed.notify_all()

    def _start(self) -> None:
        """A thread, if there is something to do. It ends when all is here."""
        if self._thread is None and not self._closed and self._missing():
            # the thread must not keep alive what nobody reads any more
            self._thread = threading.Thread(
                target=_work, args=(weakref.ref(self),), name="shards", daemon=True
            )
            self._thread.start()

    def _missing(self) -> list[int]:
        """The first needed first."""
        wanted = dict.fromkeys((*self._asked, *self._now, *self._soon))
        return [index for index in wanted if index not in self._pins and index not in self._lost]

    def step(self) -> bool:
        """Bring one file, if one can be brought now; False where nothing is left to do."""
        with self._changed:
            missing = self._missing()
            if self._closed or not missing:
                self._thread = None
                return False
        now, pause = time.monotonic(), POLL
        for index in missing:
            if self._again.get(index, (0.0, 0.0))[0] > now:
                continue
            try:
                if self._bring(index):
                    return True
            except NoRoomError as error:
                self._trouble[index] = f"{error}: raise data.cache_gb"
                # a reader that waits goes before what was brought for later
                if index in self._asked and self._make_room():
                    return True
                pause = FULL_POLL
                break
            except Exception as error:  # of whichever library speaks the protocol
                self._note(index, error)
        with self._changed:
            if self._missing() == missing:
                self._changed.wait(pause)
        return True

    def _bring(self, index: int) -> bool:
        """Whether something came of it. Raises NoRoomError, and what the network raises."""
        file = self.files[index]
        name = self._name(file)
        pin = self.cache.pin(name, file.bytes)
        if pin is None:
            claim = self.cache.claim(name, file.bytes)
            if claim is None:
                self._trouble[index] = "another process of this machine downloads it"
                return False
            try:
                self._download(file, claim.stream)
                pin = self.cache.publish(claim)
            except BaseException:
                self.cache.drop(claim)
                raise
        with self._changed:
            self._again.pop(index, None)
            if self._closed:
                self.cache.release(pin)
            else:
                self._pins[index] = pin
            self._changed.notify_all()
        return True

    def _download(self, file: ShardFile, stream: IO[bytes]) -> None:
        """Raises OSError for what arrives other than it was written."""
        checksum, size = xxhash.xxh3_64(), 0
        with self.remote.open(file.name) as source:
            while part := source.read(BLOCK):
                view = memoryview(part)
                while view:
                    view = view[stream.write(view) :]
                checksum.update(part)
                size += len(part)
                if self._closed:
                    raise OSError("these shards are closed")
        if size != file.bytes or checksum.hexdigest() != file.xxh3:
            raise OSError(
                f"it arrived damaged: {size:,} bytes with xxh3 {checksum.hexdigest()}, and the "
                f"manifest says {file.bytes:,} with {file.xxh3}"
            )

    def _note(self, index: int, error: Exception) -> None:
        """Plan another try, or none."""
        url = f"{self.remote.url}/{self.files[index].name}"
        with self._changed:
            if isinstance(error, PERMANENT):
                self._lost[index] = (
                    f"{url} is in the manifest and cannot be read: {in_a_line(error)}"
                )
            elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._lost[index] = (
                    f"the disk of data.cache_dir={self.cache.folder} is full: lower data.cache_gb "
                    f"or free it ({in_a_line(error)})"
                )
            self._trouble[index] = in_a_line(error)
            pause = min(2 * self._again.get(index, (0.0, FIRST_PAUSE / 2))[1], LONGEST_PAUSE)
            self._again[index] = (time.monotonic() + pause, pause)
            self._changed.notify_all()

    def _make_room(self) -> bool:
        """Let go of a file that is not read now, the one needed last; False where there is none."""
        with self._changed:
            keep = {*self._now, *self._asked}
            later = [index for index in (*reversed(self._soon), *self._pins) if index in self._pins]
            last = next((index for index in later if index not in keep), None)
            if last is not None:
                self._let_go([last])
            return last is not None

    def _let_go(self, indices: Iterable[int]) -> None:
        indices = [*indices]
        for index in indices:
            self.cache.release(self._pins.pop(index))
        if indices and self.on_release is not None:
            self.on_release()

    def _name(self, file: ShardFile) -> str:
        """In the cache: with its checksum, so that a shard made anew is another file."""
        stem = file.name.removesuffix(".bin")
        return f"{place_of(self.remote.url)}/{stem}-{file.xxh3}.bin"

    def _given_up(self, index: int) -> str:
        return (
            f"no byte of {self.remote.url}/{self.files[index].name} has arrived for "
            f"{self.patience / 60:.3g} minutes ({self._trouble.get(index, 'it answers nothing')}): "
            "when it can be reached, the same command goes on from the last checkpoint; "
            "data.network_minutes sets the limit"
        )


def _work(fetcher: "weakref.ref[Fetcher]") -> None:
    more = True
    while more:
        found = fetcher()
        more = found is not None and found.step()
        del found
