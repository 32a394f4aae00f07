"""The table of what Nsight Compute counted, from a CSV made by hand."""

import csv
from pathlib import Path

import pytest

from scripts.parts.attention_counters import (
    BUSY,
    CLOCK,
    COUNTERS,
    KERNELS,
    STALL,
    TIME,
    read,
    table,
)
from scripts.parts.hopper_variants import Shape

SHAPES = [Shape(64, True, 1024), Shape(128, False, 1024)]
LAUNCHES = list(KERNELS) * len(SHAPES)
REASONS = {"selected": "1.00", "wait": "1.50", "barrier": "2.00", "gmma": "0.25"}
# name: (unit, value) of every launch
COUNTED = {
    TIME: ("ns", "1,000,000"),
    CLOCK: ("hz", "1,500,000,000.00"),
    BUSY[0]: ("cycle", "900"),
    BUSY[1]: ("cycle", "1,000"),
    **dict.fromkeys(COUNTERS.values(), ("%", "45.00")),
    **{reason.join(STALL): ("inst", value) for reason, value in REASONS.items()},
}


def printed(
    folder: Path, launches: list[str], counted: dict[str, tuple[str, str]] = COUNTED
) -> Path:
    """A CSV as ncu prints it: lines before it, names, units, a row per launch."""
    path = folder / "counters.csv"
    with path.open("w") as file:
        file.write("==PROF== Connected to process 1\n")
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["ID", "Kernel Name", *counted])
        writer.writerow(["", "", *(unit for unit, _ in counted.values())])
        for i, kernel in enumerate(launches):
            writer.writerow([i, f"{kernel}(void)", *(value for _, value in counted.values())])
    return path


def test_a_line_says_which_launch_and_how_fast(tmp_path: Path) -> None:
    lines = read(printed(tmp_path, LAUNCHES), SHAPES)
    assert [(line.shape, line.kernel) for line in lines] == [
        (shape, kernel) for shape in SHAPES for kernel, _ in KERNELS.values()
    ]
    forward, prepare, backward, _ = lines[4:]
    assert forward.seconds == pytest.approx(1e-3)
    # 4 B H S^2 D of 16 sequences of 1024 tokens and 16 heads
    assert forward.flops == 4 * 16 * 16 * 1024**2 * 128
    assert backward.flops == 2.5 * forward.flops
    assert prepare.flops == 0
    assert lines[0].flops == forward.flops / 2  # causal: half of it
    assert forward.hertz == 1.5e9


def test_idle_multiprocessors_show_in_one_column_alone(tmp_path: Path) -> None:
    line = read(printed(tmp_path, LAUNCHES), SHAPES)[0]
    assert line.busy == pytest.approx(90)
    assert line.shares["tensor"] == 45  # ncu counts it so already
    assert line.shares["shared"] == pytest.approx(50)
    assert line.shares["L2"] == 45


def test_warps_that_wait(tmp_path: Path) -> None:
    line = read(printed(tmp_path, LAUNCHES), SHAPES)[0]
    reasons, warps = zip(*line.waiting, strict=True)
    assert reasons == ("barrier", "wait", "gmma")  # the ones selected do not wait
    assert warps == pytest.approx([2 * 0.45 * 4, 1.5 * 0.45 * 4, 0.25 * 0.45 * 4])


def test_the_table_has_a_line_a_launch(tmp_path: Path) -> None:
    head, first, *others = table(read(printed(tmp_path, LAUNCHES), SHAPES)).split("\n")
    assert len(others) == 7
    # 4 * 16 * 32 * 1024**2 * 64 / 2 operations in a millisecond
    assert first.split()[:5] == ["64", "causal", "1024", "forward", "1000.0"]
    assert first.split()[5:8] == ["69", "1.50", "90.0"]
    assert first.endswith("barrier 3.6, wait 2.7")
    assert head.index("warps that wait") == first.index("barrier")


def test_what_was_not_counted_so_is_refused(tmp_path: Path) -> None:
    without = {name: value for name, value in COUNTED.items() if name != TIME}
    with pytest.raises(ValueError, match=f"counter {TIME} is missing"):
        read(printed(tmp_path, LAUNCHES, without), SHAPES)
    with pytest.raises(ValueError, match=f"{TIME} is in us, not in ns"):
        read(printed(tmp_path, LAUNCHES, COUNTED | {TIME: ("us", "1")}), SHAPES)
    with pytest.raises(ValueError, match=r"7 launches, .* not 2 times attention_fwd_kernel"):
        read(printed(tmp_path, LAUNCHES[1:]), SHAPES)
    (tmp_path / "log").write_text("==ERROR== no permission")
    with pytest.raises(ValueError, match='no line starts with "ID"'):
        read(tmp_path / "log", SHAPES)
