"""How the processes of a run begin: one configuration for all, one device each, one group.

Rank 0 composes and checks; the others receive its plain JSON through the store that torchrun
already runs, so no rank can disagree about a time stamp or a default, no worker composes twice,
and a refusal ends every rank with one line from rank 0. No GPU is touched before that.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from flashtrain.compose import from_dict, load, resolve
from flashtrain.config import Config, to_dict
from flashtrain.data.source import prepare_source
from flashtrain.door import admit
from flashtrain.launch import REFUSED

# a collective that waits longer than this is a hang, unless ranks compile or save meanwhile
TIMEOUT = timedelta(minutes=10)


def start(arguments: list[str]) -> tuple[Config, torch.device]:
    """Agree on the configuration, join the process group, pick this rank's device.

    arguments: Hydra overrides, or `--config PATH` of a resolved configuration. Exits with status 2
    on every rank when rank 0 refuses it.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    store = None
    if world > 1:
        store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    message = json.dumps(_compose(arguments, world)) if rank == 0 else ""
    if store is not None:
        if rank == 0:
            store.set("flashtrain/config", message)
        message = store.get("flashtrain/config").decode()
    answer = json.loads(message)
    if "refused" in answer:
        if rank == 0:
            print(f"flashtrain: {answer['refused']}", file=sys.stderr)
        sys.exit(REFUSED)
    config = from_dict(answer["config"])
    if local_rank == 0 and rank != 0:
        prepare_source(config, world)  # another node's disk may not hold the tokens
    device = pick_device(local_rank)
    if store is not None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("flashtrain", store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        dist.barrier()
    return config, device


def pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _compose(arguments: list[str], world: int) -> dict[str, object]:
    """The answer rank 0 gives to all: {"config": tree} or {"refused": sentence}."""
    try:
        if arguments[:1] == ["--config"]:
            config = resolve(from_dict(json.loads(Path(arguments[1]).read_text())), world)
        else:
            config = load(arguments, world)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return {"config": to_dict(admit(config, world, local))}
    except (ValueError, OSError) as error:
        return {"refused": str(error)}
