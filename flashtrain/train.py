"""Train: `torchrun ... -m flashtrain.train key=value ...`, the same line for one GPU or a thousand.

`scripts/train.sh` makes the environment and starts this on every GPU of one machine.
"""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from flashtrain.build import build_engine
from flashtrain.checkpoint import CheckpointError
from flashtrain.config import Config, ConfigError
from flashtrain.data.shards import DataError
from flashtrain.data.source import open_loader
from flashtrain.hooks import Evaluate, Log, Sample, Save, TrainingError
from flashtrain.interruption import Interruption
from flashtrain.launch import REFUSED, STOPPED
from flashtrain.parallel.mesh import build_mesh
from flashtrain.run import Run
from flashtrain.schedule import learning_rate
from flashtrain.startup import TIMEOUT, start
from flashtrain.trainer import Hook, Trainer


def train(config: Config, device: torch.device) -> None:
    """One run from its newest checkpoint, or from its seed, to its end. Collective."""
    parallel = config.parallel
    assert parallel.tensor is not None and parallel.shard is not None
    mesh = build_mesh(
        parallel.tensor, TIMEOUT, parallel.shard, parallel.context, parallel.shard_context
    )
    engine = build_engine(config, mesh, device)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, device)
    rates = partial(
        learning_rate,
        steps=config.trainer.steps,
        peak=config.optimizer.lr,
        schedule=config.schedule,
    )
    interruption = Interruption(config.trainer.time_limit)
    with interruption, loader, Run(config, engine, mesh, device) as run:
        first = run.resume()
        hooks: list[Hook] = [Log(run, loader), Evaluate(run, loader), Sample(run), Save(run)]
        trainer = Trainer(engine, loader, rates, hooks, interruption.agreed)
        trainer.fit(first, min(config.trainer.steps, config.trainer.stop_at or sys.maxsize))


def main(arguments: list[str]) -> int:
    config, device = start(arguments)
    try:
        train(config, device)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:  # on all ranks alike
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"flashtrain: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
