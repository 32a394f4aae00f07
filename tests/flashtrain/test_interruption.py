"""Claims about stopping: who is asked, when all agree, and that handlers are put back."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from flashtrain import interruption
from flashtrain.interruption import Interruption
from flashtrain.trainer import Step, Trainer
from tests.harness import run_ranks


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_is_a_wish_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        assert stop.agreed() == number.name
        assert stop.agreed() == number.name  # it stays
    assert signal.getsignal(number) is before


def test_the_same_signal_twice_at_once_is_one_wish_and_later_is_impatience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.1
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun does
        assert stop.agreed() == "SIGINT"
        now[0] += interruption.AGAIN_S + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("earlier", [0, 90])  # s that starts which failed took of it
def test_the_time_limit_is_in_minutes(earlier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    monkeypatch.setenv(interruption.EARLIER_S, str(earlier))
    with Interruption(time_limit=2) as stop:
        now[0] += 119 - earlier
        assert stop.agreed() is None
        now[0] += 2
        assert stop.agreed() == "the time limit"


def test_a_first_signal_after_the_time_limit_lets_the_run_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption(time_limit=2) as stop:
        now[0] += 121
        assert stop.agreed() == "the time limit"
        now[0] += 10  # its last step is being saved
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked_at == now[0]  # from here the watch counts
        now[0] += interruption.AGAIN_S + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_trainer_stops_after_the_step_and_marks_it() -> None:
    seen: list[Step] = []
    engine = SimpleNamespace(
        forward_backward=lambda batches: torch.tensor(0.0), step=lambda rate: torch.tensor(0.0)
    )
    answers = iter([None, "SIGTERM"])
    trainer = Trainer(
        engine,  # type: ignore[arg-type]
        SimpleNamespace(step=lambda number: []),  # type: ignore[arg-type]
        lambda number: 0.1,
        [SimpleNamespace(after_step=seen.append)],
        lambda: next(answers),
    )
    trainer.fit(3, 9)
    assert [(s.number, s.last, s.interrupted) for s in seen] == [
        (4, False, None),
        (5, True, "SIGTERM"),
    ]


def test_ranks_agree_on_the_step_whoever_was_asked(tmp_path: Path) -> None:
    run_ranks(check_ranks_agree, 3, tmp_path)


def check_ranks_agree() -> None:
    with Interruption() as stop:
        answers = []
        for step in range(6):
            if step == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if step == 3 and dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
    assert answers == [None, None, None, "SIGUSR1", "SIGUSR1", "SIGUSR1"], answers
