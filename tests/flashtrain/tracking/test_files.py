import errno
import json
import math
from pathlib import Path

import pytest

from flashtrain.tracking.files import Files


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_curve_has_every_step_once(tmp_path: Path) -> None:
    first = Files(tmp_path)
    first.start({}, None)
    for step in range(10, 60, 10):
        first.log(step, {"train/loss": 1.0})
        first.text(step, "sample", f"text {step}")
    second = Files(tmp_path)  # the first one died; its checkpoint was of step 30
    second.cut(30)
    second.start({}, None)
    for step in range(40, 80, 10):
        second.log(step, {"train/loss": 2.0})
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [10, 20, 30, 40, 50, 60, 70]
    assert [row["train/loss"] for row in metrics] == [1.0] * 3 + [2.0] * 4
    assert [row["text"] for row in rows(tmp_path / "samples.jsonl")] == [
        "text 10",
        "text 20",
        "text 30",
    ]


def test_several_rows_of_one_step_stay(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.log(10, {"train/loss": 1.0})
    files.log(10, {"validation/loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    files.cut(10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_half_a_line_of_a_crash_is_dropped(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.log(10, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "trai')
    files.cut(100)
    files.log(20, {"train/loss": 2.0})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [10, 20]


def test_each_row_is_on_its_way_to_disk_at_once(tmp_path: Path) -> None:
    Files(tmp_path).log(1, {"train/loss": 3.5})
    assert rows(tmp_path / "metrics.jsonl")[0]["train/loss"] == 3.5  # nothing was closed


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    Files(tmp_path).log(1, {"a": math.nan, "b": math.inf, "c": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["a"], row["b"], row["c"]) == (None, None, 0.5)


def test_a_disk_that_refuses_warns_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path / "gone")
    files.log(1, {"a": 1.0})
    files.log(2, {"a": 1.0})
    assert len(caplog.records) == 1
    files.start({}, None)  # the disk is back
    files.log(3, {"a": 1.0})
    assert [json.loads(x)["step"] for x in files.metrics.read_text().split("\n") if x] == [3]


def test_on_a_full_disk_rows_are_cut_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path)
    for step in (10, 20, 30):
        files.log(step, {"train/loss": 1.0})
    damaged = b'{"step": 5, "ti\n' + files.metrics.read_bytes()
    files.samples.write_bytes(damaged)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda path: open(path, "rb").read())  # noqa: SIM115
    files.cut(20)
    monkeypatch.undo()
    assert [row["step"] for row in rows(files.metrics)] == [10, 20]
    assert files.samples.read_bytes() == damaged
    assert "samples.jsonl" in caplog.text and "metrics.jsonl" not in caplog.text
