import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from flashtrain.config import ConfigError
from flashtrain.tracking import Trackers
from flashtrain.tracking.tensorboard import TensorBoard, check_tensorboard
from tests.flashtrain.tracking.sample_config import small_config

INSTALLED = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not INSTALLED, reason="tensorboard is not installed")


def test_a_missing_package_is_refused_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(ConfigError, match=r"tracking\.tensorboard=true.*pip install"):
        check_tensorboard(True)
    config = small_config()
    config.tracking.tensorboard = True
    with pytest.raises(ConfigError, match="tensorboard"):
        Trackers(config, tmp_path)


class Broken:
    def __getattr__(self, name: str) -> Any:
        def method(*_: object, **__: object) -> None:
            raise OSError("no space left")

        return method


def test_a_writer_that_breaks_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    board = TensorBoard(tmp_path)
    board.writer = Broken()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            board.log(step, {"a": 1.0})
            board.text(step, "sample", "x")
        board.finish("finished")
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard failed (no space left) and is off from here on"
    ]


@needs_tensorboard
def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        board = TensorBoard(tmp_path)
        board.cut(first)
        board.start({}, None)
        for step in steps:
            board.log(step, {"train/loss": step / 10 + first})
        board.text(steps[-1], "sample", "To be\nor not")
        board.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(10, 1.0), (20, 2.0), (30, 23.0), (40, 24.0)]
