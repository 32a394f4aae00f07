"""The row kernel gives what plain PyTorch gives, whatever its tile."""

import importlib
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from kernels.linear_cross_entropy import rows_torch
from kernels.linear_cross_entropy.problem import Terms
from kernels.linear_cross_entropy.tiles import PADDING, Tile, choose
from tests.kernels.interpreter import Platform
from tests.kernels.linear_cross_entropy.kept import check_kept

ROWS, WORDS = 7, 75
TILES = [
    Tile(block=8, warps=1),
    Tile(block=16, warps=1, programs=1, unroll=3),
    Tile(block=32, warps=1, programs=2, unroll=2),
    Tile(block=64, warps=1, programs=9),
    Tile(block=128, warps=1, programs=3, unroll=3),  # more than a row
]
REGISTERS = [
    Tile(block=16, warps=1, programs=3, keeps="registers"),
    Tile(block=64, warps=1, programs=1, keeps="registers"),
    Tile(block=128, warps=1, programs=9, keeps="registers"),
]
MODES = {"both": (True, True), "loss": (True, False), "gradient": (False, True)}
TERMS = Terms(ignore_index=-100, softcap=3.0, z_loss=0.02, first_word=10)


def problem(platform: Platform) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer of padded rows and one row behind them, labels, statistics."""
    padded = -(-WORDS // PADDING) * PADDING
    buffer = (3 * torch.randn(ROWS + 1, padded, device=platform.device)).to(platform.dtype)
    labels = torch.randint(TERMS.first_word, TERMS.first_word + WORDS, (ROWS,))
    labels[2], labels[4], labels[5] = -100, 3, 10 + WORDS  # ignored, and words of other shards
    return buffer, labels.to(platform.device), torch.zeros(2, ROWS, device=platform.device)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, astuple(tile))))
@pytest.mark.parametrize("mode", MODES)
def test_any_tile_gives_the_rows_of_pytorch(mode: str, tile: Tile, platform: Platform) -> None:
    rows_triton = importlib.import_module("kernels.linear_cross_entropy.rows_triton")
    measures, differentiates = MODES[mode]
    buffer, labels, statistics = problem(platform)
    expected, theirs = buffer[:ROWS, :WORDS].clone(), statistics.clone()
    rows_torch.measure(expected, labels, theirs, TERMS)
    if not measures:
        statistics.copy_(theirs)
    behind, before = buffer[ROWS:].clone(), expected.clone()
    if differentiates:
        rows_torch.differentiate(expected, labels, theirs, TERMS)
    rows_triton.launch(
        buffer[:ROWS, :WORDS], labels, statistics, TERMS,
        measures=measures, differentiates=differentiates, tile=tile,
    )  # fmt: skip
    ours = buffer[:ROWS, :WORDS]
    torch.testing.assert_close(statistics, theirs, rtol=1e-5, atol=1e-5)
    assert (statistics[:, 2] == 0).all()
    if differentiates:
        rounding = torch.finfo(platform.dtype).eps
        torch.testing.assert_close(ours, expected, rtol=2 * rounding, atol=1e-5)
        assert ours[2].count_nonzero() == 0
    else:
        assert torch.equal(ours, before)
    assert torch.equal(buffer[ROWS:], behind)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("tile", REGISTERS, ids=lambda tile: f"{tile.block}-{tile.programs}")
def test_rows_kept_in_registers_are_those_of_pytorch(
    tile: Tile, softcap: float, platform: Platform
) -> None:
    """In bf16, which the interpreter rounds towards 0."""
    rows_triton = importlib.import_module("kernels.linear_cross_entropy.rows_triton")
    check_kept(rows_triton.launch, WORDS, torch.bfloat16, softcap, platform.device, tile=tile)


@pytest.mark.parametrize(
    ("words", "dtype", "measures"),
    [(75, torch.float32, True), (75, torch.bfloat16, False), (57345, torch.bfloat16, True)],
)
def test_rows_that_nothing_keeps_are_refused(
    words: int, dtype: torch.dtype, measures: bool, platform: Platform
) -> None:
    rows_triton = importlib.import_module("kernels.linear_cross_entropy.rows_triton")
    logits = torch.zeros(1, -(-words // PADDING) * PADDING, dtype=dtype, device=platform.device)
    labels = torch.zeros(1, dtype=torch.int64, device=platform.device)
    statistics = torch.zeros(2, 1, device=platform.device)
    with pytest.raises(ValueError, match=f"cannot keep rows of {words} words"):
        rows_triton.launch(
            logits[:, :words], labels, statistics, TERMS,
            measures=measures, differentiates=True, tile=REGISTERS[0],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shipped_tiles_are_of_whole_loads_and_their_rows_fit_in_l2(dtype: torch.dtype) -> None:
    tile = choose(torch.device("cuda"), dtype)
    assert tile.block * dtype.itemsize % (32 * tile.warps * 16) == 0  # 16 bytes a thread
    if dtype.itemsize == 2:
        in_flight = tile.programs * 132 * 50304 * dtype.itemsize
        assert in_flight < 50 * 2**20 * 0.6  # other data pass through it, too
