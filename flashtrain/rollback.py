"""Back to the newest checkpoint from before the numbers went bad, and on without that data.

PaLM's remedy for loss spikes (Chowdhery et al. 2022, section 5.1), which also serves for gradients
that are not finite. Step s then no longer trains on global batch s: the batches between are left
out for good. The list of them is kept in every later checkpoint, so a run that resumes, on whatever
layout, reads what the uninterrupted one would have read.
"""

import logging

from flashtrain import checkpoint
from flashtrain.checkpoint.shelf import set_aside_later
from flashtrain.run import Run
from flashtrain.trainer import BadNumbersError, TrainingError

log = logging.getLogger("flashtrain.rollback")

Window = list[int]  # [first, stop]: global batches first ... stop - 1 are left out


def batch_of(step: int, skipped: list[Window]) -> int:
    """The step-th (from 0) of the global batches that are not left out. Windows may overlap."""
    batch = step
    end = 0  # of the windows so far
    for first, stop in sorted(skipped):
        if batch < first:
            break
        batch += max(0, stop - max(first, end))
        end = max(end, stop)
    return batch


class Rollback:
    """See `trainer.Past`."""

    def __init__(self, run: Run, first: int) -> None:
        """first: steps done when this start began, as `run.resume` says."""
        self.run, self.first = run, first

    def batch(self, step: int) -> int:
        return batch_of(step, self.run.skipped)

    def go_back(self, bad: BadNumbersError, done: int) -> int:
        """Collective. Weights, optimizer, RNG and metrics become those of the checkpoint.

        Raises TrainingError where there is no checkpoint from before, or after
        `trainer.rollbacks` of them.
        """
        run = self.run
        used, most = len(run.skipped), run.config.trainer.rollbacks
        if used >= most:
            raise TrainingError(f"{bad}; the run went back {used} times (trainer.rollbacks={most})")
        folder = run.folder / "checkpoints"
        run.saver.finish()  # one that is being written may be what to go back to, or to put aside
        if run.mesh.rank == 0:
            set_aside_later(folder, bad.good)
        run.peers.broadcast(None)  # the others look once the later ones are out of sight
        path = checkpoint.find_latest(folder, run.peers)
        # one that an earlier run left here is not of this run's past
        mine = path is not None and (self.first > 0 or run.owns(path))
        if not run.peers.broadcast(mine):
            raise TrainingError(f"{bad}; there is no checkpoint of this run to go back to")
        assert path is not None
        before = run.skipped
        step = int(run.restore(path)["step"])
        window = [batch_of(step, before), batch_of(done - 1, before) + 1]
        run.skipped = [*before, window]  # the checkpoint may not know of all
        if run.mesh.rank == 0:
            run.trackers.files.cut(step)
            log.warning(
                "%s; back to step %d (rollback %d of %d), and on without batches %d to %d",
                bad, step, used + 1, most, window[0], window[1] - 1,
            )  # fmt: skip
        return step
