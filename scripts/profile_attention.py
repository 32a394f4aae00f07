"""What bounds the Hopper attention kernels: counters of Nsight Compute as one table.

    ncu --profile-from-start off --clock-control none --csv --page raw \
        --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        --section SchedulerStats --section WarpStateStats --section LaunchStats \
        python scripts/profile_attention.py > 4096.csv
    python scripts/profile_attention.py --table 4096=4096.csv 16384=16384.csv       # no GPU

Without arguments it runs forward and backward once at D = 64 and 128, causal and full, 4 x 4096
tokens, width 2048, inside the range that ncu profiles. `--variant 2x64` takes tiles of
hopper_variants.py. ncu runs a kernel alone, several times, behind flushed caches; the clock is left
to the card. What the table's columns count: parts/attention_counters.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from kernels.attention import hopper
from scripts.parts.attention_counters import read, table
from scripts.parts.hopper_variants import Shape, backward_variants, forward_variants


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", type=labelled, nargs="+", metavar="LENGTH=CSV",
        help="what ncu printed, and the tokens of a sequence then; print what it says",
    )  # fmt: skip
    parser.add_argument("--variant", default="shipped", help="name in hopper_variants.py")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    arguments = parser.parse_args()
    if arguments.table:
        lines = [line for at, path in arguments.table for line in read(path, shapes(at))]
        print(table(lines))
    else:
        run(arguments.length, arguments.variant)


def shapes(length: int) -> list[Shape]:
    """What a run profiles, in that order."""
    return [Shape(D, causal, length) for D in (64, 128) for causal in (True, False)]


def run(length: int, variant: str) -> None:
    """Each kernel once inside the profiled range, once before it."""
    for shape in shapes(length):
        size = (16384 // length, length, 2048 // shape.D, shape.D)
        q, k, v, d_out = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        call: dict[str, Any] = dict(causal=shape.causal, scale=shape.D**-0.5)
        one, two = forward_variants(shape), backward_variants(shape)

        def passes(
            given: tuple[Any, ...] = (q, k, v, d_out), call: dict[str, Any] = call,
            tiles: tuple[Any, Any] = (one.get(variant), two.get(variant)),
        ) -> None:  # fmt: skip
            q, k, v, d_out = given
            out, lse = hopper.forward(q, k, v, tile=tiles[0], **call)
            hopper.backward(d_out, None, q, k, v, out, lse, tile=tiles[1], **call)

        passes()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        passes()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def labelled(text: str) -> tuple[int, Path]:
    """LENGTH=CSV"""
    length, _, path = text.partition("=")
    return int(length), Path(path)


if __name__ == "__main__":
    main()
