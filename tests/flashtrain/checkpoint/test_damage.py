"""No damaged byte is ever used: if anything is wrong with a checkpoint, the one before is taken."""

import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtrain import checkpoint
from flashtrain.checkpoint import (
    CheckpointError,
    Retention,
    collect,
    find_latest,
    restore,
    save,
    shelf,
    verify,
)
from flashtrain.checkpoint.integrity import (
    FORMAT,
    MANIFEST,
    FileRecord,
    Manifest,
    encode,
    read_manifest,
)
from tests.flashtrain.checkpoint.emulate import Tiny, on_threads, save_whole

OLD, NEW = "step-00000001", "step-00000002"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap_stale(path: Path) -> None:
    shutil.copyfile(path.parent.parent / OLD / path.name, path)


FILES = ["rank-00000.safetensors", "state.json", "rng.json", MANIFEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: flip(path, 8 * (path.stat().st_size // 2)), "damaged"),
        (truncate, "bytes instead of|damaged"),
        (lambda path: path.write_bytes(b""), "bytes instead of|damaged"),
        (lambda path: path.unlink(), "missing"),
        (swap_stale, "damaged|bytes instead of|of step 1"),
    ],
    ids=["flip", "truncate", "empty", "missing", "stale"],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    complaint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_whole(tmp_path, 1, seed=1)
    torch.manual_seed(5)
    torch.randn(7)  # else both rng.json would be equal and a swap no damage
    save_whole(tmp_path, 2, seed=2)
    torch.manual_seed(0)
    damage(tmp_path / NEW / name)
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == tmp_path / OLD
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert name in message or "its manifest is of step 1" in message
    assert any(part in message for part in complaint.split("|")), message
    assert (tmp_path / f"{NEW}.broken").is_dir()
    assert not (tmp_path / NEW).exists()
    assert find_latest(tmp_path) == tmp_path / OLD  # asked again: no second warning
    assert len(caplog.records) == 1


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = save_whole(tmp_path, 1)
    rng = random.Random(0)
    for name in FILES:
        file = path / name
        size = 8 * file.stat().st_size
        # all of the manifest's first and last bytes, where its own checksum stands, then samples
        bits = {*range(200), *range(size - 400, size), *rng.sample(range(size), 150)}
        for bit in bits if name == MANIFEST else rng.sample(sorted(bits), 60):
            flip(file, bit)
            with pytest.raises(CheckpointError, match=f"{name} (is damaged|does not follow)"):
                verify(path)
            flip(file, bit)
    verify(path)


def test_a_leftover_of_a_crash_is_not_seen_and_removed_by_the_next_save(tmp_path: Path) -> None:
    save_whole(tmp_path, 1)
    shutil.copytree(tmp_path / OLD, tmp_path / f"{NEW}.tmp")
    assert find_latest(tmp_path) == tmp_path / OLD
    save_whole(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [OLD, "step-00000003"]


def test_a_folder_without_any_checkpoint_starts_a_new_run(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "nothing") is None
    assert find_latest(tmp_path) is None


def test_only_broken_checkpoints_are_a_decision_for_a_human(tmp_path: Path) -> None:
    save_whole(tmp_path, 1)
    truncate(tmp_path / OLD / "rng.json")
    for _ in range(2):  # also when asked again
        with pytest.raises(CheckpointError, match=r"every checkpoint in .*resume=never"):
            find_latest(tmp_path)
    save_whole(tmp_path, 1)  # a run started again on purpose is not held up
    assert find_latest(tmp_path) == tmp_path / OLD


def test_a_run_that_trains_on_may_delete_what_another_process_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where somebody draws samples from a run under way."""
    save_whole(tmp_path, 1)
    check = shelf.file_faults

    def slow(folder: Path, files: dict[str, FileRecord]) -> list[str]:
        if folder.name == OLD:
            save_whole(tmp_path, 2)
            shelf.remove(folder)
        return check(folder, files)

    monkeypatch.setattr(shelf, "file_faults", slow)
    assert find_latest(tmp_path) == tmp_path / NEW
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == [NEW]


def test_a_broken_checkpoint_of_somebody_else_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    save_whole(tmp_path, 1)
    save_whole(tmp_path, 2)
    truncate(tmp_path / NEW / MANIFEST)
    monkeypatch.setattr(shelf.os, "rename", refuse)
    assert find_latest(tmp_path) == tmp_path / OLD
    truncate(tmp_path / OLD / MANIFEST)
    with pytest.raises(CheckpointError, match=f"every checkpoint.*{NEW}"):
        find_latest(tmp_path)


def test_a_newer_format_is_refused_and_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_whole(tmp_path, 1)
    monkeypatch.setattr("flashtrain.checkpoint.integrity.FORMAT", FORMAT + 1)
    manifest = encode(read_manifest_of_any_format(path))
    (path / MANIFEST).write_bytes(manifest)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has checkpoint format 2 .* reads format 1"):
        find_latest(tmp_path)
    assert path.is_dir()


def read_manifest_of_any_format(path: Path) -> Manifest:
    content = (path / MANIFEST).read_bytes().replace(b'"format":1', b'"format":2', 1)
    body = content[: content.rindex(b',"xxh3_128"')] + b"}"
    from flashtrain.checkpoint import integrity

    (path / MANIFEST).write_bytes(integrity._seal(body))
    return read_manifest(path)


def test_keeps_the_newest_k_and_deletes_after_completion_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        save_whole(tmp_path, step, keep=Retention(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    monkeypatch.setattr("flashtrain.checkpoint.store.encode", fail_with_disk_full)
    with pytest.raises(CheckpointError):
        save_whole(tmp_path, 5, keep=Retention(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def fail_with_disk_full(*_: object) -> bytes:
    raise OSError(28, "No space left on device")


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_whole(tmp_path, 1, seed=1)
    before = read_manifest(tmp_path / OLD)
    save_whole(tmp_path, 1, seed=2)
    assert read_manifest(tmp_path / OLD) != before
    assert [path.name for path in tmp_path.iterdir()] == [OLD]
    verify(tmp_path / OLD)


def test_going_back_sets_the_later_checkpoints_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_whole(tmp_path, 1)
    save_whole(tmp_path, 9)
    save_whole(tmp_path, 2)
    assert find_latest(tmp_path) == tmp_path / NEW
    assert (tmp_path / "step-00000009.abandoned").is_dir()
    assert "went back to step 2" in caplog.text


def test_dying_while_going_back_does_not_bring_back_what_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the renames that set it aside and that publish what was saved instead."""

    class Killed(BaseException):
        pass

    rename, left = os.rename, 1

    def counted(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        rename(source, target)

    save_whole(tmp_path, 1)
    save_whole(tmp_path, 9)
    with monkeypatch.context() as dying:
        dying.setattr(os, "rename", counted)
        with pytest.raises(Killed):
            save_whole(tmp_path, 2)
    assert find_latest(tmp_path) == tmp_path / OLD


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_any_rank_is_one_clear_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    save_whole(tmp_path, 1)
    write = checkpoint.store.write_tensors

    def full(path: Path, entries: list[tuple[str, torch.Tensor]]) -> FileRecord:
        if path.name == f"rank-{rank:05d}.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return write(path, entries)

    monkeypatch.setattr(checkpoint.store, "write_tensors", full)
    model = Tiny()
    errors = on_threads(2, lambda peers: save(tmp_path, 2, collect(model), {}, peers=peers))
    assert isinstance(errors[0], CheckpointError)
    assert str(errors[0]) == str(errors[1])
    assert str(tmp_path / NEW) in str(errors[0])
    assert "(1180 bytes of tensors): No space left on device" in str(errors[0])
    assert [path.name for path in tmp_path.iterdir()] == [OLD]
    assert find_latest(tmp_path) == tmp_path / OLD


def test_a_save_that_cannot_fit_is_refused_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        CheckpointError, match=r"\(1180 bytes of tensors\): only 100 bytes are free"
    ):
        save(tmp_path, 1, collect(Tiny()), {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*file/checkpoints"):
        save(tmp_path / "file" / "checkpoints", 1, collect(Tiny()), {})


# kills itself with SIGKILL at the n-th step that changes or syncs the disk, for n = 1, 2, ..., of a
# save in this thread (step 2, over an existing one) or beside it (step 3)
KILLER = """
    import os, signal, sys, torch
    from pathlib import Path
    from flashtrain.checkpoint import Peers, Saver, collect
    from tests.flashtrain.checkpoint.emulate import save_whole, trained

    def save_beside(folder):
        saver = Saver(folder, torch.device("cpu"), Peers())
        saver.start(3, collect(*trained(3)), {})
        saver.finish()

    torch.set_num_threads(1)
    ALWAYS = {"fsync", "os.remove", "os.rmdir"}  # the latter name files relative to a folder
    BELOW = {"open", "os.mkdir", "os.rename", "shutil.rmtree"}  # imports open files too
    root, sync = sys.argv[1], os.fsync
    armed, point, seen = False, 0, 0

    def tick(event, arguments=()):
        global seen
        if armed and (event in ALWAYS or event in BELOW and root in str(arguments)):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    def fsync(handle):
        tick("fsync")
        sync(handle)

    sys.addaudithook(tick)
    os.fsync = fsync
    for step in (2, 3):
        point, status = 0, 1
        while status != 0:
            point += 1
            folder = Path(root, str(step), str(point))
            save_whole(folder, 1, seed=1)
            save_whole(folder, 2, seed=2)
            child = os.fork()
            if child == 0:
                armed = True
                save_whole(folder, 2, seed=3) if step == 2 else save_beside(folder)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
"""


def test_kill_9_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
        timeout=100,
    )
    for step in (2, 3):
        runs = sorted((tmp_path / str(step)).iterdir(), key=lambda path: int(path.name))
        assert len(runs) >= 20  # each is killed one operation later; the last one lives
        outcomes = []
        for run in runs:
            latest = find_latest(run)
            assert latest is not None
            model = Tiny()
            restore(latest, model, torch.optim.AdamW(model.parameters()))
            outcomes.append(latest.name)
            save_whole(run, 4)  # and the next save is not held up by what was left
            assert not list(run.glob("*.tmp"))
            assert not list(run.glob("*.broken"))
        assert outcomes[0] == NEW
        assert outcomes[-1] == f"step-{step:08d}"
        assert outcomes == sorted(outcomes)
