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

ROWS, WORDS = 7, 75
TILES = [
    Tile(block=8, warps=1),
    Tile(block=16, warps=1, programs=1, unroll=3),
    Tile(block=32, warps=1, programs=2, unroll=2),
    Tile(block=64, warps=1, programs=9),
    Tile(block=128, warps=1, programs=3, unroll=3),  # more than a row
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


@pytest.mark.parametrize("words", [50_304, 128_256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shipped_tiles_are_of_whole_loads_and_their_rows_fit_in_l2(
    dtype: torch.dtype, words: int
) -> None:
    tile = choose(torch.device("cuda"), dtype, words)
    assert tile.block * dtype.itemsize % (32 * tile.warps * 16) == 0  # 16 bytes a thread
    if dtype.itemsize == 2:
        in_flight = tile.programs * 132 * words * dtype.itemsize
        assert in_flight < 50 * 2**20 * 0.7  # other data pass through it, too
