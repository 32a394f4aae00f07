"""Weak and strong scaling by the same formulas: the best layout at every number of GPUs.

weak     the batch grows with the GPUs: each always has the same number of sequences
strong   the batch of the config, however many GPUs share it

Every GPU and link is taken to be as fast as the next: no stragglers, no congestion, no failures,
which real clusters of thousands have.
"""

import dataclasses
from dataclasses import dataclass

from flashtrain.config import Config
from flashtrain.planning.gpus import Cluster
from flashtrain.planning.layouts import Degrees, Plan, best

MOST = 4096  # GPUs
PER_GPU = 4  # sequences of a GPU and step under weak scaling


@dataclass(frozen=True)
class Curve:
    """Of one config and kind, over growing numbers of GPUs; those on which nothing fits are left
    out."""

    name: str
    kind: str  # weak or strong
    plans: tuple[Plan, ...]

    def per_gpu(self) -> list[float]:
        """Tokens per second and GPU."""
        return [plan.tokens_per_second / plan.gpus for plan in self.plans]


def scaling(
    config: Config, cluster: Cluster, named: Degrees | None = None, most: int = MOST
) -> tuple[Curve, Curve]:
    """Weak and strong, at powers of two from one GPU to `most`."""
    curves = []
    for kind in ("weak", "strong"):
        plans = []
        gpus = 1
        while gpus <= most:
            sized = config
            if kind == "weak":
                data = dataclasses.replace(config.data, batch_size=PER_GPU * gpus)
                sized = dataclasses.replace(config, data=data)
            if (plan := best(sized, gpus, cluster, named)) is not None:
                plans.append(plan)
            gpus *= 2
        curves.append(Curve(config.name, kind, tuple(plans)))
    return curves[0], curves[1]
