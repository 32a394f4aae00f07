"""What Nsight Compute counted in the attention kernels, one line a launch.

All but L2 and DRAM are of the time in which a multiprocessor had a program (column busy), so an
idle end of a launch shows in `busy` alone. What the less obvious columns count:

    tensor  time in which the tensor cores work; x busy x GHz x 540,672 (132 multiprocessors x 4096
            operations) it is the rate with the work that masks hide, TFLOP/s is without
    shared  wavefronts of 128 bytes: operands that the tensor cores read, ordinary loads and stores,
            shuffles, copies out by the copy engine; not what the copy engine brings in
    banks   bytes read from and written to the memory behind it, copies in included. 100 % of each
            seem to be 256 bytes a clock. That, and what `shared` leaves out, is no documentation
            but arithmetic: so the counters meet the bytes that these kernels must move, to 6 %
    warps   of a multiprocessor that wait, by reason. Three warps of a block only fill up a
            warpgroup, and wait at a barrier from start to end
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.parts.hopper_variants import Shape

TIME = "gpu__time_duration.sum"
CLOCK = "gpc__cycles_elapsed.avg.per_second"
BUSY = ("sm__cycles_active.avg", "gpc__cycles_elapsed.avg")
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
COUNTERS = {
    "tensor": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "shared": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "banks r": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "banks w": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "issue": ISSUE,
    "xu": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",  # exponentials
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "alu": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")  # the reason in between
UNITS = {TIME: "ns", CLOCK: "hz"} | dict.fromkeys(COUNTERS.values(), "%")
KERNELS = {  # in the order of a call's launches: name in the CSV, in the table, times 4 B H S^2 D
    "attention_fwd_kernel": ("forward", 1.0),
    "prepare_rows_kernel": ("prepare", 0.0),
    "attention_bwd_kernel": ("backward", 2.5),
    "cast_dq_kernel": ("cast", 0.0),
}
SCHEDULERS = 4  # of a multiprocessor


@dataclass(frozen=True)
class Line:
    """One launch; shares in percent."""

    shape: Shape
    kernel: str
    seconds: float
    flops: float  # that count: 0 in the small kernels
    hertz: float
    busy: float
    shares: dict[str, float]  # by COUNTERS
    waiting: list[tuple[str, float]]  # (reason, warps of a multiprocessor), most of them first


def read(path: Path, shapes: list[Shape]) -> list[Line]:
    """The launches of `shapes` in the CSV that ncu printed, four of each.

    Raises:
        ValueError: other launches than these, a counter that is not there or in another unit.
    """
    lines = path.read_text().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f'{path}: no line starts with "ID"; was it ncu --csv --page raw?')
    units, *rows = csv.DictReader(lines[start:])
    for name in (*BUSY, *UNITS):
        if name not in units:
            raise ValueError(f"{path}: counter {name} is missing")
    for name, unit in UNITS.items():
        if units[name] != unit:
            raise ValueError(f"{path}: {name} is in {units[name]}, not in {unit}")
    found = [row["Kernel Name"].split("(")[0] for row in rows]
    if found != list(KERNELS) * len(shapes):
        raise ValueError(
            f"{path}: {len(found)} launches, {', '.join(found[:5])} ..., not {len(shapes)} times "
            f"{', '.join(KERNELS)}"
        )
    return [_line(row, shapes[i // len(KERNELS)], found[i]) for i, row in enumerate(rows)]


def _line(row: dict[str, str], shape: Shape, kernel: str) -> Line:
    busy = _number(row[BUSY[0]]) / _number(row[BUSY[1]])
    shares = {}
    for column, name in COUNTERS.items():
        whole = name.startswith("l1tex")  # counted over the idle time too
        shares[column] = _number(row[name]) / (busy if whole else 1.0)
    waiting = []
    for name, value in row.items():
        if name.startswith(STALL[0]) and name.endswith(STALL[1]):
            reason = name.removeprefix(STALL[0]).removesuffix(STALL[1])
            if reason != "selected":  # it issues
                warps = _number(value) * _number(row[ISSUE]) / 100 * SCHEDULERS
                waiting.append((reason, warps))
    waiting.sort(key=lambda pair: -pair[1])
    name, products = KERNELS[kernel]
    seconds = _number(row[TIME]) * 1e-9
    return Line(
        shape, name, seconds, products * shape.flops, _number(row[CLOCK]), 100 * busy, shares,
        waiting,
    )  # fmt: skip


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def table(lines: list[Line]) -> str:
    """The lines under each other, with the two reasons for which most warps wait."""
    head = ["shape", "kernel", "us", "TFLOP/s", "GHz", "busy", *COUNTERS, "warps that wait"]
    cells = [head]
    for line in lines:
        rate = f"{line.flops / line.seconds / 1e12:.0f}" if line.flops else ""
        cells.append([
            line.shape.name, line.kernel, f"{line.seconds * 1e6:.1f}", rate,
            f"{line.hertz / 1e9:.2f}", f"{line.busy:.1f}",
            *(f"{share:.1f}" for share in line.shares.values()),
            ", ".join(f"{reason} {warps:.1f}" for reason, warps in line.waiting[:2]),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(_row(row, widths) for row in cells)


def _row(row: list[str], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    left: dict[int, Any] = {0: str.ljust, 1: str.ljust, len(row) - 1: str.ljust}
    parts = [
        left.get(i, str.rjust)(cell, width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()
