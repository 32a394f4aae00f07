import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runs.test_single_process import script

explain = script("explain_attention")
B, T, H, D = 2, 192, 3, 16


def inputs(length: int = T) -> list[Tensor]:
    return [torch.randn(B, length, H, D, requires_grad=True) for _ in range(3)]


def test_both_are_the_same_function() -> None:
    one = inputs()
    other = [x.detach().clone().requires_grad_() for x in one]
    ours, theirs = explain.fused(*one), explain.eager(*other)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, their in zip(one, other, strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


def test_what_eager_executes_moves_as_many_bytes_as_counted() -> None:
    size = explain.eager_traffic(B, T, H, D, 4)
    assert size == 4 * (6 * B * H * T * T + 6 * B * H * T * D)
    mask = 4 * T * T  # bytes of one made, cut (read, written) and read, for all heads
    copies = 4 * 6 * B * H * T * D  # PyTorch lays q, k and v of several sequences out as matrices
    assert explain.executed_traffic(B, T, H, D, torch.float32) == size + mask + copies
    alone = explain.eager_traffic(1, T, H, D, 4) + mask
    assert explain.executed_traffic(1, T, H, D, torch.float32) == alone


def test_fused_reads_what_it_must_and_keys_once_a_tile() -> None:
    must = 4 * 4 * B * H * T * D + 4 * B * H * T  # q, k, v, out, sums
    assert explain.fused_traffic(B, explain.TILE, H, D, 4) == must * explain.TILE // T
    assert explain.fused_traffic(B, T, H, D, 4) > must  # a second tile
    assert explain.fused_traffic(B, T, H, D, 4) < explain.eager_traffic(B, T, H, D, 4)


def test_memory_grows_with_the_square_for_eager_alone() -> None:
    def peak(compute: object, length: int) -> float:
        found = explain.measure(compute, inputs(length), 1)
        assert found is not None
        return float(found[0])

    assert 3.3 < peak(explain.eager, 512) / peak(explain.eager, 256) < 4.1
    assert peak(explain.fused, 512) / peak(explain.fused, 256) == pytest.approx(2, abs=0.2)


def test_the_trick_ends_with_the_exact_result(capsys: pytest.CaptureFixture[str]) -> None:
    explain.show_trick()
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "all at once" in x)
    ours, exact = line.replace(";", "").split("= ")[1].split(" all at once: ")
    assert ours == exact


def test_the_picture_has_what_was_counted_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.svg"
    monkeypatch.setattr("sys.argv", ["", "--lengths", "64,128", "--picture", str(picture)])
    assert explain.main() == 0
    assert len(re.findall(r">((?:counted|measured): [^<]*)<", picture.read_text())) == 3
    assert picture.read_text().count("<polyline") == 6
    assert "executed" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["", "--only", "trick", "--picture", str(picture)])
    assert explain.main() == 2
