"""Smaller batches and shorter sequences at the start of a run, by token count.

A shorter sequence is a part of a whole one: samples stay `sequence_length` long and are cut into
equal parts when they are handed out, so the order of the data and the tokens of a step do not
depend on it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from flashtrain.data.mapped import DataError


@dataclass(frozen=True)
class Stage:
    """What steps from `first_step` on are made of; `first_sample` is the first one's first."""

    first_step: int
    first_sample: int
    batch_size: int  # samples, whole ones
    length: int  # tokens of the sequences they are cut into


class Ramp:
    """Optimizer step -> its samples, in closed form."""

    def __init__(
        self,
        batch_size: int,
        sequence_length: int,
        early: Sequence[tuple[int, int | None, int | None]] = (),
    ) -> None:
        """batch_size, sequence_length: the final ones.

        early: (until how many tokens, batch size, length) in order; None is the final one. A stage
        ends with the first step that reaches its token count.
        """
        self.sequence_length = sequence_length
        stages: list[Stage] = []
        step = sample = reached = 0
        for until, batch, length in early:
            batch = batch_size if batch is None else batch
            length = sequence_length if length is None else length
            if until <= reached:
                raise DataError(
                    f"data.ramp goes until {until:,} tokens after {reached:,}: each stage must end "
                    "after the one before"
                )
            if batch < 1 or length < 1:
                raise DataError(
                    f"a stage of data.ramp has batch_size={batch} and sequence_length={length}: "
                    "both must be above 0"
                )
            if length > sequence_length or sequence_length % length:
                raise DataError(
                    f"sequences of {length} tokens in data.ramp do not divide "
                    f"data.sequence_length={sequence_length}"
                )
            reached = until
            stages.append(Stage(step, sample, batch, length))
            steps = max(0, -(-(-(-until // sequence_length) - sample) // batch))
            step, sample = step + steps, sample + steps * batch
        self.stages = [*stages, Stage(step, sample, batch_size, sequence_length)]
        self._first_steps = [stage.first_step for stage in self.stages]

    def stage(self, step: int) -> Stage:
        return self.stages[bisect_right(self._first_steps, step) - 1]

    def first_sample(self, step: int) -> int:
        """Samples of all steps before `step`."""
        stage = self.stage(step)
        return stage.first_sample + (step - stage.first_step) * stage.batch_size

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        return self.first_sample(steps) * self.sequence_length
