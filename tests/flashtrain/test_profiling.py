import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.planning.memory import predict_memory
from flashtrain.profiling import Profile, advice, out_of_memory
from flashtrain.trainer import Step

GIB = 1 << 30


class Engine:
    def forward_backward(self, batches: object) -> torch.Tensor:
        return (torch.ones(8, 8) @ torch.ones(8, 8)).sum()

    def step(self, rate: float) -> torch.Tensor:
        return torch.zeros(())


class Loader:
    def step(self, number: int) -> int:
        return number


def train(folder: Path, window: list[int], steps: int, start: int = 0, rank: int = 0) -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(
            trainer=SimpleNamespace(profile=window, nvtx=False, memory_history=False)
        ),
        folder=folder, engine=Engine(), device=torch.device("cpu"), mesh=SimpleNamespace(rank=rank),
    )  # fmt: skip
    loader = Loader()
    hook = Profile(run, loader)
    for number in range(start, steps):
        loss = run.engine.forward_backward(loader.step(number))
        norm = run.engine.step(1e-3)
        hook.after_step(Step(number + 1, loss, norm, 1e-3, number + 1 == steps))


def ranges(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {"data", "forward_backward", "optimizer"}
    return sorted(e["name"] for e in events if e.get("name") in names and e.get("ph") == "X")


def test_the_named_steps_are_traced_with_their_phases(tmp_path: Path) -> None:
    train(tmp_path, [3, 4], steps=6)
    trace = tmp_path / "profile" / "steps-3-4.json.gz"
    assert ranges(trace) == ["data"] * 2 + ["forward_backward"] * 2 + ["optimizer"] * 2
    assert "aten::mm" in (tmp_path / "profile" / "steps-3-4.txt").read_text()


def test_a_run_that_ends_inside_the_window_keeps_what_it_traced(tmp_path: Path) -> None:
    train(tmp_path, [3, 9], steps=4)
    assert ranges(tmp_path / "profile" / "steps-3-4.json.gz").count("optimizer") == 2


@pytest.mark.parametrize(
    "case", [{"window": []}, {"window": [3, 4], "rank": 1}, {"window": [3, 4], "start": 3}]
)
def test_nothing_is_traced_otherwise(tmp_path: Path, case: dict[str, Any]) -> None:
    """No window; another rank; a start that resumes inside of it."""
    train(tmp_path, steps=6, **case)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("window", ["[1,3]", "[5]", "[6,5]", "[2,3,4]"])
def test_a_window_is_two_steps_in_order(window: str) -> None:
    with pytest.raises(ConfigError, match=r"write \[first,last\]"):
        load([f"trainer.profile={window}"])


CASE = [
    "experiment=gpt_1.3b", "data.path=x", "parallel=data", "model.vocabulary=50304",
    "data.batch_size=64",
]  # fmt: skip


def test_what_fills_the_gpu_is_said_with_the_keys_that_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "3")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    line = out_of_memory(load(CASE, 4), error)
    assert line.startswith("rank 3 is out of GPU memory. Tried to allocate 2.50 GiB. Planned are")
    assert "trainer.memory_history=true leaves a snapshot" in line
    assert "\n" not in line


def test_the_parts_add_up_and_every_way_out_is_planned_as_it_would_run() -> None:
    said = advice(load(CASE, 4), 80 * GIB)
    whole, parts = re.fullmatch(r"Planned are ([\d.]+) GiB of 80\.0: (.*)\. Try .*", said).groups()
    assert sum(float(part.split()[1]) for part in parts.split(", ")) == pytest.approx(
        float(whole), abs=0.3
    )
    ways = re.findall(r"(\S+) \(([\d.]+) GiB\)", said)
    assert [way.partition("=")[0] for way, _ in ways] == [
        "data.micro_batch_size", "trainer.recompute", "trainer.recompute", "trainer.recompute",
        "trainer.mlp_chunks", "parallel", "optimizer.moments",
    ]  # fmt: skip
    for way, planned in ways:
        there = predict_memory(load([*CASE, way], 4)).total / GIB
        assert float(planned) == pytest.approx(there, abs=0.06), way
        assert there < float(whole)


def test_ways_out_that_are_taken_already_are_not_named_again() -> None:
    least = [
        *CASE, "data.micro_batch_size=1", "trainer.recompute=full", "parallel=fsdp",
        "optimizer.moments=bf16",
    ]  # fmt: skip
    ways = re.findall(r"(\S+) \([\d.]+ GiB\)", advice(load(least, 4), 0))
    assert ways == ["trainer.mlp_chunks=8", "trainer.offload_activations=true"]
    least += ["trainer.mlp_chunks=8", "trainer.offload_activations=true"]
    assert advice(load(least, 4), 0).endswith("Try more GPUs")
    assert "recompute=selective" not in advice(load([*CASE, "trainer.mlp_chunks=2"], 4), 0)
    assert "parallel.shard" in advice(load([*CASE, "engine=deepspeed"], 4), 0)  # not predicted


def test_nvtx_and_the_history_of_memory_need_a_gpu(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(
        config=load(["trainer.memory_history=true"]), folder=tmp_path, engine=Engine(),
        device=torch.device("cpu"), mesh=SimpleNamespace(rank=0),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="CUDA GPU"):
        Profile(run, Loader())


@pytest.mark.gpu
def test_running_out_of_memory_leaves_a_snapshot(tmp_path: Path) -> None:
    case = ["trainer.memory_history=true", "trainer.nvtx=true", f"run_dir={tmp_path}"]
    config = load([*case, "model.vocabulary=512"])  # as the data say, which a run asks first
    run: Any = SimpleNamespace(
        config=config, folder=tmp_path, engine=Engine(), device=torch.device("cuda"),
        mesh=SimpleNamespace(rank=0),
    )  # fmt: skip
    hook = Profile(run, Loader())
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(1 << 50, device="cuda")
        line = out_of_memory(config, caught.value)
        path = tmp_path / "memory-rank0.pickle"
        assert str(path) in line
        assert path.stat().st_size > 0
        hook.after_step(Step(1, torch.zeros(()), torch.zeros(()), 1e-3, True))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
