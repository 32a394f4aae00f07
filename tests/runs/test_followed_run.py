"""A run stopped and resumed, as W&B's own offline records and TensorBoard's event files tell it."""

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.compose import load
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.door import admit
from flashtrain.tracking import wandb as tracker
from flashtrain.train import train

TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("followed")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 300)
    prepare([folder / "text.txt"], folder / "tokens", Recipe("bytes", validation_share=0.2))
    line = [
        "data=shards", f"data.path={folder}/tokens", "data.sequence_length=32",
        "data.batch_size=4", "data.micro_batch_size=4", "model.d_model=32", "model.n_layers=1",
        "trainer.steps=8", "trainer.log_every=2", "trainer.evaluate_sequences=4",
        "trainer.sample_every=4", "trainer.sample_tokens=5", "tracking.console=false",
        "tracking.wandb.mode=offline", "tracking.wandb.group=study", "tracking.wandb.artifact=true",
        f"tracking.tensorboard={str(TENSORBOARD).lower()}", f"run_dir={folder}/run",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracker.SETTINGS, "x_stats_sampling_interval", 0.1)  # 15 s by default
        for stop in (["trainer.stop_at=4"], []):
            train(admit(load([*line, *stop]), 1, 1), torch.device("cpu"))
    return folder / "run"


def records(run: Path) -> list[dict[str, list[Any]]]:
    """Of each start: what kind of record -> those records."""
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto.wandb_internal_pb2 import Record

    starts = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        store, found = datastore.DataStore(), defaultdict(list)
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            found[kind].append(getattr(record, kind))
        starts.append(found)
    return starts


def test_both_starts_are_one_run_of_the_group(run: Path) -> None:
    first, second = records(run)
    ids = {start["run"][0].run_id for start in (first, second)}
    assert len(ids) == 1
    assert {start["run"][0].run_group for start in (first, second)} == {"study"}
    steps = [
        json.loads(item.value_json)
        for start in (first, second)
        for row in start["history"]
        for item in row.item
        if item.key == "step" or list(item.nested_key) == ["step"]
    ]
    assert sorted(set(steps)) == [2, 4, 6, 8]


def test_the_machine_is_measured_beside_the_run(run: Path) -> None:
    keys = {item.key for start in records(run) for stats in start["stats"] for item in stats.item}
    assert any("memory" in key for key in keys), keys


def test_samples_are_one_table_and_checkpoints_artifacts(run: Path) -> None:
    first, second = records(run)
    paths = run.glob("wandb/offline-run-*/files/media/table/text/*.json")
    newest = max((json.loads(path.read_text())["data"] for path in paths), key=len)
    assert [row[0] for row in newest] == [4, 8]  # of both starts
    for start, step in ((first, 4), (second, 8)):
        (artifact,) = (a for a in start["artifact"] if a.type == "checkpoint")
        assert set(artifact.aliases) == {"latest", f"step-{step:08d}"}
        names = {entry.path for entry in artifact.manifest.contents}
        assert "manifest.json" in names
        assert any(name.endswith(".safetensors") for name in names)


@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_has_every_step_once_and_the_samples(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert "sample/text_summary" in events.Tags()["tensors"]
