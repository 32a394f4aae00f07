"""Compile the decoding kernels for a GPU that need not be there: memory, registers, spills.

Run as a script, in its own process: `python compile_decode.py '<json list of jobs>'` prints one
JSON line per kernel. As compile_kernels.py: what is compiled is what the host code would launch.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kernels.attention import decode_tiles
from kernels.attention.portable import decode as module
from kernels.attention.portable.launch import Features
from tests.kernels.attention.compile_kernels import compile_launch

# sizes the kernels are not specialized for: neither 1 nor a multiple of 16
B, H_KV, ROOM, SPLITS, WINDOW = 3, 3, 200, 40, 100


@dataclass
class Job:
    """Compile both kernels of one call."""

    capability: tuple[int, int]
    head_size: int
    v_head_size: int = 0  # 0: the same
    dtype: str = "bfloat16"
    rows: int = 16  # tokens x grouped heads, filling the query tile
    page: int = 0
    everything: bool = False  # window, softcap, sinks and ALiBi


def record(job: Job) -> Iterator[tuple[Any, list[Any], dict[str, Any], int]]:
    """The launches of a call: kernel, arguments, keyword arguments, estimate of shared memory."""
    launches: list[tuple[Any, list[Any], dict[str, Any]]] = []
    for kernel in (module.attention_decode_kernel, module.attention_decode_merge_kernel):

        def run(*args: Any, grid: Any, warmup: bool, kernel: Any = kernel, **kwargs: Any) -> None:
            launches.append((kernel, list(args), kwargs))

        kernel.run = run
    dtype = getattr(torch, job.dtype)
    D, DV = job.head_size, job.v_head_size or job.head_size
    T, H = job.rows // 4, 4 * H_KV
    table = torch.zeros(B, 16, dtype=torch.int32) if job.page else None
    shape = (40, job.page, H_KV) if job.page else (B, ROOM, H_KV)
    k, v = torch.zeros(*shape, D, dtype=dtype), torch.zeros(*shape, DV, dtype=dtype)
    features = Features(0.1, before=-1, after=0)
    if job.everything:
        numbers = torch.zeros(H)
        features = Features(
            0.1, before=WINDOW, after=0, softcap=20.0, alibi_slopes=numbers, sinks=numbers
        )
    capability = tuple(job.capability)
    rows = decode_tiles.query_rows(job.rows, dtype)
    tile = decode_tiles.choose_for(capability, rows, D, DV, dtype)
    estimate = decode_tiles.shared_bytes(capability, tile, rows, D, DV, dtype)
    q, lengths = torch.zeros(B, T, H, D, dtype=dtype), torch.zeros(B, dtype=torch.int32)
    module.decode(q, k, v, lengths, table, features, tile=tile, n_splits=SPLITS)
    for launch in launches:
        yield *launch, estimate


def compile_jobs(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        for kernel, args, kwargs, estimate in record(job):
            compiled = compile_launch(kernel, args, kwargs, tuple(job.capability))
            yield {**asdict(job), **asdict(compiled), "estimate": estimate}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    for line in compile_jobs([Job(**job) for job in json.loads(sys.argv[1])]):
        sys.stdout.write(json.dumps(line) + "\n")
