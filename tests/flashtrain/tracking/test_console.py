import contextlib
import errno
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashtrain.config import ConfigError, PositionConfig, PositionKind, Target, WandbMode
from flashtrain.tracking import Trackers
from flashtrain.tracking.card import count, describe_position
from flashtrain.tracking.console import Console, duration, format_metrics
from tests.flashtrain.tracking.sample_config import small_config

METRICS = {
    "train/loss": 3.21239,
    "train/grad_norm": 0.5129,
    "train/lr": 6e-4,
    "perf/tokens_per_s": 123456.0,
    "perf/tokens_per_s_per_gpu": 15432.0,
    "perf/mfu": 0.412,
    "perf/mfu_full": 0.5,
    "perf/memory_gib": 12.345,
    "perf/data_share": 0.004,
    "perf/step_s": 0.1,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO, tmp_path: Path) -> Iterator[Console]:
    made = Console(small_config(), tmp_path / "runs", file=out)
    made.begin(20, ["resumes from step-00000020"])
    made.start({}, None)
    yield made
    made.finish("finished")


@pytest.mark.usefixtures("console")
def test_the_start_card_tells_what_runs_where(out: io.StringIO) -> None:
    card = out.getvalue()
    for part in (
        "tiny",
        "2 layers, 4 heads of 16",
        "115k (115,",
        "256 tokens: 8 sequences of 32, micro-batches of 2, 4 per rank",
        "100 steps, 25.6k tokens",
        "1 processes: tensor 1 x data 1, bf16",
        "512 bytes of keys and values for each token",  # 2 x 2 layers x 64 x bf16
        "/runs",
        "resumes from step-00000020",
    ):
        assert part in card.replace("\n", " "), part


def test_positions_are_said_with_what_they_touch() -> None:
    kinds = {
        "rope on q,k": PositionConfig(PositionKind.rope),
        "learned on embedding": PositionConfig(PositionKind.learned, [Target.embedding]),
        "alibi": PositionConfig(PositionKind.alibi),
        "none": PositionConfig(PositionKind.none),
    }
    for said, position in kinds.items():
        assert describe_position(position) == said


def test_a_log_is_one_plain_line_without_a_terminal(console: Console, out: io.StringIO) -> None:
    out.truncate(0)
    console.log(30, METRICS)
    line = out.getvalue().lstrip("\0")
    assert line == (
        "step 30/100  loss 3.2124  lr 6.00e-04  norm 0.513  123k tok/s  15.4k tok/s/GPU  "
        "MFU 41.2%  12.35 GiB  data 0.4%\n"
    )
    console.log(40, METRICS)
    assert out.getvalue().endswith("s left\n")  # known from the second line on
    assert "\x1b" not in out.getvalue()


def test_a_checkpoint_says_what_it_cost() -> None:
    saved = {"checkpoint/stall_s": 0.0015, "checkpoint/write_s": 12.3}
    assert "  ".join(format_metrics(saved)) == (
        "checkpoint written in 12.30 s  training waited 0.002 s for it"
    )


def test_numbers_that_went_bad_are_shown_and_do_not_raise() -> None:
    bad = dict.fromkeys(METRICS, math.nan) | {"perf/tokens_per_s": math.inf, "other": -math.inf}
    line = "  ".join(format_metrics(bad))
    assert "loss nan" in line
    assert "inf tok/s" in line
    assert "other -inf" in line


def test_a_terminal_gets_a_bar_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    monkeypatch.setattr("flashtrain.tracking.console.time.monotonic", lambda: now[0])
    out = Terminal()
    console = Console(small_config(), tmp_path, file=out)
    console.begin(0, [])
    console.start({}, None)
    for step in (10, 20):
        now[0] += 60
        console.log(step, {"train/loss": 1.0})
    assert console.time_left() == "8m00s"  # 80 steps at 6 s
    assert console.bar is not None
    console.bar.refresh()
    console.finish("stopped")
    assert "step 20/100" in out.getvalue()
    assert "8m00s left" in out.getvalue()
    assert "stopped at step 20/100 after 2m00s" in out.getvalue()


def test_a_sample_cannot_steer_the_terminal_or_the_markup(
    console: Console, out: io.StringIO
) -> None:
    console.text(30, "sample", "[bold]To be\x1b[2J\x07 or\nnot\x9b5m")
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown
    assert "[bold]To be" in shown
    assert "sample at step 30" in shown


def test_a_reader_that_went_away_ends_the_output_and_not_the_run(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(small_config(), tmp_path, file=out)
    out.close()
    console.start({}, None)
    console.log(1, METRICS)
    logging.getLogger("flashtrain").warning("nobody hears this")
    console.finish("finished")


@pytest.mark.parametrize("terminal", [False, True])
def test_so_does_a_closed_pipe(tmp_path: Path, terminal: bool) -> None:
    reader, writer = os.pipe()
    out = os.fdopen(writer, "w")
    if terminal:
        out.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(small_config(), tmp_path, file=out)
    console.start({}, None)
    os.close(reader)
    console.log(1, METRICS)
    console.finish("finished")
    assert console.rich.quiet
    with contextlib.suppress(BrokenPipeError):  # of what is left in its buffer
        out.close()


class Disk(io.StringIO):
    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_costs_lines_and_not_all_that_follow(tmp_path: Path) -> None:
    out = Disk()
    console = Console(small_config(), tmp_path, file=out)
    console.start({}, None)
    out.full = True
    console.log(1, METRICS)
    out.full = False
    console.log(2, METRICS)
    console.finish("finished")
    assert "step 1/" not in out.getvalue()
    assert "step 2/" in out.getvalue()


@pytest.mark.usefixtures("console")
def test_warnings_of_any_part_come_through(out: io.StringIO) -> None:
    logging.getLogger("flashtrain.checkpoint").warning("checkpoint %s is broken", "step-7")
    assert out.getvalue().endswith("warning: checkpoint step-7 is broken\n")


def test_short_numbers_round_up_to_the_next_letter() -> None:
    assert [count(x) for x in (0, 999, 999.6, 1234, 999_960, 1.5e9, math.nan)] == [
        "0",
        "999",
        "1k",
        "1.23k",
        "1M",
        "1.5B",
        "nan",
    ]
    assert [duration(x) for x in (0.4, 59.6, 62, 3725, 200_000)] == [
        "0s",
        "1m00s",
        "1m02s",
        "1h02m",
        "2d07h",
    ]


def test_all_trackers_under_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers(small_config(), tmp_path)
    trackers.start(0, {}, ["starts from its seed"])
    trackers.log(100, {"train/loss": 1.5})
    trackers.text(100, "sample", "words")
    assert trackers.state() == {}
    trackers.finish(failed=False)
    shown = capsys.readouterr().out
    assert "finished at step 100/100" in shown
    assert "loss 1.5000" in shown
    assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "samples.jsonl").exists()


def test_silent_trackers_take_every_call(tmp_path: Path) -> None:
    trackers = Trackers.silent()
    trackers.start(3, {}, [])
    trackers.log(1, {"a": 1.0})
    trackers.text(1, "a", "b")
    assert trackers.state() == {}
    trackers.finish(failed=True)


def test_wandb_asked_for_by_name_and_missing_is_refused_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = small_config()
    config.tracking.console = False
    config.tracking.wandb.mode = WandbMode.online
    with pytest.raises(ConfigError, match=r"mode=online needs the package wandb.*mode=disabled"):
        Trackers(config, tmp_path)
