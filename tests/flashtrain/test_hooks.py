"""Claims about what happens between steps."""

from types import SimpleNamespace

import pytest
import torch

from flashtrain.hooks import Log, TrainingError
from flashtrain.trainer import Step, Trainer


def step(number: int, loss: float = 1.0, last: bool = False) -> Step:
    return Step(number, torch.tensor(loss), torch.tensor(0.5), 1e-3, last)


def log_hook(rows: list[tuple[int, dict[str, float]]], every: int = 10) -> Log:
    run = SimpleNamespace(
        config=SimpleNamespace(trainer=SimpleNamespace(log_every=every)),
        trackers=SimpleNamespace(log=lambda number, metrics: rows.append((number, metrics))),
        speed=SimpleNamespace(read=lambda number, seconds: {"perf/step_s": 0.1}),
        folder="runs/x",
    )
    return Log(run, SimpleNamespace(data_time=0.0))  # type: ignore[arg-type]


def test_every_tenth_and_the_last_step_are_logged() -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    hook = log_hook(rows)
    for number in range(1, 26):
        hook.after_step(step(number, last=number == 25))
    assert [number for number, _ in rows] == [10, 20, 25]
    assert rows[0][1]["train/loss"] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(bad: float) -> None:
    with pytest.raises(TrainingError, match=r"step 10.*optimizer\.lr"):
        log_hook([]).after_step(step(10, bad))


def test_the_trainer_asks_for_each_step_once_and_marks_the_last() -> None:
    asked: list[int] = []
    seen: list[Step] = []
    rates: list[float] = []
    engine = SimpleNamespace(
        forward_backward=lambda batches: torch.tensor(0.0),
        step=lambda rate: rates.append(rate) or torch.tensor(0.0),
    )
    loader = SimpleNamespace(step=lambda number: asked.append(number) or [])
    hook = SimpleNamespace(after_step=seen.append)
    trainer = Trainer(
        engine,
        loader,
        lambda number: number / 10,
        [hook],
        lambda: None,  # type: ignore[arg-type]
    )
    trainer.fit(3, 6)
    assert asked == [3, 4, 5]
    assert rates == [0.3, 0.4, 0.5]
    assert [(s.number, s.last) for s in seen] == [(4, False), (5, False), (6, True)]
