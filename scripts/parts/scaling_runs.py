"""The torchruns of bench_scaling.py: which cases share one, and what becomes of one that fails."""

import argparse
import contextlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "scaling_worker.py"


def measured(
    rows: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, what was found of it), as they are found; fewest processes first.

    Rows on as many processes share a torchrun; with options.together, as many torchruns as there
    are GPUs for. DeepSpeed, which keeps things for as long as its process lives, has a torchrun for
    each case.
    """

    def by(row: dict[str, Any]) -> tuple[int, int]:
        return row["gpus"], "engine=deepspeed" in row["case"] and id(row)

    for (gpus, _), group in itertools.groupby(sorted(rows, key=by), by):
        own = list(group)
        slots = min(len(own), options.gpus // gpus) if options.together else 1
        yield from _side_by_side([own[i::slots] for i in range(slots)], gpus, options)


def _side_by_side(
    lists: list[list[dict[str, Any]]], gpus: int, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each list in a torchrun of its own, all at the same time, on GPUs of their own."""
    if len(lists) == 1:
        cases = [row["case"].split() for row in lists[0]]
        yield from zip(lists[0], run_cases(cases, gpus, options), strict=True)
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(options.gpus)]
    found: queue.Queue[tuple[dict[str, Any], dict[str, Any]] | Exception] = queue.Queue()

    def run(rows: list[dict[str, Any]], visible: str) -> None:
        cases = [row["case"].split() for row in rows]
        try:
            for pair in zip(rows, run_cases(cases, gpus, options, visible), strict=True):
                found.put(pair)
        except Exception as error:
            found.put(error)

    for at, rows in enumerate(lists):
        visible = ",".join(devices[at * gpus : (at + 1) * gpus])
        threading.Thread(target=run, args=(rows, visible), daemon=True).start()
    for _ in itertools.chain(*lists):
        pair = found.get()
        if isinstance(pair, Exception):
            raise pair
        yield pair


def run_cases(
    cases: list[list[str]],
    processes: int,
    options: argparse.Namespace,
    visible: str | None = None,
) -> Iterator[dict[str, Any]]:
    """What scaling_worker.py measured of each case, as soon as it has; `error` where it failed.

    One torchrun does them all, since it takes longer to start than to time; the case after one
    that failed starts another.
    """
    done = 0
    while done < len(cases):
        for row in run_until_failure(cases[done:], processes, options, visible):
            yield row
            done += 1


def run_until_failure(
    cases: list[list[str]], processes: int, options: argparse.Namespace, visible: str | None
) -> Iterator[dict[str, Any]]:
    """visible: the GPUs that the ranks see; None: all."""
    with tempfile.TemporaryDirectory() as name, Path(name, "stderr").open("w+") as errors:
        given, rows = Path(name, "cases.json"), Path(name, "rows.jsonl")
        given.write_text(json.dumps(cases))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(WORKER)),
            *("--cases", str(given), "--rows", str(rows)),
            *("--steps", str(options.steps), "--warmup", str(options.warmup)),
        ]
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for at in range(len(cases)):
                line = next_line(rows, at, run, time.monotonic() + options.limit)
                if line is not None:
                    yield json.loads(line)
                    continue
                if run.poll() is None:
                    yield {"error": f"took longer than {options.limit} s"}
                else:
                    yield {"error": reason(Path(errors.name).read_text())}
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(60)
        finally:
            run.terminate()  # torchrun ends its ranks, and kills them after 30 s
            run.wait()


def next_line(rows: Path, at: int, run: subprocess.Popen[bytes], deadline: float) -> str | None:
    """Line `at` of a file, once it is there; None when its writer ended without or the time is
    over."""
    while True:
        ended = run.poll() is not None  # before the look: what it wrote last counts
        lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
        if len(lines) > at and lines[at].endswith("\n"):
            return lines[at]
        if ended or time.monotonic() > deadline:
            return None
        time.sleep(0.1)


def reason(said: str) -> str:
    """The line of the first traceback that says why."""
    found = re.search(r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception): .*)", said, re.MULTILINE)
    return found[1] if found else said[-200:].strip()
