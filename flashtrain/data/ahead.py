"""Whole files read into the page cache, in the background, before anyone maps them.

posix_fadvise(WILLNEED) would not do: Linux reads no more than the device's read-ahead window of
what it is told (128 KiB as a rule), and network file systems may ignore it. So a thread reads,
front to back, as disks like it, and throws away what it read.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

CHUNK = 1 << 22  # bytes read at a time


class ReadAhead:
    """Files of this machine's disks, or of a network disk it mounts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.on_release: Callable[[], None] | None = None
        self.read_bytes = 0  # by the thread, since the start
        self._changed = threading.Condition()  # guards all below
        self._needed: list[int] = []  # pieces, the first needed first
        self._done: set[int] = set()  # those of them that were read
        self._thread: threading.Thread | None = None

    def path(self, index: int) -> Path:
        return self.paths[index]

    def need(self, now: Sequence[int], soon: Sequence[int]) -> None:
        needed = [*now, *soon]
        with self._changed:
            if needed == self._needed:
                return
            left = set(self._needed) - set(needed)
            self._needed = needed
            self._done &= set(needed)  # a later epoch reads it again: it may have left the cache
            if self._thread is None and self._next() is not None:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()
        if left and self.on_release is not None:
            self.on_release()

    def close(self) -> None:
        with self._changed:
            self._needed, thread = [], self._thread
        if thread is not None:
            thread.join()

    def _next(self) -> int | None:
        return next((index for index in self._needed if index not in self._done), None)

    def _run(self) -> None:
        """Until all that is needed was read: a thread with nothing to do ends."""
        buffer = bytearray(CHUNK)
        while True:
            with self._changed:
                index = self._next()
                if index is None:
                    self._thread = None
                    return
                self._done.add(index)
            # a file that cannot be read is said by the one who needs its tokens
            with contextlib.suppress(OSError):
                self._read(index, buffer)

    def _read(self, index: int, buffer: bytearray) -> None:
        descriptor = os.open(self.paths[index], os.O_RDONLY)
        try:
            at = 0
            # looked at without the lock: a file nobody needs any more is read one chunk too far
            while index in self._needed and (got := os.preadv(descriptor, [buffer], at)):
                at += got
                self.read_bytes += got
        finally:
            os.close(descriptor)
