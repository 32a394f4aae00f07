"""What happens between steps: log, evaluate, sample, save. Each hook runs on every rank."""

import logging
import math
from collections.abc import Callable, Iterator

from torch import Tensor

from flashtrain import checkpoint
from flashtrain.benchmark import Row, as_metrics, on_tasks, on_texts
from flashtrain.config import OnBadSteps
from flashtrain.data.loader import Batch, DataLoader
from flashtrain.examinee import Examinee
from flashtrain.model.generate import complete
from flashtrain.model.sampling import Sampling
from flashtrain.run import Run
from flashtrain.trainer import BadNumbersError, Progress, Step, TrainingError

log = logging.getLogger("flashtrain.hooks")


def _due(step: Step, every: int) -> bool:
    return step.number % every == 0 or step.last


class Log:
    """Reads loss and norm, which waits for the device: only every `trainer.log_every` steps."""

    def __init__(self, run: Run, loader: DataLoader) -> None:
        self.run, self.loader = run, loader
        # steps whose gradient was not finite, since the start and in a row up to now; these stay on
        # the device, as the norm does
        self.bad: Tensor | int = 0
        self.bad_in_a_row: Tensor | int = 0

    def after_step(self, step: Step) -> None:
        trainer = self.run.config.trainer
        bad = (~step.gradient_norm.isfinite()).long()
        self.bad = self.bad + bad
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        logs, skips = _due(step, trainer.log_every), self.run.engine.skips_bad_steps
        if not logs and (skips or not self._may_be_saved(step)):
            return
        loss, norm, in_a_row = float(step.loss), float(step.gradient_norm), int(self.bad_in_a_row)
        if in_a_row >= (trainer.bad_steps if skips else 1):
            sentence = (
                f"step {step.number}: loss is {loss} and gradient norm {norm}, {in_a_row} steps in "
                "a row"
            )
            if trainer.on_bad_steps is OnBadSteps.rollback:
                self.bad_in_a_row = 0
                raise BadNumbersError(sentence, good=step.number - in_a_row)
            raise TrainingError(
                f"{sentence}, so nothing further is saved; checkpoints in {self.run.folder} are "
                "from before: lower optimizer.lr or raise schedule.warmup_steps"
            )
        if not math.isfinite(loss) and math.isfinite(norm):  # no step is skipped for it
            raise TrainingError(
                f"step {step.number}: loss is {loss} with a gradient norm of {norm}: look for "
                "token ids beyond model.vocabulary in the data; checkpoints in "
                f"{self.run.folder} may have been trained on them"
            )
        if not logs:
            return
        n_bad = int(self.bad)
        if in_a_row and self.run.mesh.rank == 0:  # all ranks know it
            log.warning("step %d: gradient norm %s, so the step is skipped", step.number, norm)
        self.run.trackers.log(
            step.number,
            {
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/lr": step.learning_rate,
                **({"train/skipped_steps": n_bad} if n_bad else {}),
                **self.run.speed.read(
                    step.number, self.loader.data_time, self.loader.ramp.tokens(step.number)
                ),
                **self.loader.counters(step.number),
            },
        )

    def _may_be_saved(self, step: Step) -> bool:
        """A step that went bad and was not skipped is in the weights, and they would push the good
        checkpoints out. A run that is told to stop in an evaluation saves as well."""
        trainer = self.run.config.trainer
        often = (self.run.config.checkpoint.every, trainer.evaluate_every, trainer.benchmark.every)
        return any(_due(step, every) for every in often)


class Between:
    """Asked between the batches of an evaluation, which may be long: the watch hears that it goes
    on, and a run that is told to stop leaves it undone and saves."""

    def __init__(self, progress: Progress, interrupted: Callable[[], str | None]) -> None:
        """interrupted: as the trainer's; collective."""
        self.progress, self.interrupted = progress, interrupted
        self.stopped = False

    def told(self, step: Step, what: str) -> bool:
        """Whether all ranks stop now; then `step` is the last one."""
        self.progress.at(f"{what} after step {step.number}", stepping=False)
        why = self.interrupted()
        if why is not None:
            step.interrupted, step.last, self.stopped = why, True, True
        return self.stopped


class Evaluate:
    """Loss and perplexity on the same held-out sequences each time, whatever the layout."""

    def __init__(self, run: Run, loader: DataLoader, between: Between) -> None:
        self.run, self.loader, self.between = run, loader, between

    def after_step(self, step: Step) -> None:
        trainer = self.run.config.trainer
        if step.interrupted or not _due(step, trainer.evaluate_every):
            return
        with self.run.speed.pause():
            loss = float(self.run.engine.evaluate(self._batches(step, trainer.evaluate_sequences)))
        if self.between.stopped:
            return
        self.run.evaluated = (step.number, loss)
        self.run.trackers.log(
            step.number,
            {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))},
        )

    def _batches(self, step: Step, n_sequences: int) -> Iterator[Batch]:
        for batch in self.loader.evaluation(n_sequences):
            if self.between.told(step, "the evaluation"):
                return
            yield batch


class _ToldToStop(ValueError):
    """Of a benchmark's batch, on all ranks; a ValueError is what ranks that answer get over."""


class Benchmark:
    """Perplexity of texts and lm-eval's tasks, as `trainer.benchmark` names them."""

    def __init__(self, run: Run, between: Between) -> None:
        self.run, self.between = run, between
        self.config = run.config.trainer.benchmark

    def after_step(self, step: Step) -> None:
        wanted = self.config.texts or self.config.tasks
        if not wanted or step.interrupted or not _due(step, self.config.every):
            return
        assert self.run.tokenizer is not None  # see door.py
        generators = checkpoint.rng_state()  # lm-eval seeds them all
        with self.run.speed.pause():
            examinee = Examinee(
                self.run.engine.decoder(),
                self.run.tokenizer,
                self.run.config.data.sequence_length,
                peers=self.run.peers,
                moved=lambda: self._ask(step),
            )
            rows = examinee.examine(lambda: self._measure(examinee, step))
        checkpoint.set_rng_state(generators)
        if rows and not self.between.stopped:
            self.run.trackers.log(step.number, as_metrics(rows))

    def _measure(self, examinee: Examinee, step: Step) -> list[Row]:
        try:
            return [*on_texts(examinee, self.config.texts), *on_tasks(examinee, self.config)]
        except RuntimeError:  # of the model: other ranks may wait for this one
            raise
        except Exception as error:  # of data sets, of the network, of a task's own code
            what = f"{type(error).__name__}: {error}"
            if not self.between.stopped:
                log.warning("the benchmark after step %d failed: %s", step.number, what)
            return []

    def _ask(self, step: Step) -> None:
        if self.between.told(step, "the benchmark"):
            raise _ToldToStop


class Sample:
    """A paragraph from the model as it is now. Ranks that share the model draw alike."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_step(self, step: Step) -> None:
        trainer, tokenizer = self.run.config.trainer, self.run.tokenizer
        if tokenizer is None or step.interrupted or not _due(step, trainer.sample_every):
            return
        with self.run.speed.pause():
            prompt = tokenizer.encode(trainer.sample_prompt) or [tokenizer.end_of_text]
            (drawn,) = complete(
                self.run.engine.decoder(),
                [prompt],
                trainer.sample_tokens,
                max_length=self.run.config.data.sequence_length,
                sampling=Sampling(temperature=0.8, seed=self.run.config.seed + step.number),
                n_ids=tokenizer.size,
            )
        self.run.trackers.text(step.number, "sample", tokenizer.decode(prompt + drawn))


class Save:
    """A checkpoint every `checkpoint.every` steps, at the end and before an interruption.

    A full disk costs a checkpoint, not the run: only the last one is waited for and must succeed.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.prepared = False

    def after_step(self, step: Step) -> None:
        if not self.prepared:
            self.run.prepare_saving()
            self.prepared = True
        self.run.report_saved(step.number)
        if _due(step, self.run.config.checkpoint.every):
            with self.run.speed.pause():
                self.run.save(step.number, wait=step.last)
        if step.interrupted:
            self.run.interrupted(step.number, step.interrupted)
