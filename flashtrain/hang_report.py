"""What a rank that hangs leaves behind, and the one line in which all of them are named."""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch._C import _distributed_c10d

FRESH_S = 60.0  # reports older than this are of another hang
ABORTING_S = 0.5
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Report:
    rank: int
    host: str
    pid: int
    time: float  # s since 1970
    what: str  # such as "step 12"
    collective: str  # that has not ended; "" where none is known
    where: str  # innermost line of flashtrain of the thread that trains
    why: str

    @staticmethod
    def path(folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}.json"

    @classmethod
    def read_all(cls, folder: Path, now: float) -> list[Self]:
        """Of this hang, in rank order."""
        found = []
        for path in sorted(folder.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(cls(**json.loads(path.read_text())))
        return [report for report in found if now - report.time < FRESH_S]


def write(folder: Path, rank: int, what: str, why: str) -> Report:
    """This rank's report, stacks and record of collectives; what cannot be written is left out."""
    collective = ""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    record = flight_record()
    if record is not None:
        collective = pending(record)
        with contextlib.suppress(OSError):
            (folder / f"rank-{rank:05d}.collectives.json").write_text(json.dumps(record))
    host, pid = socket.gethostname(), os.getpid()
    report = Report(rank, host, pid, time.time(), what, collective, where_training_is(), why)
    path = Report.path(folder, rank)
    with contextlib.suppress(OSError):
        path.with_suffix(".new").write_text(json.dumps(asdict(report)))
        path.with_suffix(".new").replace(path)
    return report


def say(folder: Path, own: Report) -> None:
    """Print the line, if `own` is of the lowest rank that has reported."""
    reports = Report.read_all(folder, time.time()) or [own]
    if own.rank == min(report.rank for report in reports):
        sys.stderr.write(summary(reports, world_size(), folder) + "\n")


def summary(reports: list[Report], world_size: int, folder: Path) -> str:
    """One line for all ranks; those that stand at the same place are named together."""
    places: dict[str, list[int]] = defaultdict(list)
    for report in reports:
        name = report.collective or "no collective"
        places[f"at {report.what}, in {name} ({report.where})"].append(report.rank)
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    if silent:
        places["dead, stopped or on their way elsewhere"] = silent
    parts = [f"{_ranks(ranks)} {place}" for place, ranks in places.items()]
    return f"flashtrain: {reports[0].why}: {'; '.join(parts)}; stacks in {folder}"


def _ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> 'ranks 0-2,5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    names = ",".join("-".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def end_silent_neighbours(folder: Path, own: Report, neighbours: list[int]) -> None:
    """Kill those on this node that have not reported: a stopped process would outlive SIGTERM."""
    here = [r for r in Report.read_all(folder, time.time()) if r.host == own.host]
    if own.rank != min((report.rank for report in here), default=own.rank):
        return
    silent = set(neighbours) - {report.pid for report in here} - {own.pid}
    _kill(silent, signal.SIGABRT)  # prints stacks, where it still can
    if silent:
        time.sleep(ABORTING_S)
    _kill(silent, signal.SIGKILL)


def _kill(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, number)


def flight_record() -> Any:
    """PyTorch's record of the latest collectives; None where there is none."""
    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None or not dist.is_initialized():
        return None
    try:
        return json.loads(dump())
    except (RuntimeError, ValueError):
        return None


def pending(record: Any) -> str:
    """The oldest collective that has not ended, as in `gloo:all_reduce number 31 of [64, 128]`."""
    for entry in record.get("entries", []):
        if not entry.get("retired", True):
            number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
            group = entry["process_group"][1]
            sizes = " ".join(map(str, entry["input_sizes"]))
            return f"{entry['profiling_name']} number {number} of {sizes or 'nothing'} ({group})"
    return ""


def where_training_is() -> str:
    """Innermost line of flashtrain on the main thread's stack, as in `trainer.py:51 fit`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of flashtrain"


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
