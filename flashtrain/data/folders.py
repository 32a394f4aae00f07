"""Folders that appear whole or not at all: filled under another name, then renamed.

`new_folder` starts from nothing each time, and several processes may race to the same target.
`work_folder` keeps a name of its own, so that what an interrupted process left is found again.
"""

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashtrain.data.mapped import DataError

JOB = "job.json"
LOCK = "lock"


class UnreachableError(DataError):
    """Input went away that was read before: what was made of it is kept."""


def occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well.

    Raises DataError where something is already there, unless `force`; also when it appeared while
    the block ran. An error in the block leaves nothing behind.
    """
    target = _free(target, force)
    folder = target.parent / f".{target.name}.tmp-{_mark()}"
    folder.mkdir()
    try:
        yield folder
        _publish(folder, target, force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_folder(target: Path, job: dict[str, Any], *, force: bool = False) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the block ends well.

    An interruption of any kind leaves it, and a later call with the same `job` (JSON) gets it back
    as it was; a DataError in the block other than UnreachableError removes it. Raises DataError
    where something is at `target` or an interrupted job with other options is in the way, unless
    `force`, and where another process is at work here.
    """
    target = _free(target, force)
    folder = target.parent / f".{target.name}.partial"
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds none
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise DataError(
                f"another process is preparing {target}: wait for it or name another --output"
            ) from error
        _claim(folder, target, json.dumps(job, sort_keys=True), force)
        try:
            yield folder
            for name in (JOB, LOCK):
                (folder / name).unlink()
            _publish(folder, target, force)
        except DataError as error:
            if not isinstance(error, UnreachableError):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _claim(folder: Path, target: Path, job: str, force: bool) -> None:
    """Leave in `folder` what the same job has done before, or nothing."""
    file = folder / JOB
    if file.is_file() and file.read_text(encoding="utf-8") == job:
        return
    others = [path for path in folder.iterdir() if path.name != LOCK]
    if file.is_file() and not force:
        raise DataError(
            f"{folder} is an interrupted preparation of {target} from other input or with other "
            "options: repeat that command to finish it, or add --force to start anew"
        )
    for path in others:
        path.unlink()
    partial = folder / (JOB + ".partial")
    partial.write_text(job, encoding="utf-8")
    partial.rename(file)


def _free(target: Path, force: bool) -> Path:
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file: name another --output")
    if occupied(target) and not force:
        raise DataError(f"{target} is not empty: name another --output or add --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _mark() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _publish(folder: Path, target: Path, force: bool) -> None:
    old = target.parent / f".{target.name}.old-{_mark()}"
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
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
