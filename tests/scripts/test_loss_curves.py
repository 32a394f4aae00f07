"""scripts/loss_curves.py on run folders made by hand: what is read, meant and told."""

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "loss_curves.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_curves", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, rows: list[dict[str, Any]], why: str | None = "finished") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if why is not None:
        (folder / "ended.json").write_text(json.dumps({"why": why}))
    return folder


def test_a_step_trained_twice_counts_once(script: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 4.0},
        {"step": 2, "train/loss": 3.0, "perf/tokens_per_s": 10.0},
        {"step": 2, "validation/loss": 3.5},
        {"step": 2, "train/loss": 2.5, "perf/tokens_per_s": 30.0},
        {"step": 3, "train/loss": None},  # not finite
    ]
    read = script.read(write(tmp_path / "run", rows))
    assert read == {
        "loss": [(1, 4.0), (2, 2.5)],
        "validation": [(2, 3.5)],
        "tokens_per_s": 20,
    }


def test_only_a_run_that_reached_its_end_is_finished(script: ModuleType, tmp_path: Path) -> None:
    assert script.is_finished(write(tmp_path / "a", []))
    assert not script.is_finished(write(tmp_path / "b", [], "time limit"))
    assert not script.is_finished(write(tmp_path / "c", [], None))


def run_of(name: str, seed: int, level: float) -> dict[str, Any]:
    curve = [[step, level + 100 * (step <= 90)] for step in range(1, 101)]
    return {"name": name, "seed": seed, "loss": curve, "validation": [[50, 9.0], [100, level]],
            "tokens_per_s": 1000}  # fmt: skip


def test_the_table_means_the_last_tenth_over_the_seeds(script: ModuleType) -> None:
    runs = [run_of("bf16", 1, 2.0), run_of("fp8", 1, 2.0), run_of("bf16", 2, 4.0),
            run_of("fp8", 2, 4.3)]  # fmt: skip
    _, bf16, fp8 = script.table(runs)
    expected = "bf16 2 100 3.0000 ± 1.0000 +0.00% 3.0000 ± 1.0000 1,000"
    assert " ".join(bf16.split()) == expected
    assert fp8.split()[3:7] == ["3.1500", "±", "1.1500", "+5.00%"]


def test_finished_runs_are_read_and_a_spent_budget_trains_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trained: list[list[str]] = []

    def train(overrides: list[str], folder: Path, deadline: float, gpu: str | None) -> str:
        assert deadline > time.monotonic()
        trained.append(overrides)
        write(folder, [{"step": 1, "train/loss": 1.0}])
        return "finished"

    monkeypatch.setattr(script, "train", train)
    write(tmp_path / "a-1", [{"step": 1, "train/loss": 2.0}])
    arguments = ["loss_curves", "--common", "x=1 y=2", "--run", "a", "precision=bf16",
                 "--run", "b", "optimizer=muon", "--seeds", "1", "--folder", str(tmp_path),
                 "--json", str(tmp_path / "curves.json")]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*arguments, "--minutes", "0"])
    assert script.main() == 0
    assert not trained
    assert "b seed 1: no time left" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", arguments)
    assert script.main() == 0
    ((*given, name, folder, quiet),) = trained
    assert given == ["x=1", "y=2", "optimizer=muon", "seed=1"]
    assert (name, folder, quiet) == ("name=b-1", f"run_dir={tmp_path / 'b-1'}", "tracking=quiet")
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [(run["name"], run["loss"]) for run in curves["runs"]] == [
        ("a", [[1, 2.0]]),
        ("b", [[1, 1.0]]),
    ]


def test_curves_of_other_overrides_do_not_pass_for_these(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(overrides: list[str], folder: Path, deadline: float, gpu: str | None) -> str:
        write(folder, [{"step": 1, "train/loss": 1.0}])
        return "finished"

    monkeypatch.setattr(script, "train", train)
    given = ["loss_curves", "--folder", str(tmp_path), "--seeds", "1", "--run", "lr0.1"]
    monkeypatch.setattr("sys.argv", [*given, "optimizer.lr=0.1"])
    assert script.main() == 0
    assert script.main() == 0  # the same again
    monkeypatch.setattr("sys.argv", [*given, "optimizer.lr=0.2"])
    with pytest.raises(SystemExit, match=r"lr0\.1-1 is of `optimizer.lr=0.1` and not of `.*0.2`"):
        script.main()
    logs = {script.named(tmp_path / name, ".log") for name in ("lr0.1-1", "lr0.3-1")}
    assert len(logs) == 2


def test_jobs_share_the_gpus(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, taken = threading.Barrier(2), []

    def train(overrides: list[str], folder: Path, deadline: float, gpu: str | None) -> str:
        together.wait(10)  # or no other one runs
        taken.append(gpu)
        write(folder, [{"step": 1, "train/loss": 1.0}])
        return "finished"

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("sys.argv", [
        "loss_curves", "--run", "a", "x=1", "--run", "b", "x=2", "--seeds", "1", "2", "--jobs", "2",
        "--folder", str(tmp_path), "--json", str(tmp_path / "curves.json"),
    ])  # fmt: skip
    assert script.main() == 0
    assert sorted(taken) == ["3", "3", "5", "5"]
    runs = json.loads((tmp_path / "curves.json").read_text())["runs"]
    assert [(run["name"], run["seed"]) for run in runs] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_moving_means_start_short(script: ModuleType) -> None:
    assert script.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_runs(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(script, "run_all", lambda args: pytest.fail("it ran"))
    line = ["loss_curves", "--run", "a", "", "--plot", str(tmp_path / "a.svg")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "needs matplotlib: pip install matplotlib" in capsys.readouterr().err
