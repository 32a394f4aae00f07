"""How the processes of a run begin: one configuration for all, one device each, one group.

Rank 0 composes and checks; the others receive its plain JSON through the store that torchrun
already runs, so no rank can disagree about a time stamp or a default, no worker composes twice,
and a refusal ends every rank with one line from rank 0. No GPU is touched before that.
"""

import hashlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from flashtrain.claim import claim
from flashtrain.compose import from_dict, load, resolve
from flashtrain.config import Config, ConfigError, to_dict
from flashtrain.data.source import prepare_source
from flashtrain.door import admit
from flashtrain.launch import REFUSED
from flashtrain.meeting import meet
from flashtrain.watch import HANGS

OWN_WORD_S = 1.0  # for rank 0 to say first what all ranks were about to say
TIMEOUT = timedelta(minutes=10)  # for ranks to meet, and for rank 0 to look at config and data


def start(arguments: list[str]) -> tuple[Config, torch.device, Store | None]:
    """Agree on the configuration, join the process group, pick this rank's device.

    arguments: Hydra overrides, or `--config PATH` of a resolved configuration. Exits with status 2
    on every rank when rank 0 refuses it. The store is one that only the ranks of this start know;
    None for one process.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    store = None
    if world > 1:
        store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    message = json.dumps(_compose(arguments, world)) if rank == 0 else ""
    if store is not None:
        store = meet(store, rank, world, TIMEOUT)
        if rank == 0:
            store.set("config", message)
        message = store.get("config").decode()
    answer = json.loads(message)
    if "refused" in answer:
        if rank == 0:
            print(f"flashtrain: {answer['refused']}", file=sys.stderr)
        sys.exit(REFUSED)
    config = from_dict(answer["config"])
    record_collectives(config)
    if local_rank == 0 and rank != 0:
        try:
            prepare_source(config, world)  # another node's disk may not hold the tokens
        except (ValueError, OSError) as error:
            print(f"flashtrain: on {socket.gethostname()}: {error}", file=sys.stderr)
            sys.exit(REFUSED)
    device = pick_device(local_rank)
    if store is not None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=collective_timeout(config),
            device_id=device if device.type == "cuda" else None,
        )
        dist.barrier()
    return config, device, store


def say_why(error: Exception, store: Store | None) -> None:
    """One line for what ends the run, whether all ranks raise it or one alone, such as the one
    whose node has lost its tokens. store: of this start, as `start` gives it."""
    first = True
    if store is not None and dist.get_rank() != 0:
        time.sleep(OWN_WORD_S)
    if store is not None:
        try:
            first = store.add(f"said/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # rank 0's process is gone, and has said why
            first = False
    if first or dist.get_rank() == 0:
        print(f"flashtrain: {error}", file=sys.stderr, flush=True)


def collective_timeout(config: Config) -> timedelta:
    """Later than the watch (watch.py), which says more than PyTorch's own time-out does."""
    return timedelta(minutes=config.trainer.hang_timeout + 2)


def record_collectives(config: Config) -> None:
    """Have PyTorch remember the latest collectives, also should NCCL's own watchdog come first.

    It reads these when the process group begins, and dumps on a time-out unless told not to.
    """
    assert config.run_dir is not None
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{config.run_dir}/{HANGS}/nccl-rank-")


def pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _need_devices(processes: int) -> None:
    """ConfigError for more processes of this machine than it has GPUs, if it has any."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes > there:
        raise ConfigError(
            f"{processes} processes on {socket.gethostname()}, which has {there} GPUs for them: "
            "start one for each, or name more GPUs in CUDA_VISIBLE_DEVICES"
        )


def _compose(arguments: list[str], world: int) -> dict[str, object]:
    """The answer rank 0 gives to all: {"config": tree} or {"refused": sentence}."""
    try:
        if arguments[:1] == ["--config"]:
            config = resolve(from_dict(json.loads(Path(arguments[1]).read_text())), world)
        else:
            config = load(arguments, world)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        _need_devices(local)
        config = admit(config, world, local)
        assert config.run_dir is not None
        claim(Path(config.run_dir))
        return {"config": to_dict(config)}
    except (ValueError, OSError) as error:
        return {"refused": str(error)}
