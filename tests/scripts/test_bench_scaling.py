"""scripts/bench_scaling.py on the CPU: two layouts of a tiny model over gloo, its arithmetic."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = (
    "experiment=null model=gpt_tiny model.n_layers=2 model.vocabulary=128 data.sequence_length=32 "
    "data.batch_size=4 data.micro_batch_size=2 precision=fp32 data=random"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_scaling")


def test_layouts_run_one_after_the_other_and_have_one_loss(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    layouts = [
        "1 parallel=data", "parallel=tensor2 parallel.overlap=on", "parallel=fsdp",
        "parallel=data attention=hopper", "3 parallel=tensor2",
    ]  # fmt: skip
    run = subprocess.run(
        [
            *(sys.executable, str(SCRIPTS / "bench_scaling.py"), "--gpus", "2", "--config", TINY),
            *(word for layout in layouts for word in ("--layout", layout)),
            *("--steps", "1", "--warmup", "1", "--losses", "--json", str(path)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    one, *two, failed, refused = json.loads(path.read_text())["rows"]
    assert one["share"] == "100.0%"
    assert "CPU is not known" in one["not predicted"]
    for row in two:
        assert row["gpus"] == 2
        assert len(row["losses"]) == 2
        assert row["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert "hopper" in failed["error"]  # the ranks' own words
    assert "does not divide the 3 processes" in refused["error"]
    assert "losses differ by at most" in run.stdout
    assert "| parallel=fsdp | 2 |" in run.stdout


def test_what_fails_costs_no_other_case(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def until_failure(cases: list[list[str]], processes: int, _: object) -> Iterator[object]:
        starts.append(len(cases))
        for case in cases:
            yield {"case": case} if case else {"error": "no memory"}
            if not case:
                return

    monkeypatch.setattr(bench, "run_until_failure", until_failure)
    rows = list(bench.run_cases([["a"], [], ["b"], ["c"]], 2, None))
    assert rows == [{"case": ["a"]}, {"error": "no memory"}, {"case": ["b"]}, {"case": ["c"]}]
    assert starts == [4, 2]


def test_batches_follow_the_ranks_that_see_their_own_samples(bench: ModuleType) -> None:
    config = ["experiment=gpt_1.3b"]  # micro-batches of 8

    def batch(layout: str, gpus: int, micro_batches: int = 1) -> str:
        processes, words = bench.split_layout(layout, gpus)
        case = bench.case_of(config, words, processes, micro_batches, None)
        return next(word for word in reversed(case) if word.startswith("data.batch_size="))

    assert batch("parallel=tensor4", 4) == "data.batch_size=8"
    assert batch("parallel=fsdp", 4) == "data.batch_size=32"
    assert batch("parallel=fsdp", 4, 2) == "data.batch_size=64"
    assert batch("2 parallel=fsdp", 4) == "data.batch_size=16"
    assert batch("parallel=data parallel.pipeline=2", 4) == "data.batch_size=128"
    assert batch("parallel=fsdp data.batch_size=24", 4) == "data.batch_size=24"


def test_the_usual_layouts_all_pass_the_door(bench: ModuleType) -> None:
    for gpus in (1, 4):
        for layout in bench.usual_layouts(gpus):
            processes, words = bench.split_layout(layout, gpus)
            case = bench.case_of(["experiment=gpt_1.3b"], words, processes, 1, None)
            bench.load([*case, "trainer.steps=1"], processes)


def test_predictions_stand_beside_measurements(bench: ModuleType) -> None:
    words = bench.case_of(["experiment=gpt_1.3b"], ["parallel=tensor2"], 2, 1, None)
    told = bench.predicted(words, 2, "NVIDIA H200")
    rows = [
        {"gpus": 1, "tokens/s/GPU": 60_000, "peak GB": 48.0},
        {"gpus": 2, "tokens/s/GPU": 50_000, "peak GB": told["predicted GB"], **told},
        {"gpus": 2, "error": "out of memory"},
    ]
    bench.finish(rows)
    assert rows[1]["share"] == "83.3%"
    assert rows[1]["memory error"] == "+0.0%"
    assert rows[1]["speed error"] == f"{told['predicted tokens/s/GPU'] / 50_000 - 1:+.1%}"
