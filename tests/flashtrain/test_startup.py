"""How a process begins that is not rank 0."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from flashtrain import startup
from flashtrain.compose import load
from flashtrain.config import ConfigError, to_dict
from flashtrain.data.source import prepare_source
from flashtrain.launch import REFUSED
from tests.flashtrain.data.made import make_shards
from tests.harness import run_ranks


def test_a_node_without_the_tokens_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards(tmp_path / "shards")
    words = ["data=shards", f"data.path={folder}", "data.sequence_length=8", "data.batch_size=4"]
    words += ["data.micro_batch_size=1", "parallel=data", "trainer.evaluate_sequences=4"]
    config = prepare_source(load([*words, "experiment=null"], 2), 2)
    store = HashStore()
    store.set("config", json.dumps({"config": to_dict(config)}))
    shutil.rmtree(folder)  # of this node; rank 0 has its own
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(startup, "meet", lambda *_: store)
    with pytest.raises(SystemExit) as end:
        startup.start([])
    assert end.value.code == REFUSED
    said = capsys.readouterr().err
    assert said.startswith("flashtrain: on ") and "no folder of token shards at" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("alone", [False, True])
def test_why_a_run_ends_is_said_once_and_by_whoever_knows(tmp_path: Path, alone: bool) -> None:
    run_ranks(check_why, 3, tmp_path, tmp_path, alone)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    line = "flashtrain: a shard is gone\n"
    assert said == (["", "", line] if alone else [line, "", ""])


def check_why(folder: Path, alone: bool) -> None:
    rank = dist.get_rank()
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    with (folder / f"{rank}.txt").open("w") as file, contextlib.redirect_stderr(file):
        if rank == 2 or not alone:
            startup.say_why(ConfigError("a shard is gone"), store)
    dist.barrier()


def test_more_processes_than_gpus_are_refused_before_one_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    words = ["experiment=null", "data=random", "model.vocabulary=32", f"run_dir={tmp_path}"]
    words += ["trainer.steps=1", "data.batch_size=4", "data.micro_batch_size=1"]
    refused = startup._compose(words, 4)["refused"]
    assert "4 processes on" in str(refused) and "has 2 GPUs" in str(refused)
