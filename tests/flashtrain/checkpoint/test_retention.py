"""Which checkpoints stay: the newest, every n-th, the best; and nothing that was asked for goes."""

import json
import random
from pathlib import Path

import pytest

from flashtrain.checkpoint import EVALUATION, Retention, collect, find_latest, read_meta, save
from flashtrain.checkpoint.retention import evaluation_loss
from flashtrain.compose import load
from flashtrain.config import ConfigError
from tests.flashtrain.checkpoint.emulate import Tiny


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def save_with_losses(folder: Path, losses: list[float | None], keep: Retention) -> None:
    """Checkpoints 10, 20, ..., each with the evaluation loss of its step, or none."""
    for number, loss in enumerate(losses, 1):
        meta = {} if loss is None else {EVALUATION: loss}
        save(folder, 10 * number, collect(Tiny()), meta, keep=keep)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(1), [60]),
        (Retention(3), [40, 50, 60]),
        (Retention(1, every=20), [20, 40, 60]),
        (Retention(2, every=30), [30, 50, 60]),
        (Retention(1, best=1), [20, 60]),
        (Retention(1, best=2), [20, 40, 60]),  # 40 is as good as 30 was not evaluated
        (Retention(1, every=50, best=1), [20, 50, 60]),
        (Retention(9), [10, 20, 30, 40, 50, 60]),
    ],
    ids=str,
)
def test_what_is_left_of_six_checkpoints(tmp_path: Path, keep: Retention, left: list[int]) -> None:
    save_with_losses(tmp_path, [5.0, 1.0, None, 2.0, 2.0, float("nan")], keep)
    assert steps(tmp_path) == left
    assert find_latest(tmp_path) == tmp_path / "step-00000060"


def test_a_best_one_goes_when_it_is_beaten(tmp_path: Path) -> None:
    save_with_losses(tmp_path, [3.0, 2.0, 4.0, 5.0], Retention(1, best=1))
    assert steps(tmp_path) == [20, 40]
    for step, loss in ((50, 1.0), (60, 6.0)):
        save(tmp_path, step, collect(Tiny()), {EVALUATION: loss}, keep=Retention(1, best=1))
    assert steps(tmp_path) == [50, 60]
    assert read_meta(tmp_path / "step-00000050")[EVALUATION] == 1.0


def test_one_whose_loss_cannot_be_read_is_nobodys_best(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"meta": []}', '{"meta": {"evaluation_loss": "low"}}'):
        (tmp_path / "state.json").write_text(content)
        assert evaluation_loss(tmp_path) == float("inf"), content
    (tmp_path / "state.json").write_text(json.dumps({"meta": {EVALUATION: 2.5}}))
    assert evaluation_loss(tmp_path) == 2.5


def test_what_each_rule_asks_for_stays_whatever_the_others_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    for _ in range(200):
        found = {tmp_path / str(n): n for n in draw.sample(range(1, 60), draw.randrange(1, 20))}
        losses = {path: draw.choice([1.0, 2.0, 3.0, float("inf")]) for path in found}
        monkeypatch.setattr("flashtrain.checkpoint.retention.evaluation_loss", losses.__getitem__)
        keep = Retention(draw.randrange(1, 4), draw.choice([None, 2, 5]), draw.randrange(4))
        gone = keep.surplus(found)
        left = [path for path in found if path not in gone]
        assert set(gone) <= set(found)
        assert sorted(found.values())[-keep.newest :] == sorted(
            found[path] for path in left if found[path] >= sorted(found.values())[-keep.newest :][0]
        )
        if keep.every is not None:
            assert not [path for path in gone if found[path] % keep.every == 0]
        rated = sorted(loss for loss in losses.values() if loss < float("inf"))
        best = sorted(loss for path in left if (loss := losses[path]) < float("inf"))
        assert best[: keep.best] == rated[: keep.best]
        most = keep.newest + keep.best
        if keep.every is None:
            assert len(left) <= most


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["checkpoint.every=50", "checkpoint.keep_every=120"], "keep_every=120 is not a multiple"),
        (["checkpoint.keep_every=0"], r"keep_every=0 must be a number above 0"),
        (["checkpoint.keep_best=-1"], r"keep_best=-1 must lie between 0 and"),
        (
            ["checkpoint.keep_best=1", "checkpoint.every=50", "trainer.evaluate_every=20"],
            r"checkpoint.every=50 is not a multiple of trainer.evaluate_every=20",
        ),
    ],
)
def test_rules_that_could_not_be_kept_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(overrides)
