"""Starts of one job: a launcher starts a run that failed again, with the same configuration.

`checkpoint.resume=never`, or a path, says where the job begins. Its later starts go on from what it
has saved, as those of any run do; so what lay in the run folder before is noted.
"""

import contextlib
import json
import os
import socket
from collections.abc import Collection
from pathlib import Path

from flashtrain.checkpoint.integrity import MANIFEST
from flashtrain.checkpoint.shelf import checkpoints

JOB = "job.json"  # in the run folder
Stamps = dict[str, int]  # name of a checkpoint -> when it was written, as its file system tells


def launcher() -> str | None:
    """Torchrun, or our launcher, above this process, by a name that no other ever has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid, began = os.getppid(), ""
    with contextlib.suppress(OSError):  # where there is no /proc
        began = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {pid} {began}"


def before(folder: Path, launchers: Collection[str]) -> Stamps:
    """Checkpoints of the run folder from before the first start of this job.

    launchers: of all ranks. One that was there at an earlier start makes this a later start of the
    same job; others may have joined since.
    """
    known, stamps = _read(folder)
    if not known & set(launchers):
        known, stamps = set(), stamps_of(folder)
    if launchers:
        record = {"launchers": sorted(known | set(launchers)), "before": stamps}
        fresh = folder / f"{JOB}.tmp"
        with contextlib.suppress(OSError):  # on a full disk the record before stays
            fresh.write_text(json.dumps(record))
            fresh.replace(folder / JOB)
    return stamps


def goes_on(folder: Path) -> bool:
    """Whether this process is of a job that was started here already."""
    return launcher() in _read(folder)[0]


def stamps_of(folder: Path) -> Stamps:
    stamps = {}
    for path in checkpoints(folder / "checkpoints"):
        with contextlib.suppress(OSError):
            stamps[path.name] = (path / MANIFEST).stat().st_mtime_ns
    return stamps


def _read(folder: Path) -> tuple[set[str], Stamps]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / JOB).read_text())
        return set(record["launchers"]), dict(record["before"])
    return set(), {}
