"""Loss spikes: several losses in a row far above the median of those before them.

Median and median distance from it, because a mean and a variance would already be moved by what
they are to detect. Losses are read when the run logs, which waits for the device anyhow.
"""

import logging
import math
from collections import deque
from statistics import median

import torch
from torch import Tensor

from flashtrain.config import OnSpike, SpikeConfig, TrainerConfig
from flashtrain.trainer import BadNumbersError, Step, TrainingError

log = logging.getLogger("flashtrain.spikes")

ROBUST = 1.4826  # median distance from the median -> standard deviation, for a normal distribution
LEAST = 1e-3  # of the median: a smaller deviation than this is none, however still the loss stood


class Detector:
    """Fed with one loss after the other."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.calm: deque[float] = deque(maxlen=config.window)
        self.high = 0  # losses above the limit, in a row up to now

    def limit(self) -> float:
        """Losses above it are high; infinite before enough are known."""
        if len(self.calm) < max(2, self.config.window // 2):
            return math.inf
        middle = median(self.calm)
        deviation = ROBUST * median(abs(loss - middle) for loss in self.calm)
        return middle + self.config.deviations * max(deviation, LEAST * abs(middle))

    def sees(self, loss: float) -> bool:
        """Whether `loss` completes a spike. Then it forgets all, and learns the new level."""
        if not loss > self.limit():  # NaN too: bad steps are counted elsewhere
            if math.isfinite(loss):
                self.calm.append(loss)
            self.high = 0
            return False
        self.high += 1
        if self.high < self.config.steps:
            return False
        self.forget()
        return True

    def forget(self) -> None:
        self.calm.clear()
        self.high = 0


class Spikes:
    """See `trainer.Hook`."""

    def __init__(self, config: TrainerConfig, warns: bool = True) -> None:
        """warns: on one rank, as all see the same losses."""
        self.config, self.every, self.warns = config.spike, config.log_every, warns
        self.detector = Detector(config.spike)
        self.losses: list[Tensor] = []  # on the device, since the last reading
        self.number = 0  # of the last step

    def after_step(self, step: Step) -> None:
        if self.config.action is OnSpike.ignore:
            return
        if step.number != self.number + 1:  # the run went back
            self.losses.clear()
            self.detector.high = 0
        self.number = step.number
        self.losses.append(step.loss)
        if step.number % self.every and not step.last:
            return
        first = step.number + 1 - len(self.losses)
        losses = torch.stack(self.losses).tolist()
        self.losses.clear()
        for number, loss in enumerate(losses, first):
            limit = self.detector.limit()
            if self.detector.sees(loss):
                self._act(number, loss, limit)

    def _act(self, number: int, loss: float, limit: float) -> None:
        sentence = (
            f"step {number}: loss {loss:.4f}, and {self.config.steps} in a row above {limit:.4f}, "
            f"the median before by {self.config.deviations:g} robust deviations (trainer.spike)"
        )
        if self.config.action is OnSpike.rollback:
            raise BadNumbersError(sentence, good=number - self.config.steps)
        if self.config.action is OnSpike.stop:
            raise TrainingError(f"{sentence}: go back with trainer.spike.action=rollback")
        if self.warns:
            log.warning("%s", sentence)
