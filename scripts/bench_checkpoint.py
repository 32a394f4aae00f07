"""What a checkpoint costs: the stall of a step, saving, loading, beside the disk's own speed.

    python scripts/bench_checkpoint.py                   # a tiny model, on the CPU too
    python scripts/bench_checkpoint.py --json checkpoint.json --case "experiment=gpt_1.3b \\
        data.sequence_length=2048 data.batch_size=8 data.micro_batch_size=8"

One process. In this order, each part printed once it is known: steps without a save; the disk; a
save that the loop waits for; the memory for saving beside training; saves with steps beside them,
until the disk has each; every byte verified; the state loaded. The share of training time that a
save every so many steps (--every) takes is said twice: of the stall alone, and of all that the
steps beside a save took longer, a wait for a slow disk included. The disk: one file in pieces of
16 MiB, written and fsynced, read again; pages that are on the disk are dropped from the page cache
before anything is read, and what the kernel then counts as read from a device is said. Room for two
checkpoints is needed in --folder.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashtrain import checkpoint
from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import Config, to_dict
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.metrics import GIB
from flashtrain.parallel.mesh import ALONE
from scripts.parts.where import where

TINY = (
    "experiment=null model=gpt_tiny data=random model.vocabulary=512 data.sequence_length=64 "
    "data.batch_size=2 data.micro_batch_size=2"
)
PIECE = 16 << 20
WARMUP = 4  # untimed steps

Row = dict[str, Any]


class Bench:
    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.engine = build_engine(config, ALONE, device)
        self.loader = open_loader(config, 0, 1, device)
        self.steps_done = 0

    def steps(self, n: int, until: Callable[[], bool] = lambda: False) -> list[float]:
        """Seconds of each of at most `n` steps; none begins once `until` is true."""
        times = []
        while len(times) < n and not until():
            began = time.perf_counter()
            self.engine.forward_backward(self.loader.step(self.steps_done))
            self.engine.step(self.config.optimizer.lr * 0.1)
            synchronize(self.device)
            times.append(time.perf_counter() - began)
            self.steps_done += 1
        return times

    def saver(self, asynchronous: bool) -> checkpoint.Saver:
        return checkpoint.Saver(
            self.folder,
            self.device,
            checkpoint.Peers(),
            asynchronous=asynchronous,
            keep=checkpoint.Retention(newest=1),
        )

    def save(self, saver: checkpoint.Saver) -> float:
        """Seconds until the next step may begin."""
        synchronize(self.device)
        began = time.perf_counter()
        saver.start(self.steps_done, self.engine.state(), {"config": to_dict(self.config)})
        return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def result(saver: checkpoint.Saver) -> checkpoint.Saved:
    saver.finish()
    (saved,) = saver.results()
    if saved.failure is not None:
        raise SystemExit(f"bench_checkpoint: {saved.failure}")
    return saved


def drop_from_cache(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_from_device() -> int | None:
    """Bytes that storage has delivered to this process, where the kernel counts them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(n) for key, n in (line.split(": ") for line in lines) if key == "read_bytes"))


def disk_speed(folder: Path, size: int) -> dict[str, Any]:
    """Sequential write with fsync, and read, of one file of `size` bytes."""
    path, piece = folder / "raw", memoryview(bytearray(os.urandom(PIECE)))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    written = time.perf_counter() - began
    drop_from_cache(path)
    before, began = read_from_device(), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    took = time.perf_counter() - began
    size = path.stat().st_size
    path.unlink()
    return {
        "GiB": size / GIB,
        "write GiB/s": size / GIB / written,
        "read GiB/s": size / GIB / took,
        "share read from a device": device_share(before, size),
    }


def device_share(before: int | None, size: int) -> float | None:
    after = read_from_device()
    return None if before is None or after is None else (after - before) / size


def file_system(folder: Path) -> str:
    """Of the longest mount point above `folder`."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) > len(best[0]):
            best = (point, kind)
    return f"{best[1]} at {best[0]}"


def measure(bench: Bench, every: int, steps: int, saves: int, raw: int) -> Iterator[Row]:
    """Parts of the result, each as soon as it is known."""
    bench.steps(WARMUP)
    alone = statistics.median(bench.steps(steps))
    yield {"step s": alone}
    yield {"disk": disk_speed(bench.folder, raw)}

    waiting = bench.saver(asynchronous=False)
    stall = bench.save(waiting)
    saved = result(waiting)
    size = sum(file.stat().st_size for file in saved.path.iterdir())
    yield {"checkpoint GiB": size / GIB}
    yield {"synchronous": {"stall s": stall, "save GiB/s": size / GIB / saved.written_s}}
    shutil.rmtree(saved.path)

    beside = bench.saver(asynchronous=True)
    began = time.perf_counter()
    beside.prepare(bench.engine.state())
    preparing = bench.steps(every, until=lambda: not beside.busy)
    beside.finish()
    yield {
        "memory": {
            "made in s": time.perf_counter() - began,
            "slowest step meanwhile s": max(preparing, default=None),
        }
    }

    stalls, writes, meanwhile, longer = [], [], [], []
    for _ in range(saves):
        began = time.perf_counter()
        stalls.append(bench.save(beside))
        times = bench.steps(every, until=lambda: not beside.busy)
        saved = result(beside)
        writes.append(saved.written_s)
        meanwhile += times
        longer.append(time.perf_counter() - began - len(times) * alone)
    yield {
        "asynchronous": {
            "stall s": statistics.median(stalls),
            "longest stall s": max(stalls),
            "copy GiB/s": size / GIB / statistics.median(stalls),
            "write s": statistics.median(writes),
            "save GiB/s": size / GIB / statistics.median(writes),
            "steps meanwhile": len(meanwhile) / saves,
            "median step meanwhile s": statistics.median(meanwhile) if meanwhile else None,
            f"longest stall, share of {every} steps": max(stalls) / (every * alone),
            f"with a save, {every} steps take longer by, share": statistics.median(longer)
            / (every * alone),
        }
    }
    beside.close()

    drop_from_cache(*saved.path.iterdir())
    before, began = read_from_device(), time.perf_counter()
    found = checkpoint.find_latest(bench.folder)
    verified = time.perf_counter() - began
    share = device_share(before, size)
    assert found == saved.path
    began = time.perf_counter()
    checkpoint.load(found, bench.engine.state(checkpoint.saved_names(found)))
    bench.engine.loaded()
    synchronize(bench.device)
    loaded = time.perf_counter() - began
    yield {
        "load": {
            "verify s": verified,
            "verify GiB/s": size / GIB / verified,
            "share read from a device": share,
            "load after that s": loaded,
            "both GiB/s": size / GIB / (verified + loaded),
        }
    }


def show(row: Row, indent: str = "") -> None:
    for key, value in row.items():
        said = "" if isinstance(value, dict) else "unknown" if value is None else f"{value}"
        if isinstance(value, float):
            said = f"{value:.2%}" if "share" in key else f"{value:.4g}"
        print(f"{indent}{key:<54}{said}", flush=True)
        if isinstance(value, dict):
            show(value, indent + "  ")


def main() -> int:
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", default=TINY, help="Hydra overrides (default: a tiny model)")
    add("--every", type=int, default=100, metavar="N", help="steps from a save to the next one")
    add("--steps", type=int, default=20, metavar="N", help="without a save (default %(default)s)")
    add("--saves", type=int, default=3, metavar="N", help="beside steps (default %(default)s)")
    add("--raw-gib", type=float, default=None, help="of the disk's file (default: 4, CPU 0.25)")
    add("--folder", type=Path, help="on the disk to be measured (default: a temporary one)")
    add("--json", type=Path, help="write the figures and the environment here")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    began = time.perf_counter()
    overrides = options.case.split()
    overrides += [] if "data=" in options.case else ["data=random", "model.vocabulary=50304"]
    config = load([*overrides, "trainer.steps=1000000"])
    config = prepare_source(config, 1)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as temporary:
        bench = Bench(config, device, Path(temporary))
        raw = options.raw_gib or (4.0 if cuda else 0.25)
        row: Row = {
            "environment": where()
            | {
                "case": options.case,
                "cores": len(os.sched_getaffinity(0)),
                "file system": file_system(Path(temporary)),
                "load": os.getloadavg()[0],
            }
        }
        show(row)
        parts = measure(bench, options.every, options.steps, options.saves, int(raw * GIB))
        for part in parts:
            show(part)
            row |= part
        bench.loader.close()
    whole = {"whole bench s": time.perf_counter() - began}
    show(whole)
    if options.json:
        options.json.write_text(json.dumps({**row, **whole}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
