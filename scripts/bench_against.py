"""The Hopper attention kernels of several checkouts or tiles, raced in turns on one GPU.

    git worktree add ../before HEAD~5
    python scripts/bench_against.py ../before .                 # what the last commits brought
    python scripts/bench_against.py . .:early=1 --shapes 1024  # what a field of the tiles brings

Each side is a checkout, and after a colon fields of the backward's tile, or of the forward's where
the name starts with `forward.` (kernels/attention/hopper/tiles.py), that take other values. A side
has a process of its own; the sides take turns, several rounds of them, since the clock falls under
load. bf16, 16k tokens in all, width 2048. TFLOP/s count 4 B H S^2 D forward, half of it when
causal, and 2.5 times that backward with its small kernels; for documents the time in milliseconds.
`apart`: how far gradients are from the first side's, as a share of their norm. `host`: microseconds
of Python of a call, in CUDA's queue.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOKENS, WIDTH, ROUNDS = 16384, 2048, 5
MEAN_LENGTH = 512  # of documents
ROWS = [
    f"{kind} {D} {S}" for S in (1024, 4096, 16384) for D in (64, 128) for kind in ("causal", "full")
] + [f"documents {D} {TOKENS}" for D in (64, 128)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="*", help="PATH or PATH:field=value,...")
    parser.add_argument("--shapes", default="", help="rows that hold one of these texts, by commas")
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    if not arguments.sides:
        parser.error("give two sides or more")
    rows = [row for row in ROWS if any(text in row for text in arguments.shapes.split(","))]
    start = time.time()
    once = [(side, row) for row in rows if not row.endswith(" 16384") or "doc" in row
            for side in arguments.sides]  # fmt: skip
    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(lambda job: Side(job[0]).close({"row": job[1], "rounds": 0}), once))
    print(f"{len(once)} calls compiled in {time.time() - start:.0f} s")
    sides = [Side(side) for side in arguments.sides]
    found = [race(sides, row) for row in rows]
    for pass_ in ("forward", "backward"):
        for i, side in enumerate(arguments.sides[1:], 1):
            ratios = [row[pass_][0] / row[pass_][i] for row in found]
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"{pass_}: {side} is {mean:.3f} times as fast as {arguments.sides[0]}")
    for side in sides:
        print(f"host of {side.name}: {side.ask({'row': 'host'})}")
        side.close()
    if arguments.json:
        arguments.json.write_text(json.dumps({"sides": arguments.sides, "rows": found}, indent=1))


class Side:
    """A worker process with the kernels of one checkout."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, what: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        sys.exit(f"{self.name} died at {what}")

    def close(self, last: dict[str, Any] | None = None) -> None:
        if last:
            self.ask(last)
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def race(sides: list[Side], row: str) -> dict[str, Any]:
    """Median milliseconds of each side and pass; prints the row."""
    times: dict[str, list[list[float]]] = {"forward": [], "backward": []}
    prints: list[list[float]] = [side.ask({"row": row, "rounds": 0}) for side in sides]
    for _ in range(ROUNDS):
        answers = [side.ask({"row": row, "rounds": 1}) for side in sides]
        for i, pass_ in enumerate(times):
            times[pass_].append([answer[i] for answer in answers])
    result: dict[str, Any] = {"row": row, "apart": [apart(x, prints[0]) for x in prints]}
    kind, _D, S = row.split()
    flops = 4 * TOKENS * int(S) * WIDTH * (0.5 if kind == "causal" else 1.0)
    text = f"{row:20s}"
    for pass_, factor in (("forward", 1.0), ("backward", 2.5)):
        ms = [statistics.median(column) for column in zip(*times[pass_], strict=True)]
        result[pass_] = ms
        shown = [f"{factor * flops / x / 1e9:6.0f}" for x in ms]
        if kind == "documents":
            shown = [f"{x:6.3f}" for x in ms]
        text += f" {pass_} {' '.join(shown)} |"
    print(text, "apart", " ".join(f"{x:.1e}" for x in result["apart"]), flush=True)
    return result


def apart(a: list[float], b: list[float]) -> float:
    """Of two samples of gradients."""
    return math.dist(a, b) / math.hypot(*b)


def work(side: str) -> None:
    """The worker: what it is asked for on stdin, one line each."""
    root, _, fields = side.partition(":")
    sys.path.insert(0, str(Path(root).resolve()))
    changes = {name: int(value) for name, value in (x.split("=") for x in fields.split(",") if x)}
    for line in sys.stdin:
        asked = json.loads(line)
        row = asked["row"]
        if row == "host":
            answer: Any = host(Call("causal 128 1024", changes, tokens=1024, width=256))
        else:
            answer = Call(row, changes).measure(asked["rounds"])
        print("@" + json.dumps(answer), flush=True)


class Call:
    """Forward and backward of a row, on tensors that are the same on every side."""

    def __init__(
        self, row: str, changes: dict[str, int], tokens: int = TOKENS, width: int = WIDTH
    ) -> None:
        import torch

        from kernels.attention import document_bounds, hopper
        from kernels.attention.hopper import plan

        kind, D, S = row.split()[0], *map(int, row.split()[1:])
        torch.manual_seed(1)
        size = (tokens // S, S, width // D, D)
        q, k, v, d_out = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        call: dict[str, Any] = dict(causal=kind != "full", scale=D**-0.5)
        if kind == "documents":
            starts = torch.rand(size[:2], device="cuda") < 1 / MEAN_LENGTH
            call["bounds"] = document_bounds(starts.cumsum(1).to(torch.int32))
        tiles: list[Any] = [None, None]
        if changes:
            from dataclasses import replace

            options = plan.Options(call["causal"], call["scale"], documents="bounds" in call)
            tiles = [plan.forward_tile(q, k, options), plan.backward_tile(q, k, options)]
            for name, value in changes.items():
                i = 0 if name.startswith("forward.") else 1
                tiles[i] = replace(tiles[i], **{name.removeprefix("forward."): value})
        self.forward = lambda: hopper.forward(q, k, v, tile=tiles[0], **call)
        out, lse = self.forward()
        self.backward = lambda: hopper.backward(
            d_out, None, q, k, v, out, lse, tile=tiles[1], **call
        )

    def measure(self, rounds: int) -> list[float]:
        """Without rounds a sample of all gradients, else milliseconds of both passes."""
        import triton

        if rounds == 0:
            flat = [x.flatten()[:: x.numel() // 1000].float() for x in self.backward()]
            return [value for x in flat for value in (x / x.norm()).tolist()]
        return [
            triton.testing.do_bench(run, warmup=4, rep=15, return_mode="median")
            for run in (self.forward, self.backward)
        ]


def host(call: Call) -> dict[str, float]:
    """Microseconds of a call of either pass before the GPU is waited for."""
    import torch

    found = {}
    for name, run in (("forward", call.forward), ("backward", call.backward)):
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            run()
        found[name] = round((time.perf_counter() - start) / 200 * 1e6, 1)
        torch.cuda.synchronize()
    return found


if __name__ == "__main__":
    main()
