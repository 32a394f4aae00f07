"""One run at a time in a run folder: two would delete each other's checkpoints.

A lock of the operating system, which goes with the process that holds it however that ends, so
nothing stale is left behind. Rank 0 of a start holds it.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from flashtrain.config import ConfigError

log = logging.getLogger("flashtrain.claim")
LOCK = "lock"
PATIENCE_S = 20.0  # for a start before this one that is on its way out
_held: list[IO[str]] = []  # closing a file would give its lock back


def claim(folder: Path, patience: float = PATIENCE_S) -> None:
    """Keep other runs out of `folder` until this process ends.

    Raises ConfigError when another holds it and still does after `patience` seconds, or when the
    folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(
            f"run_dir={folder} cannot be written to ({error.strerror}): name another folder, or "
            "make this one writable"
        ) from error
    deadline = time.monotonic() + patience
    while not _lock(file):
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"run_dir={folder} is in use by {holder}: wait for it, end it, or name another "
                "run_dir"
            )
        time.sleep(0.2)
    _held.append(file)
    with contextlib.suppress(OSError):  # a full disk: who comes later hears of no name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): start no second run there", file.name, error)
    return True
