"""Train: `torchrun ... -m flashtrain.train key=value ...`, the same line for one GPU or a thousand.

`scripts/train.sh` makes the environment and starts this on every GPU of one machine.
"""

import sys
from contextlib import closing
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from flashtrain.build import build_engine
from flashtrain.checkpoint import CheckpointError
from flashtrain.config import Config, ConfigError
from flashtrain.data.shards import DataError
from flashtrain.data.source import open_loader
from flashtrain.determinism import checked
from flashtrain.hooks import Benchmark, Between, Evaluate, Log, Sample, Save
from flashtrain.interruption import Interruption
from flashtrain.launch import REFUSED, STOPPED, leave
from flashtrain.parallel.mesh import mesh_of
from flashtrain.profiling import Profile, out_of_memory
from flashtrain.rollback import Rollback
from flashtrain.run import Run
from flashtrain.schedule import learning_rate
from flashtrain.spikes import Spikes
from flashtrain.startup import collective_timeout, say_why, start
from flashtrain.trainer import Hook, Trainer, TrainingError
from flashtrain.watch import HANGS, Watch


def train(config: Config, device: torch.device, store: Store | None = None) -> None:
    """One run from its newest checkpoint, or from its seed, to its end. Collective."""
    mesh = mesh_of(config.parallel, collective_timeout(config))
    engine = build_engine(config, mesh, device)
    loader = open_loader(config, mesh.data.rank, mesh.data.size, device)
    rates = partial(
        learning_rate,
        steps=config.trainer.steps,
        peak=config.optimizer.lr,
        schedule=config.schedule,
    )
    interruption = Interruption(config.trainer.time_limit)
    run = Run(config, engine, mesh, device)
    watch = Watch(run.folder / HANGS, mesh.rank, config.trainer, interruption, store, run.saving)
    with closing(engine), interruption, loader, run, watch:
        first = run.resume()
        between = Between(watch, interruption.agreed)
        spikes = Spikes(config.trainer, warns=mesh.rank == 0)
        hooks: list[Hook] = [Profile(run, loader), Log(run, loader), spikes]
        hooks += [Evaluate(run, loader, between), Benchmark(run, between), Sample(run), Save(run)]
        trained = checked(engine, config.trainer.check_determinism, run.peers)
        past = Rollback(run, first)
        trainer = Trainer(trained, loader, rates, hooks, interruption.agreed, past, watch)
        trainer.fit(first, min(config.trainer.steps, config.trainer.stop_at or sys.maxsize))


def main(arguments: list[str]) -> int:
    config, device, store = start(arguments)
    try:
        train(config, device, store)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        say_why(error, store)
        return REFUSED
    except torch.OutOfMemoryError as error:  # on this rank: torchrun ends the others
        print(f"flashtrain: {out_of_memory(config, error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
