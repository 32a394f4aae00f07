import json
import re
from pathlib import Path
from typing import Any

import pytest

from flashtrain.config import ConfigError
from flashtrain.tracking.charts import Curve, after_the_start, line_chart
from flashtrain.tracking.compare import (
    as_text,
    best_first,
    comparison,
    differences,
    overlaid,
    read_record,
    read_rows,
)
from flashtrain.tracking.report import write_report


def made(folder: Path, name: str, losses: list[float], **config: Any) -> Path:
    path = folder / name
    path.mkdir()
    tree = {"name": name, "run_dir": str(path), "seed": 1, "trainer": {"steps": 3}, **config}
    (path / "config.json").write_text(json.dumps(tree))
    rows = [
        {"step": n, "train/loss": loss, "perf/tokens_per_s": 1000.0 * n, "perf/memory_gib": None}
        for n, loss in enumerate(losses, 1)
    ]
    rows.append({"step": len(losses), "validation/loss": losses[-1] + 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_shows_what_differs_and_how_runs_ended(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", [4.0, 3.0, 2.0], optimizer={"lr": 0.1, "eps": 1}, model={"on": ["q"]}),
        made(tmp_path, "b", [4.0, 1.0], optimizer={"lr": 0.2, "eps": 1}, model={"on": ["q", "k"]}),
    ]
    records = best_first([read_record(run) for run in runs])
    assert differences(records) == ["optimizer.lr", "model.on"]
    assert comparison(records) == [
        ["run", "lr", "on", "steps", "loss", "validation", "tokens/s"],
        ["b", "0.2", "[q,k]", "2 of 3", "1.0000", "1.5000", "1,500"],
        ["a", "0.1", "[q]", "3", "2.0000", "2.5000", "2,000"],
    ]


def test_keys_of_one_last_word_are_told_apart(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, name, [1.0, 2.0], a={"kind": name}, b={"kind": name, "steps": name})
        for name in ("x", "y")
    ]
    header, *_ = comparison([read_record(run) for run in runs])
    assert header[:5] == ["run", "a.kind", "b.kind", "b.steps", "steps"]


def test_text_is_aligned_and_markdown_is_a_table(tmp_path: Path) -> None:
    table = [["run", "loss"], ["a", "2.0000"], ["longer", "10.0000"]]
    assert as_text(table) == "run        loss\na        2.0000\nlonger  10.0000"
    assert as_text(table, markdown=True).splitlines()[1] == "| --- | --- |"


def test_the_picture_holds_every_run_once(tmp_path: Path) -> None:
    runs = [made(tmp_path, name, [4.0, 3.0, 2.0]) for name in ("a", "b<c")]
    svg = overlaid([read_record(run) for run in runs])
    assert svg.count("<polyline") == 2
    assert len(re.findall(r">(?:a|b&lt;c)</text>", svg)) == 2
    assert "<script" not in svg
    with pytest.raises(ConfigError, match=r"train/nothing.*logged are .*train/loss"):
        overlaid([read_record(run) for run in runs], "train/nothing")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_record(tmp_path)


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path, "a", [4.0, 3.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert read_record(run).step == 2


def test_half_a_row_of_a_full_disk_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path, "a", [4.0, 3.0])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:  # files.py goes on in a line of its own
            file.write('{"step": 2, "na\n{"step": 3, "name": "sample", "text": "again"}\n')
    assert read_record(run).step == 3
    assert "again" in write_report(run).read_text()


@pytest.mark.parametrize("text", ['{"trainer": {"ste', "[1]", '{"architectures": ["Llama"]}'])
def test_a_configuration_that_is_no_runs_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is no whole configuration of a run"):
        read_record(tmp_path)


def test_points_lie_where_their_values_are() -> None:
    svg = line_chart([Curve([(0, 1.0), (5, 2.0), (10, 3.0)], "a", 0)], x="step", y="loss")
    (path,) = re.findall(r'points="([^"]+)"', svg)
    places = [tuple(map(float, pair.split(","))) for pair in path.split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # up is less
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_on_logarithmic_axes_equal_ratios_are_equal_distances() -> None:
    points = [(64, 1.0), (128, 10.0), (256, 100.0), (512, 0.0)]
    svg = line_chart([Curve(points, "a", 0)], x="width", y="y", log_x=True, log_y=True)
    (path,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_losses_are_drawn_from_where_the_first_tenth_ends() -> None:
    losses = [(step, 10.0 if step < 10 else 3.0 - step / 100) for step in range(1, 101)]
    curves = [Curve(losses, "a", 0)]
    assert after_the_start(curves) == pytest.approx(2.9)
    svg = line_chart(curves, x="step", y="loss", top=after_the_start(curves))
    (path,) = re.findall(r'points="([^"]+)"', svg)
    heights = [float(pair.split(",")[1]) for pair in path.split()]
    assert heights[0] < 0  # above the picture
    assert heights[9] == pytest.approx(18, abs=20)  # at its upper edge
    assert heights[-1] == pytest.approx(336, abs=20)  # at its lower one
    assert after_the_start([]) is None


@pytest.mark.parametrize("points", [[], [(1, 2.0)]])
def test_a_line_needs_two_points(points: list[tuple[float, float]]) -> None:
    assert line_chart([Curve(points, "a", 0)], x="step", y="y") == ""


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [0, 1e12]])
def test_any_range_of_values_can_be_drawn(values: list[float]) -> None:
    svg = line_chart([Curve(list(enumerate(values)), "a", 0)], x="step", y="y")
    assert "nan" not in svg
    assert "inf" not in svg.replace("infinite", "")


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    run = made(tmp_path, "a&b", [4.0, 3.0, 2.0])
    (run / "samples.jsonl").write_text('{"step": 3, "name": "sample", "text": "<b>To be"}\n')
    (run / "environment.json").write_text('{"torch": "2.13.0", "cuda": null}')
    (run / "profile").mkdir()
    (run / "profile" / "steps-2-3.txt").write_text("aten::mm  50%")
    (run / "evaluations.jsonl").write_text(
        '{"step": 3, "time": 1.0, "text": "x.txt", "tokens": 1234567, "loss": 2.25, '
        '"bits_per_byte": 1.23456789}\n'
    )
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((2, 30.0), (3, 20.0)):
            for name in ("arc", "fox.txt"):
                row = {"step": step, f"benchmark/{name}/acc": value}
                file.write(json.dumps(row) + "\n")
    page = write_report(run).read_text()
    for shown in (
        "a&amp;b",
        "&lt;b&gt;To be",
        "2.13.0",
        "aten::mm  50%",
        "tokens 1,234,567, loss 2.25, bits per byte 1.2346",
        "3 of 3",
        ">fox.txt<",
    ):
        assert shown in page, shown
    # loss, tokens per second, accuracy of both benchmarks: the rest was not logged
    assert page.count("<svg xmlns") == 3
    outside = re.findall(r"(?:src|href)=|@import|url\(", page)
    assert not outside
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_a_row_that_a_full_disk_cut_is_left_out(tmp_path: Path) -> None:
    whole = [b'{"step": 1}\n', b'{"step": 3}\n']
    (tmp_path / "metrics.jsonl").write_bytes(whole[0] + b'{"step": 2, "ti\n' + whole[1])
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 3}]
