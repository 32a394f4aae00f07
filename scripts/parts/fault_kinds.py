"""The ways in which bench_faults.py breaks a run."""

import contextlib
import os
import random
import resource
import signal
import time

from flashtrain.checkpoint.shelf import checkpoints
from scripts.parts.fault_run import Run, send

AGAIN = "flashtrain: restart "  # what the launcher says
NOT_SAVED = "training goes on and tries again"  # what a run says that cannot write a checkpoint


def kill_a_rank(run: Run, dice: random.Random) -> None:
    workers = run.workers()
    if workers:
        send(dice.choice(workers), signal.SIGKILL)
    run.wait()


def kill_a_rank_and_look_on(run: Run, dice: random.Random) -> None:
    """The launcher starts again by itself."""
    said = run.said()
    workers = run.workers()
    if workers:
        send(dice.choice(workers), signal.SIGKILL)
    if run.until(lambda: AGAIN in run.output(said)):
        run.began = time.time()


def kill_while_saving(run: Run, dice: random.Random) -> None:
    folder = run.folder / "checkpoints"
    if run.until(lambda: any(folder.glob("*.tmp"))):
        time.sleep(dice.uniform(0, 0.01))
        kill_a_rank(run, dice)


def kill_while_renaming(run: Run, dice: random.Random) -> None:
    """From the manifest, the last file, to the rename and the deletion of old ones."""
    folder = run.folder / "checkpoints"
    if run.until(lambda: any(folder.glob("*.tmp/manifest.json"))):
        time.sleep(dice.uniform(0, 0.005))
        run.kill_all()


def kill_everything(run: Run, dice: random.Random) -> None:
    run.kill_all()


def terminate(run: Run, dice: random.Random) -> None:
    assert run.process is not None
    send(run.process.pid, signal.SIGTERM)
    run.wait()


def damage(run: Run, dice: random.Random) -> None:
    """A bit flipped, a file cut or gone in the newest checkpoint, while the run is down."""
    run.kill_all()
    found = checkpoints(run.folder / "checkpoints")
    if len(found) < 2:
        return  # with no whole one left a run stops and asks, as it should
    path = dice.choice(sorted(found[0].iterdir()))
    content = bytearray(path.read_bytes())
    how = dice.choice(["flip", "cut", "delete"])
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    run.damaged.add(found[0].stat().st_ino)


def fill_the_disk(run: Run, dice: random.Random) -> None:
    """Room for a quarter of a checkpoint, until a save has failed; then there is room again.

    On the small disk of the benchmark. Without one, the kernel refuses to let the ranks' files
    grow beyond a limit, which is the same error to who writes, but for its number.
    """
    said = run.said()

    def failed() -> bool:
        return NOT_SAVED in run.output(said)

    if not run.until(lambda: bool(run.saved())):
        return
    files = [path.stat().st_size for path in checkpoints(run.folder / "checkpoints")[0].iterdir()]
    disk = run.folder.parent
    if os.path.ismount(disk):
        room = os.statvfs(disk)
        free = room.f_bavail * room.f_frsize
        filler = disk / "filler"
        try:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - sum(files) // 4))
            run.until(failed)
        finally:
            filler.unlink(missing_ok=True)
        return
    workers = run.workers()
    before = resource.prlimit(workers[0], resource.RLIMIT_FSIZE)
    for pid in workers:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(files) - 1, before[1]))
    run.until(failed)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


STARTING, RESUMING = "a rank killed while starting", "a rank killed while resuming"
RESTARTED, FULL = "a rank killed, launcher restarts", "disk full during a save"
SILENT = "W&B server says nothing"
KINDS = {
    "a rank killed": kill_a_rank,
    STARTING: kill_a_rank,
    RESUMING: kill_a_rank,
    RESTARTED: kill_a_rank_and_look_on,
    "a rank killed while saving": kill_while_saving,
    "all killed while renaming": kill_while_renaming,
    "all processes killed": kill_everything,
    "SIGTERM": terminate,
    "newest checkpoint damaged": damage,
    FULL: fill_the_disk,
    SILENT: kill_everything,
}
