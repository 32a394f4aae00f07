"""scripts/bench_generate.py at a tiny size: both sides draw the same text, and the cache is as
stated."""

import json
from pathlib import Path

import pytest

from tests.runs.test_single_process import script

CASE = (
    "experiment=null model=gpt_tiny position=gpt2 model.bias=true model.vocabulary=256 "
    "model.n_layers=1 model.d_model=32 model.init_std=0.2 precision=fp32 data.sequence_length=32"
)


def test_both_sides_draw_alike_and_the_cache_is_as_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "out.json"
    line = ["--case", CASE, "--batches", "1", "4", "--prompt", "6", "--tokens", "4"]
    monkeypatch.setattr("sys.argv", ["", *line, "--repeats", "1", "--json", str(out)])
    assert script("bench_generate").main() == 0
    *rows, cache = json.loads(out.read_text())["rows"]
    assert [(row["who"], row["batch"]) for row in rows] == [
        ("flashtrain", 1), ("flashtrain", 4), ("transformers sdpa", 1), ("transformers sdpa", 4),
    ]  # fmt: skip
    assert all(row["alike"] == 1 for row in rows)
    # k and v of one layer, four heads of 8, fp32
    assert cache["bytes/token stated"] == cache["measured"] == 2 * 32 * 4
    assert "transformers sdpa  batch 4" in capsys.readouterr().out


def test_a_case_that_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["", "--case", "model.n_heads=7"])
    assert script("bench_generate").main() == 2
    assert capsys.readouterr().err.count("\n") == 1
