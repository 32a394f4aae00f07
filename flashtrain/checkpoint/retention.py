"""Which checkpoints of a run stay on disk: the newest, every n-th step, the best."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALUATION = "evaluation_loss"  # in the meta of a checkpoint whose very step was evaluated


@dataclass(frozen=True)
class Retention:
    newest: int = 2
    every: int | None = None  # checkpoints of steps that it divides stay for ever
    best: int = 0  # this many of the lowest evaluation loss stay too; of equals the earlier

    def surplus(self, steps: dict[Path, int]) -> list[Path]:
        """Those of these checkpoints, by step, that nothing asks to keep; oldest first."""
        ordered = sorted(steps, key=lambda path: steps[path])
        kept = set(ordered[-self.newest :])
        if self.every is not None:
            kept |= {path for path in ordered if steps[path] % self.every == 0}
        if self.best:
            losses = {path: evaluation_loss(path) for path in ordered}
            rated = [path for path in ordered if losses[path] < math.inf]
            kept |= set(sorted(rated, key=lambda path: losses[path])[: self.best])
        return [path for path in ordered if path not in kept]


NEWEST = Retention()


def evaluation_loss(path: Path) -> float:
    """Of the model in a checkpoint; infinity where it was not evaluated or cannot be read."""
    try:
        loss: Any = json.loads((path / "state.json").read_bytes())["meta"].get(EVALUATION)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return math.inf
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf
