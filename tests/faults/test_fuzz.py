"""scripts/bench_faults.py's damage to checkpoints, in small, and its table of expected values."""

import math
from pathlib import Path

import pytest

from scripts import effective_time as times
from scripts.parts import fault_fuzz as fuzz
from scripts.parts import fault_goodput as goodput

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_random_damage_is_never_loaded() -> None:
    outcome = fuzz.fuzz(14 * len(fuzz.KINDS), seed=3)
    assert outcome.missed == []
    assert outcome.rounds == 14 * len(fuzz.KINDS)
    assert all(outcome.detected[kind] > 0 for kind in fuzz.KINDS)


@pytest.mark.parametrize("kind", ["swapped", "truncated"])
def test_what_would_be_missed_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a start that takes the newest, whatever it is."""
    monkeypatch.setattr(fuzz, "_taken", lambda folder: max(folder.iterdir()))
    monkeypatch.setattr(fuzz, "KINDS", {kind: fuzz.KINDS[kind]})
    outcome = fuzz.fuzz(5, seed=3)
    assert len(outcome.missed) == 5
    assert kind in outcome.missed[0]


def test_training_time_is_that_of_steps_that_no_kill_fell_into() -> None:
    # three steps of 1 s; a kill and a start of 7 s; two more, of 1 s and of 2 s
    ends = [1.0, 2.0, 3.0, 10.0, 11.0, 13.0]
    assert goodput.training_time(ends, [3.5]) == 1 + 1 + 1 + 1 + 1 + 2
    assert goodput.training_time(ends, []) == 13


def test_the_best_interval_is_youngs_where_failures_are_rare() -> None:
    for mtbf, stall in ((1e6, 1.0), (1e7, 10.0)):
        young = math.sqrt(2 * stall * mtbf)
        assert times.best_interval(mtbf, stall, 0.0, 60.0) == pytest.approx(young, rel=0.01)
        share = times.effective_share(young, mtbf, stall, 0.0, 0.0)
        assert share == pytest.approx(1 - math.sqrt(2 * stall / mtbf), rel=1e-4)


def test_the_share_falls_with_every_cost_and_the_interval_is_the_best() -> None:
    cost = {"mtbf": 3600.0, "stall": 2.0, "write": 10.0, "again": 60.0}
    best = times.best_interval(**cost)
    share = times.effective_share(best, **cost)
    for tau in (best / 1.3, best * 1.3):
        assert times.effective_share(tau, **cost) < share
    for key in ("stall", "write", "again"):
        assert times.effective_share(best, **{**cost, key: cost[key] * 2}) < share
    assert "1 h" in times.table([1, 3], [1024], 2.0, 10.0, 60.0).splitlines()[1]


@pytest.mark.parametrize("write", [0.0, 30.0])
def test_a_simulated_run_trains_the_expected_share(write: float) -> None:
    cost = {"tau": 100.0, "mtbf": 1000.0, "stall": 5.0, "write": write, "again": 50.0}
    share, failures = times.simulate(**cost, seconds=2e6, seed=1)
    assert failures == pytest.approx(2000, rel=0.1)
    # what is trained while a checkpoint is written is counted as lost, and sometimes is not
    expected = times.effective_share(**cost)
    assert expected * 0.99 < share < expected * (1.01 if not write else 1.03)
