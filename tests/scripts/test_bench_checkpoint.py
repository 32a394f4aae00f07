"""The checkpoint bench ends on a CPU too, reports every figure, and leaves nothing behind."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def numbers(tree: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, float | int):
            found[key] = value
    return found


def test_every_figure_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bench_checkpoint"
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    disk, file = tmp_path / "disk", tmp_path / "figures.json"
    disk.mkdir()
    case = f"{module.TINY} model.d_model=32 model.n_layers=1 model.vocabulary=64"
    arguments = [
        "--steps",
        "2",
        "--saves",
        "2",
        "--every",
        "3",
        "--raw-gib",
        "0.01",
        "--folder",
        str(disk),
    ]
    arguments += ["--case", case, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert module.main() == 0
    assert not list(disk.iterdir())
    found = numbers(json.loads(file.read_text()))
    for key in (
        "step s",
        "checkpoint GiB",
        "disk/write GiB/s",
        "disk/read GiB/s",
        "synchronous/stall s",
        "asynchronous/stall s",
        "asynchronous/save GiB/s",
        "asynchronous/longest stall, share of 3 steps",
        "load/verify s",
        "load/load after that s",
    ):
        assert found[key] > 0, key
    assert "asynchronous/with a save, 3 steps take longer by, share" in found
    # weights and two moments, all in fp32
    parameters = 64 * 32 + 12 * 32 * 32
    assert found["checkpoint GiB"] * 2**30 >= 12 * parameters
