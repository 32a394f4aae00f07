"""When a process must end because nothing comes any more, and what it says then."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashtrain import hang_report, watch
from flashtrain.config import TrainerConfig
from flashtrain.hang_report import Report, pending, summary
from flashtrain.interruption import Interruption
from flashtrain.watch import ALONE_S, LEAVING_S, STOPPING_S, Watch


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def made(folder: Path, minutes: float = 10) -> tuple[Watch, Interruption]:
    stop = Interruption()
    return Watch(folder, 0, TrainerConfig(hang_timeout=minutes), stop), stop


def train(guard: Watch, clock: Clock, n_steps: int, seconds: float) -> None:
    for number in range(n_steps):
        guard.at(f"step {number}", stepping=True)
        clock.now += seconds
        guard.at(f"what follows step {number}", stepping=False)


def test_a_run_that_moves_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    guard, _ = made(tmp_path)
    train(guard, clock, 100, 500)
    assert guard.verdict(clock.now + 599) is None


def test_the_limit_is_in_minutes_and_counts_from_the_last_move(
    tmp_path: Path, clock: Clock
) -> None:
    guard, _ = made(tmp_path, minutes=2)
    train(guard, clock, 3, 100)
    assert guard.verdict(clock.now + 119) is None
    why = guard.verdict(clock.now + 121)
    assert why is not None and "2 min (trainer.hang_timeout)" in why


def test_a_save_may_take_longer_than_the_limit(tmp_path: Path, clock: Clock) -> None:
    saving = True
    config = TrainerConfig(hang_timeout=2)
    guard = Watch(tmp_path, 0, config, Interruption(), saving=lambda: saving)
    train(guard, clock, 3, 100)
    for _ in range(300):
        clock.now += 1
        assert guard.verdict(clock.now) is None
    saving = False  # what follows has all of its time
    assert guard.verdict(clock.now + 119) is None
    why = guard.verdict(clock.now + 121)
    assert why is not None and "2 min (trainer.hang_timeout)" in why


@pytest.mark.parametrize("seconds", [1, 30])
def test_told_to_stop_a_step_has_time_to_end(tmp_path: Path, clock: Clock, seconds: float) -> None:
    guard, stop = made(tmp_path)
    train(guard, clock, 3, seconds)
    guard.at("step 4", stepping=True)
    clock.now += 20
    stop.asked_at = clock.now
    patience = max(STOPPING_S, 5 * seconds)
    assert guard.verdict(clock.now + patience - 1) is None
    why = guard.verdict(clock.now + patience + 1)
    assert why is not None and "told to stop" in why


def test_told_to_stop_a_save_has_all_the_time(tmp_path: Path, clock: Clock) -> None:
    guard, stop = made(tmp_path)
    train(guard, clock, 3, 1)
    stop.asked_at = clock.now
    assert guard.verdict(clock.now + 590) is None


def test_a_neighbour_that_is_gone_is_noticed_but_not_at_the_end(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [1, 2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(watch, "children", lambda parent: there)
    for last in (False, True):
        guard, _ = made(tmp_path)
        guard.at("what follows step 3", stepping=False, last=last)
        there[:] = [1]
        assert guard.verdict(clock.now) is None
        assert guard.verdict(clock.now + ALONE_S - 1) is None
        late = guard.verdict(clock.now + ALONE_S + 1)
        assert late == (None if last else "a process of this node is gone")
        there[:] = [1, 2]


def test_after_going_back_from_the_last_step_neighbours_count_again(
    tmp_path: Path, clock: Clock
) -> None:
    guard, _ = made(tmp_path)
    guard.pulse = SimpleNamespace(lost="node 1", limit=5.0)  # type: ignore[assignment]
    guard.at("what follows step 9", stepping=False, last=True)
    guard.at("the evaluation after step 9", stepping=False)
    assert guard.verdict(clock.now + 6) is None
    guard.at("step 6", stepping=True)
    assert guard.verdict(clock.now + 6) == "node 1"


def test_where_neighbours_cannot_be_seen_none_is_taken_for_gone(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(watch, "PROC", tmp_path / "proc")
    guard, _ = made(tmp_path)
    guard.at("step 4", stepping=True)
    for _ in range(2):
        assert guard.verdict(clock.now) is None
        clock.now += ALONE_S + 1


def test_another_node_that_is_lost_ends_this_process_but_not_at_the_end(
    tmp_path: Path, clock: Clock
) -> None:
    guard, _ = made(tmp_path)
    train(guard, clock, 3, 1)
    lost = "nothing is heard of node 1"
    guard.pulse = SimpleNamespace(lost=None, limit=5.0)  # type: ignore[assignment]
    assert guard.verdict(clock.now + 6) is None
    guard.pulse = SimpleNamespace(lost=lost, limit=5.0)  # type: ignore[assignment]
    assert guard.verdict(clock.now + 4) is None  # training goes on all the same
    assert guard.verdict(clock.now + 6) == lost
    guard.at("what follows step 3", stepping=False, last=True)
    assert guard.verdict(clock.now + 6) is None


def test_an_error_has_a_limit_to_leave(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    guard, _ = made(tmp_path)
    with pytest.raises(RuntimeError), guard:
        raise RuntimeError
    assert guard.verdict(clock.now + LEAVING_S - 1) is None
    why = guard.verdict(clock.now + LEAVING_S + 1)
    assert why is not None and "an error" in why
    guard._done.set()


def test_children_are_the_living_ones() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in watch.children(os.getpid())
    child.kill()
    deadline = time.monotonic() + 10
    while child.pid in watch.children(os.getpid()):  # not reaped yet, but dead
        assert time.monotonic() < deadline
    child.communicate()


def test_names_of_other_processes_may_be_any_bytes() -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, bytes([97] * 14 + [195])); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in watch.children(os.getpid())
        child.kill()


def report(rank: int, what: str, collective: str) -> Report:
    return Report(rank, "host", rank, time.time(), what, collective, "trainer.py:9 fit", "why")


def test_ranks_that_stand_at_the_same_place_are_named_together() -> None:
    reports = [report(rank, "step 7", "nccl:all_reduce number 3 of [8]") for rank in (0, 1, 2, 5)]
    reports.append(report(4, "step 6", ""))
    line = summary(reports, 7, Path("runs/x/hangs"))
    assert line == (
        "flashtrain: why: ranks 0-2,5 at step 7, in nccl:all_reduce number 3 of [8] "
        "(trainer.py:9 fit); rank 4 at step 6, in no collective (trainer.py:9 fit); "
        "ranks 3,6 dead, stopped or on their way elsewhere; stacks in runs/x/hangs"
    )


def test_one_rank_says_it_and_old_reports_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = hang_report.write(tmp_path, 3, "step 7", "why")
    assert "test_watch.py" in (tmp_path / "rank-00003.txt").read_text()
    assert Report.read_all(tmp_path, own.time + 1) == [own]
    assert Report.read_all(tmp_path, own.time + 100) == []
    hang_report.write(tmp_path, 5, "step 7", "why")
    hang_report.say(tmp_path, report(5, "step 7", ""))
    assert capsys.readouterr().err == ""
    hang_report.say(tmp_path, own)
    assert "ranks 3,5 at step 7" in capsys.readouterr().err


def test_the_oldest_collective_that_has_not_ended_is_the_one() -> None:
    def entry(number: int, retired: bool) -> dict[str, object]:
        return {
            "retired": retired, "is_p2p": False, "collective_seq_id": number, "p2p_seq_id": 0,
            "process_group": ["1", "tensor"], "input_sizes": [[4, 8]],
            "profiling_name": "nccl:all_gather",
        }  # fmt: skip

    record = {"entries": [entry(1, True), entry(2, False), entry(3, False)]}
    assert pending(record) == "nccl:all_gather number 2 of [4, 8] (tensor)"
    assert pending({"entries": [entry(1, True)]}) == ""
    assert pending({}) == ""
