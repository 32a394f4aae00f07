"""Runs a program that may hang or crash the GPU, piece by piece: the watch over bench_hopper.py.

The program runs in a worker process and says what it is at. When it falls silent or dies, that
piece is named, left out, and a new worker goes on with the rest.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SILENCE = 25.0  # seconds without a word after which the worker counts as hung
MOST_WORKERS = 12


@dataclass
class State:
    """What a new worker must know of the ones before it."""

    deadline: float
    bad: list[str] = field(default_factory=list)  # pieces that hung or crashed
    done: list[str] = field(default_factory=list)  # parts that are finished

    def attempt(self, piece: str, run: Callable[[], Any]) -> Any:
        """run(), unless it brought down a worker before; None where it fails."""
        import torch

        if piece in self.bad:
            return None
        print(f"@at {piece}", flush=True)
        try:
            result = run()
            torch.cuda.synchronize()
        except torch.AcceleratorError:
            raise  # nothing works on the GPU after this, in this process
        except Exception as error:
            say(f"!! {piece}: {type(error).__name__}: {str(error)[:300]}")
            return None
        return result

    def finish(self, part: str) -> None:
        print(f"@done {part}", flush=True)


def say(text: str) -> None:
    """From the worker to the user; what it prints else is shown only if it dies."""
    print("@" + text, flush=True)


def report(part: str, **numbers: Any) -> None:
    """From the worker to the results."""
    print("@result " + json.dumps({"part": part, **numbers}), flush=True)


def supervise(command: list[str], state: State) -> list[dict[str, Any]]:
    """Run `command --worker STATE` until it is through; all it reported."""
    results: list[dict[str, Any]] = []
    while time.time() < state.deadline and len(state.bad) < MOST_WORKERS:
        worker = subprocess.Popen(
            [sys.executable, "-u", *command, "--worker", json.dumps(vars(state))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        piece = _follow(worker, state, results)
        if piece is None:
            break
        known = piece in state.bad or piece == "start"
        state.bad.append(piece)
        if known:
            break  # nothing to leave out
    return results


def _follow(
    worker: "subprocess.Popen[bytes]", state: State, results: list[dict[str, Any]]
) -> str | None:
    """Read what it says to its end; the piece it stopped at, None when it came through."""
    piece: str | None = "start"
    last_words: list[str] = []
    for line in _lines(worker):
        if line.startswith("@at "):
            piece = line[4:]
        elif line.startswith("@result "):
            results.append(json.loads(line[8:]))
        elif line.startswith("@done "):
            state.done.append(line[6:])
            piece = "start" if line != "@done everything" else None
        elif line.startswith("@"):
            print(line[1:], flush=True)
        else:
            last_words = [*last_words[-11:], line]
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if piece is not None:
        said = "\n   ".join(last_words)
        print(f"!! {piece}: the worker hung or died. Its last words:\n   {said}", flush=True)
    return piece


def _lines(worker: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Until it ends or says nothing for SILENCE seconds."""
    assert worker.stdout is not None
    pipe, rest = worker.stdout.fileno(), b""
    while select.select([pipe], [], [], SILENCE)[0]:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
