"""scripts/plan.py as a user calls it."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LLAMA = ["model=llama_8b", "gpus=16", "gpu=h100", "parallel.tensor=2", "data.micro_batch_size=1"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("plan")


def call(plan: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    status: int = plan.main()
    return status


def test_layouts_come_with_memory_by_part_and_speed(
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "plan.json"
    assert call(plan, monkeypatch, *LLAMA, "--top", "2", "--json", str(path)) == 0
    said = capsys.readouterr().out
    assert "llama_8b: 8.03 billion parameters, 512 x 8192 tokens a step" in said
    assert "weights" in said and "optimizer" in said and "tensor" in said
    assert re.search(
        r"recompute: none \d+\.\d, light \d+\.\d, selective \d+\.\d, full \d+\.\d", said
    )
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2
    assert all("parallel.tensor=2" in row["layout"] for row in rows)
    assert rows[0]["tokens/s"] >= rows[1]["tokens/s"]


def test_what_does_not_fit_is_said_with_both_numbers(
    plan: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(plan, monkeypatch, "model=llama_70b", "gpus=4", "parallel.tensor=4") == 1
    assert re.search(
        r"nothing fits: the smallest layout needs 2\d\d\.\d GB of 81\.2", capsys.readouterr().out
    )


def test_measured_rows_stand_beside_their_prediction(
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    case = "experiment=gpt_1.3b data.sequence_length=2048 data.batch_size=8"
    row = {"case": f"{case} data.micro_batch_size=8", "world": 1}
    report = {
        "environment": {"gpu": "NVIDIA H200"},
        "rows": [
            {**row, "tokens/s": 62511, "peak GB": 48.3},
            {"case": "a", "error": "out of memory"},
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert call(plan, monkeypatch, "--measured", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    speed = next(line.split() for line in lines if "tokens/s" in line)
    assert speed[1] == "62,511.0"
    assert abs(float(speed[3].rstrip("%"))) < 15
    for other in ("{", '{"runs": []}', '{"environment": {"gpu": "NVIDIA H200"}, "rows": [{}]}'):
        path.write_text(other)
        assert call(plan, monkeypatch, "--measured", str(path)) == 2
        assert f"{path} is not what scripts/bench_train.py --json writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=h1000", "model=llama_8b"], "gpu=h1000 is not known"),
        (["gpus=two"], "gpus=two must be a whole number"),
        (["model=llama_8b", "model.n_layer=3"], "n_layer"),
        (["model=llama_8b", "precision=fp32"], "bf16 only"),
    ],
)
def test_mistakes_are_one_sentence(
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    assert call(plan, monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_scaling_is_drawn(
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    scaling = importlib.import_module("flashtrain.planning.scaling").scaling
    monkeypatch.setattr(plan, "scaling", lambda *words: scaling(*words, most=4))
    path = tmp_path / "scaling.png"
    words = ["model=gpt_1.3b", "parallel.pipeline=1", "data.micro_batch_size=4"]
    assert call(plan, monkeypatch, *words, "--scaling", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "strong scaling" in capsys.readouterr().out
