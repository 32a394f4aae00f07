"""Run a check in several CPU processes that talk over gloo.

The ranks fork from one clean server that has torch imported already: 4 ranks start in about 1 s on
two cores, where `spawn` imports torch in each of them and takes 40 s. They meet at a file, because
a free port is only free until another test takes it.
"""

import datetime
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120  # seconds a rank may take; a hang becomes a failure

# what most ranks need, by measured import time (s): torch 1.5, the compiler 3, config's hydra 0.5
mp.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.multiprocessing", "torch._dynamo", "flashtrain.config"]
)


def run_ranks(
    check: Callable[..., None],
    world_size: int,
    tmp_path: Path,
    *args: object,
    backend: str = "gloo",
    limit: int = LIMIT,
) -> None:
    """Call `check(*args)` in `world_size` processes; `check` must be a module-level function.

    Fails with the first failing rank's traceback, or with TimeoutError after `limit` seconds.
    `tmp_path` may serve several calls, one after the other.
    """
    store = f"file://{tmp_path}/store-{uuid.uuid4().hex}"  # a used store would never rendezvous
    job = (world_size, store, backend, limit, check, args)
    ranks = mp.start_processes(
        _rank_main, job, nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + limit
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{check.__name__} on {world_size} ranks ran past {limit} s")
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    backend: str,
    limit: int,
    check: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)  # the ranks share the machine's cores
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=limit),
        device_id=device,
    )
    try:
        check(*args)
        dist.barrier()  # a rank that leaves early breaks the others' connections
    finally:
        dist.destroy_process_group()
