"""A run that measures itself on texts and tasks while it trains."""

import importlib.util
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.benchmark import as_metrics
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.door import admit
from flashtrain.train import train
from tests.flashtrain.integrations.test_lm_eval import write_tasks
from tests.harness import run_ranks
from tests.runs.test_single_process import script

FOX = "the quick brown fox jumps over the lazy dog\n\n"
LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards, a text beside them, tasks of lm-eval's."""
    made = tmp_path_factory.mktemp("data")
    (made / "text.txt").write_text(FOX * 300)
    (made / "fox.txt").write_text(FOX * 4)
    prepare([made / "text.txt"], made / "tokens", Recipe("bytes", validation_share=0.2))
    write_tasks(made)
    return made


def config(folder: Path, run: Path, *overrides: str, world: int = 1) -> Config:
    return load(
        [
            "experiment=null", "data=shards", f"data.path={folder}/tokens",
            "data.sequence_length=32", "data.batch_size=4", "data.micro_batch_size=4",
            "model.d_model=32", "model.n_layers=1", "precision=fp32", "trainer.steps=5",
            "trainer.log_every=1", "trainer.evaluate_sequences=4", "optimizer.lr=1e-2",
            "trainer.compile=false", "tracking=quiet", "trainer.benchmark.every=2",
            f"run_dir={run}", *overrides,
        ],
        world,
    )  # fmt: skip


def logged(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def test_texts_are_measured_at_intervals_as_evaluate_does_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    text = f"trainer.benchmark.texts=[{folder}/fox.txt]"
    train(admit(config(folder, run, text), 1, 1), torch.device("cpu"))
    found = logged(run, "benchmark/fox.txt/perplexity")
    assert list(found) == [2, 4, 5]
    assert found[5] < found[2]
    monkeypatch.setattr("sys.argv", ["", str(run), "--text", str(folder / "fox.txt")])
    assert script("evaluate").main() == 0
    row = json.loads((run / "evaluations.jsonl").read_text())
    assert row["step"] == 5
    assert row["perplexity"] == pytest.approx(found[5], rel=1e-6)


def test_tensor_ranks_measure_the_same_and_training_does_not_notice(
    folder: Path, tmp_path: Path
) -> None:
    texts = f"trainer.benchmark.texts=[{folder}/fox.txt]"
    one, two = tmp_path / "one", tmp_path / "two"
    train(admit(config(folder, one), 1, 1), torch.device("cpu"))
    split = admit(config(folder, two, texts, "parallel=tensor2", world=2), 2, 1)
    run_ranks(train, 2, tmp_path, split, torch.device("cpu"))
    losses = logged(one, "train/loss")
    assert list(losses) == [1, 2, 3, 4, 5]
    assert logged(two, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert list(logged(two, "benchmark/fox.txt/perplexity")) == [2, 4, 5]


def test_texts_of_one_name_are_told_apart() -> None:
    rows = [{"text": text, "perplexity": n} for n, text in enumerate(("a/x.txt", "b/x.txt", "b/y"))]
    assert as_metrics([*rows, {"task": "x.txt", "acc": 0.5}]) == {
        "benchmark/a/x.txt/perplexity": 0,
        "benchmark/b/x.txt/perplexity": 1,
        "benchmark/y/perplexity": 2,
        "benchmark/x.txt/acc": 0.5,
    }


def test_a_benchmark_that_fails_costs_a_warning_and_no_random_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        random.seed(0)
        torch.manual_seed(0)
        raise OSError("no network")

    monkeypatch.setattr("flashtrain.hooks.on_tasks", fail)
    state = torch.get_rng_state(), random.getstate()
    texts = f"trainer.benchmark.texts=[{folder}/fox.txt]"
    with caplog.at_level(logging.WARNING):
        train(admit(config(folder, tmp_path, texts), 1, 1), torch.device("cpu"))
    said = [r.getMessage() for r in caplog.records if r.name == "flashtrain.hooks"]
    assert said[0] == "the benchmark after step 2 failed: OSError: no network"
    assert len(said) == 3
    assert list(logged(tmp_path, "train/loss")) == [1, 2, 3, 4, 5]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.skipif(not LM_EVAL, reason="lm-eval is not installed")
def test_tasks_are_measured_at_intervals(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = [
        "trainer.benchmark.tasks=[choices,answers]",
        f"trainer.benchmark.task_folder={folder}",
        "trainer.benchmark.limit=2",
    ]
    split = config(folder, tmp_path / "run", *tasks, "parallel=tensor2", world=2)
    admitted = admit(split, 2, 1)
    # importing lm-eval and reading its list of tasks takes 10 s and more
    run_ranks(train, 2, tmp_path, admitted, torch.device("cpu"), limit=180)
    for key in ("benchmark/choices/acc", "benchmark/answers/exact_match"):
        found = logged(tmp_path / "run", key)
        assert list(found) == [2, 4, 5]
        assert all(value in (0.0, 0.5, 1.0) for value in found.values())
    with pytest.raises(ConfigError, match="lm-eval knows no task arc_esay"):
        admit(config(folder, tmp_path, "trainer.benchmark.tasks=[arc_esay]"), 1, 1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.benchmark.texts=[nowhere.txt]"], r"text nowhere\.txt cannot be read"),
        (["trainer.benchmark.texts=[README.md]", "data=random", "model.vocabulary=64"],
         r"the data has no tokenizer"),
        (["trainer.benchmark.every=0"], r"benchmark\.every=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_the_door(
    folder: Path, tmp_path: Path, overrides: list[str], sentence: str, monkeypatch: Any
) -> None:
    (tmp_path / "README.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        admit(config(folder, tmp_path, *overrides), 1, 1)


@pytest.mark.skipif(LM_EVAL, reason="lm-eval is installed")
def test_tasks_without_the_package_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'flashtrain\[lm-eval\]'"):
        admit(config(folder, tmp_path, "trainer.benchmark.tasks=[arc_easy]"), 1, 1)
