"""What the kernels that keep a row must give: the rows of plain PyTorch."""

from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.linear_cross_entropy import rows_torch
from kernels.linear_cross_entropy.problem import Terms
from kernels.linear_cross_entropy.tiles import PADDING

ROWS = 7


class Launch(Protocol):
    def __call__(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms, **more: Any
    ) -> None: ...


def check_kept(
    launch: Launch, words: int, dtype: torch.dtype, softcap: float, device: str, **more: Any
) -> None:
    """Seven rows, two of them ignored, one of which holds NaN: it must not be read."""
    terms = Terms(ignore_index=-100, softcap=softcap, z_loss=0.02, first_word=10)
    padded = -(-words // PADDING) * PADDING
    buffer = (3 * torch.randn(ROWS + 1, padded, device=device)).to(dtype)
    labels = torch.randint(10, 10 + words, (ROWS,), device=device)
    labels[2] = labels[3] = -100
    labels[4], labels[5] = 3, 10 + words  # words of other shards
    buffer[3], buffer[:, words:] = float("nan"), float("nan")
    statistics = torch.zeros(2, ROWS, device=device)
    expected, theirs = buffer[:ROWS, :words].clone(), statistics.clone()
    rows_torch.measure_and_differentiate(expected, labels, theirs, terms)
    behind = buffer[ROWS:, :words].clone()
    launch(
        buffer[:ROWS, :words], labels, statistics, terms,
        measures=True, differentiates=True, **more,
    )  # fmt: skip
    torch.testing.assert_close(statistics, theirs, rtol=1e-5, atol=1e-5)
    assert (statistics[:, 2:4] == 0).all()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(buffer[:ROWS, :words], expected, rtol=2 * rounding, atol=1e-5)
    assert buffer[2:4, :words].count_nonzero() == 0
    assert torch.equal(buffer[ROWS:, :words], behind)
