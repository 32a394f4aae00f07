"""Folders of token shards in other places: s3://, gs://, https://, file:// and all of fsspec's.

Credentials and endpoints: fsspec's configuration files and variables, and those of the package
behind the protocol.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import xxhash

from flashtrain.data.documents import optional
from flashtrain.data.manifest import PREPARE
from flashtrain.data.mapped import DataError

INSTALL = "pip install 'flashtrain[remote]'"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between tries, each twice the one before
# at the door, where a person waits and nothing is lost yet; later data.network_minutes
DOOR_SECONDS = 30.0
PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
REFUSED = (401, 403, 404, 410)  # HTTP: a file that is not there, or not for us
BLOCK = 1 << 24  # bytes asked for at a time


def is_remote(path: str) -> bool:
    """Whether `path` is PROTOCOL://...; a folder of this machine is not, a file:// one is."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


class Remote:
    """One folder, read only."""

    def __init__(self, url: str) -> None:
        """Raises DataError where the protocol is unknown or its package missing."""
        self.url = url.rstrip("/")
        fsspec = optional("fsspec", f"data.path={url}")
        protocol = url.partition("://")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise DataError(
                f"{url}: {protocol}:// needs a package that is not here ({in_a_line(error)}): "
                f"`{INSTALL}`, or fsspec's package for {protocol}"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{url}: fsspec knows no {protocol}:// ({in_a_line(error)}); s3://, gs://, "
                "https:// and file:// it does"
            ) from error

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A binary stream. Raises one of PERMANENT where trying again is of no use."""
        try:
            stream = self._files.open(f"{self._root.rstrip('/')}/{name}", "rb", block_size=BLOCK)
        except FileNotFoundError as error:
            # fsspec calls it that whatever goes wrong over HTTP; its cause is what it was
            cause = error.__cause__
            over_http = type(cause).__module__.startswith("aiohttp")
            if over_http and getattr(cause, "status", None) not in REFUSED:
                raise ConnectionError(in_a_line(cause)) from error
            raise
        with stream as file:
            yield file

    def read(self, name: str, patience: float = DOOR_SECONDS) -> bytes:
        """A small file, tried for `patience` seconds. DataError where it cannot be had."""
        began, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                with self.open(name) as file:
                    data: bytes = file.read()
                return data
            except PERMANENT as error:
                raise DataError(
                    f"{self.url} has no {name} that can be read ({in_a_line(error)}): {PREPARE} "
                    "and copy the whole folder there"
                ) from error
            except Exception as error:  # of whichever library speaks the protocol
                if time.monotonic() + pause - began > patience:
                    raise DataError(
                        f"{self.url}/{name} could not be read for {patience:.0f} seconds "
                        f"({in_a_line(error)}): is the network up, and are the credentials right?"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def place_of(url: str) -> str:
    """The folder inside the cache: told by its last part, kept apart by its hash."""
    url = url.rstrip("/")
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])
    return f"{name}-{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"


def in_a_line(error: BaseException | None) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
