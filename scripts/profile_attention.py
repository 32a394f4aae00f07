"""What bounds the Hopper attention kernels: counters of Nsight Compute as one table.

    ncu --profile-from-start off --clock-control none --csv --page raw \
        --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        --section SchedulerStats --section WarpStateStats --section LaunchStats \
        python scripts/profile_attention.py > counters.csv
    python scripts/profile_attention.py --table counters.csv          # no GPU

Without arguments it runs forward and backward once at D = 64 and 128, causal and full, 4 x 4096
tokens, width 2048, inside the range that ncu profiles. `--variant 2x64` takes tiles of
hopper_variants.py. Clocks stay as they are in use.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from kernels.attention import hopper
from scripts.parts.hopper_variants import Shape, backward_variants, forward_variants

# words in the counters' names, and what the column is called
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__inst_executed_pipe_tensor": "tensor",
    "sm__pipe_tensor": "tensor",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared": "shared wavefronts",
    "l1tex__data_bank": "shared banks",
    "l1tex__throughput": "L1 %",
    "lts__throughput": "L2 %",
    "gpu__dram_throughput": "DRAM %",
    "smsp__issue_active": "issue",
    "smsp__average_warps_issue_stalled": "stall",
    "smsp__average_warp_latency_issue_stalled": "stall",
    "smsp__cycles_active.avg": "cycles",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, help="what ncu printed; print what it says")
    parser.add_argument("--variant", default="shipped", help="name in hopper_variants.py")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
    else:
        run(arguments.length, arguments.variant)


def run(length: int, variant: str) -> None:
    """Each kernel once inside the profiled range, once before it."""
    for D in (64, 128):
        for causal in (True, False):
            shape = Shape(D, causal, length)
            size = (16384 // length, length, 2048 // D, D)
            q, k, v, d_out = (
                torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4)
            )
            call: dict[str, Any] = dict(causal=causal, scale=D**-0.5)
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


def table(path: Path) -> None:
    """One block per kernel: every counter that COUNTERS has a word for."""
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    rows = list(csv.DictReader(lines[start:]))
    units = rows.pop(0)
    for row in rows:
        print(f"\n{row['Kernel Name'].split('(')[0]} (launch {row['ID']})")
        for name, value in row.items():
            word = next((word for word in COUNTERS if name.startswith(word)), None)
            if word is not None and value:
                print(f"  {COUNTERS[word]:18s} {value:>14s} {units[name]:8s} {name}")


if __name__ == "__main__":
    main()
