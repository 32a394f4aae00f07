"""scripts/bench_scaling.py on the CPU: two layouts of a tiny model over gloo, its arithmetic."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
        "parallel=data", "parallel=tensor2 parallel.overlap=on",
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
    data, tensor, failed, refused = json.loads(path.read_text())["rows"]
    assert "CPU is not known" in data["not predicted"]
    assert data["gpus"] == 2
    assert len(data["losses"]) == 2
    assert tensor["losses"] == pytest.approx(data["losses"], rel=1e-5)
    assert "hopper" in failed["error"]  # the ranks' own words
    assert "does not divide the 3 processes" in refused["error"]
    assert "losses differ by at most" in run.stdout
    assert "| parallel=tensor2 parallel.overlap=on | 2 |" in run.stdout


def test_what_fails_costs_no_other_case(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Any = importlib.import_module("scripts.parts.scaling_runs")
    starts = []

    def until_failure(cases: list[list[str]], *_: object) -> Iterator[object]:
        starts.append(len(cases))
        for case in cases:
            yield {"case": case} if case else {"error": "no memory"}
            if not case:
                return

    monkeypatch.setattr(runs, "run_until_failure", until_failure)
    rows = list(runs.run_cases([["a"], [], ["b"], ["c"]], 2, None))
    assert rows == [{"case": ["a"]}, {"error": "no memory"}, {"case": ["b"]}, {"case": ["c"]}]
    assert starts == [4, 2]


def test_what_leaves_gpus_runs_beside_others_where_asked(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Any = importlib.import_module("scripts.parts.scaling_runs")
    started = []

    def run_cases(cases: list[list[str]], gpus: int, _: object, visible: str = "") -> Iterator[Any]:
        started.append((gpus, visible, len(cases)))
        yield from ({"case": " ".join(case)} for case in cases)

    monkeypatch.setattr(runs, "run_cases", run_cases)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    names = ["4 a", "1 b", "2 c", "1 d", "2 engine=deepspeed", "1 e", "1 f", "1 g"]
    rows = [{"case": name, "gpus": int(name[0])} for name in names]
    options = SimpleNamespace(gpus=4, together=True)
    for row, found in runs.measured(rows, options):
        assert found == {"case": row["case"]}
    assert sorted(started[:4]) == [(1, "4", 2), (1, "5", 1), (1, "6", 1), (1, "7", 1)]
    assert started[4:] == [(2, "", 1), (2, "", 1), (4, "", 1)]


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
    assert batch("parallel=fsdp data.batch_size=96", 4) == "data.batch_size=96"


def test_the_usual_layouts_and_the_lists_all_pass_the_door(bench: ModuleType) -> None:
    options = SimpleNamespace(gpus=4, micro_batches=1, also="", losses=False)
    options.cases = [("experiment=gpt_1.3b", [])]
    rows = bench.planned(options)
    for gpus, name in ((2, "two_gpus.txt"), (4, "four_gpus.txt")):
        parser = bench.Parser()
        for option in ("--config", "--layout"):
            parser.add_argument(option, action=bench.Case, dest="cases")
        options.cases = parser.parse_args([f"@{SCRIPTS / 'scaling' / name}"]).cases
        options.gpus = gpus
        rows += bench.planned(options)
    assert len(rows) > 40
    assert not [row for row in rows if "error" in row]


def test_predictions_stand_beside_measurements(bench: ModuleType) -> None:
    words = bench.case_of(["experiment=gpt_1.3b"], ["parallel=tensor2"], 2, 1, None)
    told = bench.predicted(words, 2, "NVIDIA H200")
    rows = [
        {"config": "a", "gpus": 1, "tokens/s/GPU": 60_000, "peak GB": 48.0},
        {"config": "a", "gpus": 2, "tokens/s/GPU": 50_000, "peak GB": told["predicted GB"], **told},
        {"config": "b", "gpus": 2, "tokens/s/GPU": 50_000, "peak GB": 48.0},
    ]
    bench.finish(rows)
    assert rows[1]["share"] == "83.3%"
    assert rows[1]["memory error"] == "+0.0%"
    assert "share" not in rows[2]
    assert rows[1]["speed error"] == f"{told['predicted tokens/s/GPU'] / 50_000 - 1:+.1%}"
