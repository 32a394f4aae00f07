"""A whole small run in this process: train, look at what it left, sample from it, report on it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.door import admit
from flashtrain.train import train

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))
    vectors = folder / "vectors.txt"
    vectors.write_text("\n".join(f"{letter} " + " ".join(["0.5"] * 32) for letter in "abcdef"))
    config: Config = load(
        [
            "data=shards", f"data.path={folder}/tokens", "data.sequence_length=32",
            "data.batch_size=8", "data.micro_batch_size=4", "model.d_model=32", "model.n_layers=1",
            "trainer.steps=12", "trainer.log_every=4", "trainer.evaluate_every=6",
            "trainer.evaluate_sequences=4", "trainer.sample_every=6", "trainer.sample_tokens=5",
            "checkpoint.every=6", "optimizer.lr=1e-2", "schedule.warmup_steps=2",
            "tracking.wandb.mode=offline", f"run_dir={folder}/run", f"model.word_vectors={vectors}",
        ]
    )  # fmt: skip
    train(admit(config, 1, 1), torch.device("cpu"))
    return folder / "run"


def test_a_run_leaves_metrics_samples_config_and_checkpoints(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    held_out = [row["step"] for row in rows if "validation/loss" in row]
    assert list(trained) == [4, 8, 12]
    assert trained[12] < trained[4]
    assert held_out == [6, 12]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "config.json").read_text())["trainer"]["steps"] == 12
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000012",
    ]
    assert list((run / "wandb").glob("offline-run-*"))


def test_generate_goes_on_from_the_prompt_and_repeats_with_the_seed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = script("generate")
    arguments = [f"run={run}", "prompt=the qu", "tokens=8", "seed=3"]
    assert generate.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("the qu")
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run=/nowhere"], "/nowhere"),
        (["prompt=x"], "run="),
        (["run=x", "top_k=many"], "top_k=many"),
        (["run=x", "min_p=2"], "min_p=2"),
        (["run=x", "tokens=-300"], "tokens=-300"),
        (["run=x", "end=maybe"], "end=maybe"),
        (["run=x", "promt=y"], "promt=y"),
        (["run=x", "--fast"], "--fast"),
    ],
)
def test_generate_refuses_in_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("generate").main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_report_is_one_page_with_the_curves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("report").main([str(run)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert page.count("<polyline") >= 4  # loss, validation loss, rate, norm
    assert "http" not in page.replace("http://www.w3.org", "")
