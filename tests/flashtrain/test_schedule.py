"""Claims about the learning-rate curve."""

import itertools

import pytest

from flashtrain.config import ScheduleConfig, ScheduleKind
from flashtrain.schedule import learning_rate

STEPS, PEAK = 1000, 3e-4


def curve(kind: ScheduleKind, **keys: float) -> list[float]:
    schedule = ScheduleConfig(kind=kind, **keys)  # type: ignore[arg-type]
    return [learning_rate(step, STEPS, PEAK, schedule) for step in range(STEPS)]


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_warmup_is_linear_and_reaches_the_peak(kind: ScheduleKind) -> None:
    rates = curve(kind, warmup_steps=100)
    assert rates[0] == pytest.approx(PEAK / 100)
    assert rates[49] == pytest.approx(PEAK / 2)
    assert rates[99] == pytest.approx(PEAK)
    assert max(rates) <= PEAK * (1 + 1e-12)


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear, ScheduleKind.wsd])
def test_decay_falls_to_the_final_ratio(kind: ScheduleKind) -> None:
    rates = curve(kind, warmup_steps=10, final_ratio=0.1)
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(PEAK * 0.1, rel=0.05)


def test_cosine_is_half_way_at_half_time() -> None:
    rates = curve(ScheduleKind.cosine, warmup_steps=0, final_ratio=0.0)
    assert rates[500] == pytest.approx(PEAK / 2, rel=1e-6)


def test_wsd_is_flat_until_its_last_share() -> None:
    rates = curve(ScheduleKind.wsd, warmup_steps=0, decay_share=0.2, final_ratio=0.0)
    assert rates[799] == pytest.approx(PEAK)
    assert rates[900] == pytest.approx(PEAK / 2, rel=1e-6)


def test_wsd_decays_for_its_share_of_the_run_after_any_warmup() -> None:
    rates = curve(ScheduleKind.wsd, warmup_steps=500, decay_share=0.2, final_ratio=0.0)
    assert rates[799] == pytest.approx(PEAK)
    assert rates[900] == pytest.approx(PEAK / 2, rel=1e-6)
    late = curve(ScheduleKind.wsd, warmup_steps=900, decay_share=0.2, final_ratio=0.0)
    assert late[900] == pytest.approx(PEAK)
    assert late[950] == pytest.approx(PEAK / 2, rel=1e-6)


def test_warmup_longer_than_the_run_never_exceeds_the_peak() -> None:
    schedule = ScheduleConfig(warmup_steps=5000)
    assert learning_rate(STEPS - 1, STEPS, PEAK, schedule) == pytest.approx(PEAK)
