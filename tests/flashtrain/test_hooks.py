"""Claims about what happens between steps."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashtrain.config import OnBadSteps
from flashtrain.hooks import Between, Evaluate, Log, Save
from flashtrain.trainer import Step, Trainer, TrainingError


def step(number: int, loss: float = 1.0, last: bool = False, norm: float = 0.5) -> Step:
    return Step(number, torch.tensor(loss), torch.tensor(norm), 1e-3, last)


def log_hook(
    rows: list[tuple[int, dict[str, float]]], every: int = 10, skips: bool = True, rank: int = 0
) -> Log:
    run = SimpleNamespace(
        config=SimpleNamespace(
            trainer=SimpleNamespace(
                log_every=every,
                bad_steps=3,
                on_bad_steps=OnBadSteps.stop,
                evaluate_every=7,
                benchmark=SimpleNamespace(every=1000),
            ),
            checkpoint=SimpleNamespace(every=4),
        ),
        engine=SimpleNamespace(skips_bad_steps=skips),
        trackers=SimpleNamespace(log=lambda number, metrics: rows.append((number, metrics))),
        speed=SimpleNamespace(read=lambda number, seconds, tokens: {"perf/step_s": 0.1}),
        folder="runs/x",
        mesh=SimpleNamespace(rank=rank),
    )
    loader = SimpleNamespace(
        data_time=0.0,
        ramp=SimpleNamespace(tokens=lambda number: 8 * number),
        counters=lambda number: {},
    )
    return Log(run, loader)  # type: ignore[arg-type]


def test_every_tenth_and_the_last_step_are_logged() -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    hook = log_hook(rows)
    for number in range(1, 26):
        hook.after_step(step(number, last=number == 25))
    assert [number for number, _ in rows] == [10, 20, 25]
    assert rows[0][1]["train/loss"] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(bad: float) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    hook = log_hook(rows, every=1)
    for number, norm in enumerate([0.5, bad, bad, 0.5, bad], 1):
        hook.after_step(step(number, norm=norm))
    assert [row.get("train/skipped_steps", 0) for _, row in rows] == [0, 1, 2, 2, 3]
    hook.after_step(step(6, norm=bad))
    with pytest.raises(TrainingError, match=r"step 7.*3 steps in a row.*optimizer\.lr"):
        hook.after_step(step(7, loss=bad, norm=bad))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_says_that_a_step_is_skipped(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    log_hook([], every=1, rank=rank).after_step(step(1, norm=float("nan")))
    assert len(caplog.records) == (rank == 0)


def test_a_bad_loss_with_a_good_gradient_ends_the_run() -> None:
    """As a label outside the vocabulary gives: NaN for the loss, nothing for the gradient."""
    with pytest.raises(TrainingError, match=r"step 10.*loss is nan.*model\.vocabulary"):
        log_hook([]).after_step(step(10, loss=float("nan")))


def test_an_engine_that_cannot_skip_ends_at_the_first_bad_step() -> None:
    with pytest.raises(TrainingError, match=r"step 10.*1 steps in a row"):
        log_hook([], skips=False).after_step(step(10, norm=float("nan")))


@pytest.mark.parametrize(("number", "saved"), [(4, True), (6, False), (7, True), (8, True)])
def test_what_an_engine_did_not_skip_is_seen_before_it_is_saved(number: int, saved: bool) -> None:
    """Else checkpoints of bad weights push out those that the run is to go back to."""
    rows: list[tuple[int, dict[str, float]]] = []
    log_hook(rows).after_step(step(number, norm=float("nan")))  # it skips: nothing to see
    hook = log_hook(rows, skips=False)
    hook.after_step(step(number - 1))
    with pytest.raises(TrainingError) if saved else contextlib.nullcontext():
        hook.after_step(step(number, norm=float("nan")))
    assert rows == []


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


def test_checkpoints_are_written_beside_training_and_the_last_one_is_waited_for() -> None:
    calls: list[tuple[str, int, bool]] = []
    run = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(every=10)),
        speed=SimpleNamespace(pause=contextlib.nullcontext),
        prepare_saving=lambda: calls.append(("prepare", 1, False)),
        report_saved=lambda number: None,
        save=lambda number, wait: calls.append(("save", number, wait)),
        interrupted=lambda number, why: calls.append((why, number, False)),
    )
    hook = Save(run)  # type: ignore[arg-type]
    for number in range(1, 26):
        hook.after_step(step(number, last=number == 25))
    assert calls == [("prepare", 1, False)] + [
        ("save", number, number == 25) for number in (10, 20, 25)
    ]
    calls.clear()
    hook.after_step(replace(step(27, last=True), interrupted="SIGTERM"))
    assert calls == [("save", 27, True), ("SIGTERM", 27, False)]


def evaluate(answers: list[str | None], rows: list[int]) -> tuple[Step, int]:
    """The step and how many batches of its evaluation were seen; `rows`: what was logged."""
    seen = 0

    def mean(batches: object) -> torch.Tensor:
        nonlocal seen
        seen = sum(1 for _ in batches)  # type: ignore[attr-defined]
        return torch.tensor(2.0)

    moved: list[str] = []
    given = iter(answers)
    between = Between(
        SimpleNamespace(at=lambda what, stepping: moved.append(what)),  # type: ignore[arg-type]
        lambda: next(given),
    )
    run = SimpleNamespace(
        config=SimpleNamespace(trainer=SimpleNamespace(evaluate_every=5, evaluate_sequences=6)),
        speed=SimpleNamespace(pause=contextlib.nullcontext),
        engine=SimpleNamespace(evaluate=mean),
        trackers=SimpleNamespace(log=lambda number, metrics: rows.append(number)),
        evaluated=None,
    )
    loader = SimpleNamespace(evaluation=lambda n: iter(range(n)))
    now = step(5)
    Evaluate(run, loader, between).after_step(now)  # type: ignore[arg-type]
    assert moved[0] == "the evaluation after step 5"
    assert (run.evaluated is None) == (not rows)
    return now, seen


def test_an_evaluation_goes_on_batch_by_batch() -> None:
    rows: list[int] = []
    now, seen = evaluate([None] * 6, rows)
    assert (now.interrupted, now.last, seen, rows) == (None, False, 6, [5])


def test_told_to_stop_an_evaluation_is_left_undone_and_its_step_is_the_last() -> None:
    rows: list[int] = []
    now, seen = evaluate([None, None, "SIGTERM"], rows)
    assert (now.interrupted, now.last, seen, rows) == ("SIGTERM", True, 2, [])
