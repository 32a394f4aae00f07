"""The folder of checkpoints of one run: which are there, which is the newest whole one.

Only `step-00000100` is a checkpoint. `.tmp` is one being written or deleted; `.broken` and
`.abandoned` were renamed out of the way and are never deleted; `.replaced` is the old one while a
new one of the same step takes its name.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from flashtrain.checkpoint.integrity import (
    MANIFEST,
    CheckpointError,
    Manifest,
    NewerFormatError,
    file_faults,
    read_manifest,
    sync_folder,
)
from flashtrain.checkpoint.peers import ALONE, Peers
from flashtrain.checkpoint.retention import Retention

log = logging.getLogger("flashtrain.checkpoint")
NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Newest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def find_latest(folder: Path, peers: Peers = ALONE) -> Path | None:
    """The newest checkpoint of which every byte is as written; None where there never was one.

    Every rank of `peers` calls it and gets the same answer. Each checks a share of the files and
    rank 0 decides. A broken checkpoint is named in one warning and, where that is allowed, renamed
    `step-N.broken`. When only broken ones are left this raises CheckpointError: training from step
    0 again over a damaged disk is a decision for a human.
    """
    if peers.rank == 0:
        restore_replaced(folder)
    broken: list[str] = []
    name: str | None = ""
    while name is not None:
        name = peers.broadcast(_newest(folder, broken) if peers.rank == 0 else None)
        fault = None if name is None else _first_fault(folder / name, peers)
        if name is not None and fault is None:
            return folder / name
        if name is not None and peers.rank == 0:
            _drop(folder / name, str(fault), broken)
    if peers.rank == 0:
        broken += [path.name for path in folder.glob("step-*.broken*")]
    failure = None
    if broken:
        failure = (
            f"every checkpoint in {folder} is broken, the last one is now {max(broken)}: "
            "restore one from a copy, or start again from step 0 with checkpoint.resume=never"
        )
    failure = peers.broadcast(failure)
    if failure is not None:
        raise CheckpointError(failure)
    return None


def _newest(folder: Path, broken: list[str]) -> str | None:
    return next((path.name for path in checkpoints(folder) if path.name not in broken), None)


def _drop(path: Path, fault: str, broken: list[str]) -> None:
    """Set a broken checkpoint aside; note it in `broken` where it has to stay under its name."""
    aside = path
    try:
        aside = _set_aside(path, "broken")
    except FileNotFoundError:
        return  # not broken: a run that trains there deleted it, and has a newer one
    except OSError:  # somebody else's run, which we may only read
        broken.append(path.name)
    log.warning("checkpoint %s is broken and not used: %s", aside, fault)


def locate(folder: Path, peers: Peers = ALONE) -> Path:
    """`folder` itself when it is a checkpoint, else the newest valid one of that run folder.

    Every rank of `peers` calls it. Raises CheckpointError where there is none.
    """
    if (folder / MANIFEST).is_file():
        verify(folder, peers)
        return folder
    found = find_latest(folder / "checkpoints", peers)
    if found is None:
        what = "holds no checkpoint" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}: name a run folder, as train.sh printed it, or a checkpoint like "
            "runs/NAME/checkpoints/step-00000100"
        )
    return found


def refuse_other_model(folder: Path, shapes: dict[str, list[int]]) -> None:
    """Raise CheckpointError unless the weights that `locate` would find there have these shapes.

    shapes: of the whole model's parameters. Reads manifests alone, so that a command can be refused
    before it starts; a manifest that is damaged is left to `locate`.
    """
    for path in [folder] if (folder / MANIFEST).is_file() else checkpoints(folder / "checkpoints"):
        try:
            tensors = read_manifest(path).tensors
        except CheckpointError:
            continue
        there = {
            name.removeprefix("model/"): list(record.shape)
            for name, record in tensors.items()
            if name.startswith("model/")
        }
        names = {**there, **shapes}  # in the model's order where both have them
        other = [name for name in names if there.get(name) != shapes.get(name)]
        if other:
            first = other[0]
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            raise CheckpointError(
                f"{path} holds another model: {first} is {there.get(first, 'absent')} there and "
                f"{shapes.get(first, 'absent')} here{more}; set model.* and position.* as in its "
                "state.json"
            )
        return


def verify(path: Path, peers: Peers = ALONE) -> None:
    """Read every byte of one checkpoint; raise CheckpointError on all ranks if any is wrong."""
    fault = _first_fault(path, peers)
    if fault is not None:
        raise CheckpointError(f"checkpoint {path} is broken: {fault}")


def _first_fault(path: Path, peers: Peers) -> str | None:
    """What is wrong with a checkpoint, equal on all ranks."""
    faults: list[str] = []
    newer = None
    try:
        manifest = read_manifest(path)
        faults = _share_faults(path, manifest, peers)
    except NewerFormatError as error:
        newer = str(error)
    except CheckpointError as error:
        faults = [str(error)]
    gathered = peers.gather([newer, faults])
    answer: list[str | None] = [None, None]
    if gathered is not None:
        answer = [
            next((item[0] for item in gathered if item[0]), None),
            next((item[1][0] for item in gathered if item[1]), None),
        ]
    newer, fault = peers.broadcast(answer)
    if newer is not None:
        raise NewerFormatError(newer)
    return fault if fault is None else str(fault)


def _share_faults(path: Path, manifest: Manifest, peers: Peers) -> list[str]:
    if NAME.fullmatch(path.name) and _step(path) != manifest.step:
        return [f"its manifest is of step {manifest.step}, so it was copied over another's"]
    share = sorted(manifest.files)[peers.rank :: peers.size]
    return file_faults(path, {name: manifest.files[name] for name in share})


def restore_replaced(folder: Path) -> None:
    """Finish or undo a replacement that died between its two renames."""
    for old in folder.glob("step-*.replaced"):
        final = old.with_suffix("")
        if final.exists():
            remove(old)
        else:
            os.rename(old, final)


def clean(folder: Path) -> None:
    """Remove what crashed runs left half-written or half-deleted."""
    restore_replaced(folder)
    for path in folder.glob("step-*.tmp"):
        _delete(path)


def prune(folder: Path, keep: Retention) -> None:
    """Delete what `keep` does not ask for. Called once the newest is complete."""
    for path in keep.surplus({path: _step(path) for path in checkpoints(folder)}):
        try:
            remove(path)
        except OSError as error:  # disk space, not data: the new checkpoint is there
            log.warning("cannot delete the old checkpoint %s: %s", path, error.strerror)


def set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step`: the run went back, and they are not its future any more."""
    for path in checkpoints(folder):
        if _step(path) > step:
            aside = _set_aside(path, "abandoned")
            log.warning(
                "the run went back to step %d: kept its later checkpoint as %s", step, aside
            )


def remove(path: Path) -> None:
    """Out of sight first: a deletion that is cut short leaves no half checkpoint."""
    doomed = path.with_name(path.name + ".tmp")
    os.rename(path, doomed)
    sync_folder(path.parent)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Of a link, the link: what it leads to is somebody else's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _set_aside(path: Path, why: str) -> Path:
    target = path.with_name(f"{path.name}.{why}")
    number = 2
    while target.exists():
        target = path.with_name(f"{path.name}.{why}-{number}")
        number += 1
    os.rename(path, target)
    return target
