"""Tokens that vanish under a run end it with one clear sentence, not with crash after crash."""

from pathlib import Path

import pytest

from flashtrain.launch import REFUSED
from tests.faults import runs
from tests.faults.runs import LAUNCH, Process


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_shard_that_vanishes_is_named(tmp_path: Path, how: str) -> None:
    data, run = runs.make_tokens(tmp_path), tmp_path / "run"
    (shard,) = data.glob("train*.bin")
    settings = runs.settings(data, run, trainer__steps=100000)
    with Process([*LAUNCH, "--nproc", "2", *settings], run, tmp_path / "log") as process:
        process.until(lambda: len(runs.steps(run)) > 5)
        if how == "truncated":
            with shard.open("r+b") as file:
                file.truncate(100)  # reading its map is a bus error, after which the run restarts
        else:
            shard.unlink()
        assert process.wait() == REFUSED, process.output()
    said = process.output().strip().splitlines()[-1]
    assert said.startswith("flashtrain: ")
    assert shard.name in said
    assert ("truncated" in said) if how == "truncated" else ("gone" in said)
