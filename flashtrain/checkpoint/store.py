"""Checkpoints on disk: `<folder>/step-00000100/`, each complete or invisible.

Written as `step-N.tmp`: every file fsynced, the manifest last, then one rename. So a crash leaves a
`.tmp` folder, which the next save removes, and never a half-written checkpoint under a real name.

    rank-00003.safetensors   boxes of logical tensors that rank 3 owns
    state.json               step, versions, optimizer scalars and what the trainer passes as meta
    rng.json                 the generators of every rank
    manifest.json            names, shapes and places of all tensors; checksums of all files
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flashtrain.checkpoint.integrity import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    Manifest,
    PieceRecord,
    TensorRecord,
    check_cover,
    encode,
    read_manifest,
    sync_folder,
    write_bytes,
)
from flashtrain.checkpoint.peers import ALONE, Peers
from flashtrain.checkpoint.retention import NEWEST, Retention
from flashtrain.checkpoint.shelf import checkpoint_path, clean, prune, set_aside_later
from flashtrain.checkpoint.state import State, rng_state
from flashtrain.checkpoint.tensors import Reader, entry_key, owned_bytes, write_tensors


def save(
    folder: Path,
    step: int,
    state: State,
    meta: dict[str, Any],
    *,
    peers: Peers = ALONE,
    writes: bool = True,
    keep: Retention = NEWEST,
    rng: dict[str, Any] | None = None,
) -> Path:
    """Write `<folder>/step-N`, drop what `keep` does not ask for. Every rank of `peers` calls it.

    writes: whether this rank's owned boxes go to disk (data-parallel rank 0); its RNG always does.
    rng: what `rng_state` gave when `state` was as it is; null: as it is now.
    meta: JSON types; rank 0's is taken. Checkpoints of later steps, from a run that has since gone
    back to an earlier one, are renamed `step-M.abandoned`.
    Raises CheckpointError on all ranks alike when any of them cannot write: what was complete
    before is untouched and the temporary folder is gone.
    """
    final = checkpoint_path(folder, step)
    tmp = final.with_name(final.name + ".tmp")
    needed = peers.gather(owned_bytes(state.tensors) if writes else 0)
    failure = None
    if needed is not None:
        failure = _attempt(final, sum(needed), lambda: _open(folder, tmp, sum(needed)))
    _raise_everywhere(peers, failure)

    record: dict[str, Any] = {"rng": rng_state() if rng is None else rng}
    record["failure"] = _attempt(
        final,
        owned_bytes(state.tensors),
        lambda: record.update(_write_rank(tmp, peers.rank, state) if writes else {}),
    )
    records = peers.gather(record)
    if records is not None:
        failures = [record["failure"] for record in records if record["failure"]]
        failure = failures[0] if failures else None
        if failure is None:
            failure = _attempt(
                final, None, lambda: _complete(final, tmp, step, meta, records, keep)
            )
        if failure is not None:
            shutil.rmtree(tmp, ignore_errors=True)
    _raise_everywhere(peers, failure)
    return final


def _attempt(path: Path, needed: int | None, action: Callable[[], object]) -> str | None:
    """Run `action`; on failure a sentence instead of an exception, so that peers hear of it."""
    try:
        action()
    except Exception as error:
        size = "" if needed is None else f" ({needed} bytes of tensors)"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return (
            f"cannot write checkpoint {path}{size}: {reason}; checkpoints that were complete "
            "are untouched"
        )
    return None


def _raise_everywhere(peers: Peers, failure: str | None) -> None:
    failure = peers.broadcast(failure)
    if failure is not None:
        raise CheckpointError(failure)


def _open(folder: Path, tmp: Path, needed: int) -> None:
    """Clean up after crashed runs and make room; refuse before writing when it cannot fit."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"only {free} bytes are free: free some space or set checkpoint.keep lower"
        )
    tmp.mkdir()


def _write_rank(tmp: Path, rank: int, state: State) -> dict[str, Any]:
    """This rank's safetensors file; returns its records for the manifest, JSON types only."""
    name = f"rank-{rank:05d}.safetensors"
    entries, tensors = [], {}
    for tensor_name, local in state.tensors.items():
        pieces = []
        for box in local.boxes:
            if box.owned:
                key = entry_key(tensor_name, local, box)
                entries.append((key, local.view(box)))
                pieces.append([name, key, box.start, box.shape])
        tensors[tensor_name] = {"shape": local.shape, "dtype": local.dtype, "pieces": pieces}
    files = {name: asdict(write_tensors(tmp / name, entries))} if entries else {}
    scalars = {key: value.item() for key, value in state.scalars.items()}
    return {"files": files, "tensors": tensors, "scalars": scalars}


def _complete(
    final: Path,
    tmp: Path,
    step: int,
    meta: dict[str, Any],
    records: list[dict[str, Any]],
    keep: Retention,
) -> None:
    """Rank 0, once all files are there: JSON files, manifest, rename, then tidy."""
    files: dict[str, FileRecord] = {}
    scalars: dict[str, float] = {}
    for record in records:
        files |= {name: FileRecord(**item) for name, item in record.get("files", {}).items()}
        scalars |= record.get("scalars", {})
    state = {
        "step": step,
        "world_size": len(records),
        "versions": _versions(),
        "scalars": scalars,
        "meta": meta,
    }
    files["state.json"] = write_bytes(tmp / "state.json", json.dumps(state, indent=1).encode())
    rng = json.dumps([record["rng"] for record in records]).encode()
    files["rng.json"] = write_bytes(tmp / "rng.json", rng)
    tensors = _join([record.get("tensors", {}) for record in records])
    write_bytes(tmp / MANIFEST, encode(Manifest(step, files, tensors)))
    sync_folder(tmp)
    # first: dying between the two must not leave what was given up as the newest
    set_aside_later(final.parent, step)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():  # `clean` puts it back if we die between the two renames
        os.rename(final, replaced)
    os.rename(tmp, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    prune(final.parent, keep)


def _join(parts: list[dict[str, Any]]) -> dict[str, TensorRecord]:
    """What the ranks wrote of each tensor; raises ValueError unless that is the whole, once."""
    joined: dict[str, TensorRecord] = {}
    for part in parts:
        for name, item in part.items():
            pieces = tuple(
                PieceRecord(file, key, tuple(offset), tuple(shape))
                for file, key, offset, shape in item["pieces"]
            )
            shape, dtype = tuple(item["shape"]), item["dtype"]
            before = joined.get(name, TensorRecord(shape, dtype, ()))
            if (before.shape, before.dtype) != (shape, dtype):
                raise ValueError(
                    f"{name} is {before.dtype} {list(before.shape)} on one rank and "
                    f"{dtype} {list(shape)} on another"
                )
            joined[name] = TensorRecord(shape, dtype, before.pieces + pieces)
    for name, record in joined.items():
        check_cover(name, record)
    return joined


def _versions() -> dict[str, str]:
    try:
        ours = metadata.version("flashtrain")
    except metadata.PackageNotFoundError:
        ours = "source tree"
    return {"flashtrain": ours, "torch": torch.__version__, "python": platform.python_version()}


def read_meta(path: Path) -> dict[str, Any]:
    """`meta` as it was given to `save`, with "step", "world_size" and "versions" beside it."""
    state = _read_json(path / "state.json")
    own = {key: state[key] for key in ("step", "world_size", "versions")}
    return {**state["meta"], **own}


def read_rng(path: Path, rank: int, world_size: int) -> dict[str, Any] | None:
    """What `set_rng_state` wants; None when the checkpoint is of another number of ranks.

    Weights and data order are functions of the seed alone, so only what draws at random during
    training (dropout) differs after a change of layout.
    """
    states = _read_json(path / "rng.json")
    return states[rank] if len(states) == world_size else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load(path: Path, state: State) -> None:
    """Fill the tensors and scalars of `state` in place from a checkpoint of any layout.

    Reads only the boxes that this rank holds; optimizer state only if `state` holds any. Checksums
    are `find_latest`'s and `verify`'s work.
    Raises CheckpointError for a missing or surplus tensor or another shape or dtype, before
    anything is written to.
    """
    manifest = read_manifest(path)
    scalars = _read_json(path / "state.json")["scalars"]
    _refuse_mismatch(path, state, manifest, scalars)
    reader = Reader(path)
    for name, local in state.tensors.items():
        reader.copy_into(local, manifest.tensors[name])
    for name, scalar in state.scalars.items():
        scalar.fill_(scalars[name])


def parameter_of(name: str) -> str:
    """The parameter that `model/<parameter>` or `optimizer/<key>/<parameter>` is of."""
    return name.split("/", 2 if name.startswith("optimizer/") else 1)[-1]


def _refuse_mismatch(path: Path, state: State, manifest: Manifest, scalars: dict[str, Any]) -> None:
    saved = {name: (list(t.shape), t.dtype) for name, t in manifest.tensors.items()}
    saved |= {name: ([], "scalar") for name in scalars}
    if not any(name.startswith("optimizer/") for name in state.tensors):  # weights alone, to sample
        saved = {name: item for name, item in saved.items() if not name.startswith("optimizer/")}
    saved = {
        name: item for name, item in saved.items() if parameter_of(name) not in state.elsewhere
    }
    wanted = {name: (list(t.shape), t.dtype) for name, t in state.tensors.items()}
    wanted |= {name: ([], "scalar") for name in state.scalars}
    problems = []
    for name in sorted({**wanted, **saved}):
        if name not in saved:
            problems.append(f"{name} {wanted[name][0]} is in this run but not in the checkpoint")
        elif name not in wanted:
            problems.append(f"{name} {saved[name][0]} is in the checkpoint but not in this run")
        elif saved[name] != wanted[name]:
            there, here = saved[name], wanted[name]
            problems.append(f"{name} is {there[1]} {there[0]} there and {here[1]} {here[0]} here")
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path} does not fit this model: {problems[0]}{others}; set model.*, position.* and "
            "optimizer.* as in its state.json, or start afresh with checkpoint.resume=never"
        )
