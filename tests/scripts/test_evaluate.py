"""scripts/evaluate.py on a run of random weights."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.config import to_dict
from flashtrain.data.tokenizer import train_bpe
from flashtrain.launch import ENDED
from flashtrain.parallel.mesh import SINGLE
from tests.runs.test_single_process import script

TEXT = "the quick brown fox jumps over the lazy dog. "


def save(folder: Path, step: int) -> None:
    config = load(
        ["data=random", "precision=fp32", "model.vocabulary=384", "model.d_model=32",
         "model.n_layers=1", "data.sequence_length=16", f"seed={step}"]
    )  # fmt: skip
    model = build_model(config, SINGLE, torch.device("cpu"))
    meta = {"config": to_dict(config)}
    checkpoint.save(folder / "checkpoints", step, checkpoint.collect(model), meta)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(tmp_path, 10)
    train_bpe([TEXT] * 20, 290).save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(TEXT * 5)
    (tmp_path / "b.txt").write_text("größer 🙂 " * 9)
    return tmp_path


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return int(script("evaluate").main())


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_texts_are_scored_and_recorded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--text", run / "a.txt", "--text", run / "b.txt"]
    assert ask(monkeypatch, run, *texts, "--stride", 4) == 0
    out = capsys.readouterr().out
    first, second = rows(run)
    assert (first["step"], first["text"]) == (10, str(run / "a.txt"))
    assert f"{first['loss']:.4f}" in out
    # weights of 0.02 know nothing: about the logarithm of the vocabulary
    assert first["loss"] == pytest.approx(math.log(384), abs=0.1)
    assert second["tokens"] > 9  # type: ignore[operator]


def test_a_run_is_followed_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = script("evaluate")

    def wait(seconds: float) -> None:
        save(run, 20)
        (run / ENDED).write_text("{}")

    monkeypatch.setattr(evaluate.time, "sleep", wait)
    monkeypatch.setattr(sys, "argv", ["", str(run), "--text", str(run / "a.txt"), "--follow"])
    assert evaluate.main() == 0
    assert [row["step"] for row in rows(run)] == [10, 20]
    assert rows(run)[0]["loss"] != rows(run)[1]["loss"]


@pytest.mark.parametrize("name", ["nowhere", "checkpoints/step-00000010"])
def test_what_will_have_no_checkpoints_is_not_waited_for(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    assert ask(monkeypatch, run / name, "--text", run / "a.txt", "--follow") == 2
    assert f"{name} is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to evaluate on"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--text", "a.txt", "--stride", "17"], "stride of 17 must lie between 1 and 16"),
        (["--text", "a.txt", "--stride", "0"], "--stride 0 must be 1 or more"),
        (["--text", "a.txt", "--batch-size", "-1"], "--batch-size -1 must be 1 or more"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    run: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    assert ask(monkeypatch, run, *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_the_package_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(monkeypatch, run, "--tasks", "arc_easy") == 2
    assert "pip install 'flashtrain[lm-eval]'" in capsys.readouterr().err
