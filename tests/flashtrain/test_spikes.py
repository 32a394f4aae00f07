"""What is called a spike, and what is not."""

import logging
import math
import random

import pytest
import torch

from flashtrain.config import OnSpike, SpikeConfig, TrainerConfig
from flashtrain.spikes import Detector, Spikes
from flashtrain.trainer import BadNumbersError, Step, TrainingError

CONFIG = SpikeConfig(deviations=6, steps=3, window=40)


def falling(n: int, seed: int = 0) -> list[float]:
    """As a loss falls, with noise."""
    dice = random.Random(seed)
    return [2 + 4 / (1 + number / 20) + dice.gauss(0, 0.05) for number in range(n)]


def spikes(losses: list[float], config: SpikeConfig = CONFIG) -> list[int]:
    detector = Detector(config)
    return [number for number, loss in enumerate(losses) if detector.sees(loss)]


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_with_noise_has_no_spike(seed: int) -> None:
    assert spikes(falling(2000, seed)) == []


def test_a_spike_is_seen_with_its_last_step_and_once() -> None:
    losses = falling(200)
    losses[100:110] = [4.5] * 10
    assert spikes(losses) == [102]


def test_fewer_high_losses_than_steps_are_none() -> None:
    losses = falling(200)
    losses[100:102] = [9.0] * 2
    losses[120] = 9.0
    assert spikes(losses) == []


def test_nothing_is_a_spike_before_enough_is_known() -> None:
    losses = [2.0, 2.01] * 9 + [50.0] * 3
    assert spikes(losses) == []
    assert spikes([2.0, 2.01] * 10 + [50.0] * 3) == [22]


def test_a_loss_that_stands_still_may_move_by_a_thousandth() -> None:
    assert spikes([2.0] * 40 + [2.01] * 3) == []  # 5 thousandths; 6 deviations are allowed
    assert spikes([2.0] * 40 + [2.02] * 3) == [42]


def test_losses_that_are_no_numbers_are_counted_elsewhere() -> None:
    losses = falling(200)
    losses[100:110] = [math.nan] * 10
    assert spikes(losses) == []


def run(action: OnSpike, log_every: int = 4, warns: bool = True) -> Spikes:
    """A hook that was fed with a spike from step 101 on; raises what it raises."""
    config = SpikeConfig(action=action, deviations=6, steps=3, window=40)
    hook = Spikes(TrainerConfig(steps=200, log_every=log_every, spike=config), warns)
    losses = falling(200)
    losses[100:110] = [4.5] * 10
    for number, loss in enumerate(losses, 1):
        hook.after_step(Step(number, torch.tensor(loss), torch.tensor(0.5), 1e-3, number == 200))
    return hook


def test_what_is_done_about_it(caplog: pytest.LogCaptureFixture) -> None:
    run(OnSpike.ignore)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        run(OnSpike.warn)
        run(OnSpike.warn, warns=False)  # all ranks but one
    (record,) = caplog.records
    assert "step 103: loss 4.5" in record.getMessage()
    with pytest.raises(TrainingError, match=r"step 103.*rollback") as stopped:
        run(OnSpike.stop)
    assert not isinstance(stopped.value, BadNumbersError)
    with pytest.raises(BadNumbersError, match="step 103") as back:
        run(OnSpike.rollback)
    assert back.value.good == 100


def test_steps_of_a_past_that_was_undone_are_forgotten() -> None:
    config = SpikeConfig(action=OnSpike.rollback, deviations=6, steps=3, window=40)
    hook = Spikes(TrainerConfig(steps=200, log_every=10, spike=config))

    def feed(number: int, loss: float) -> None:
        hook.after_step(Step(number, torch.tensor(loss), torch.tensor(0.5), 1e-3, False))

    for number in range(1, 101):
        feed(number, 2.0 + number % 2 / 100)
    for number in range(101, 104):
        feed(number, 9.0)
    for number in range(91, 131):  # went back meanwhile
        feed(number, 2.0)
