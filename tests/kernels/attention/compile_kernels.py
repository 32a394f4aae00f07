"""Compile the portable kernels for a GPU that need not be there, and say what ptxas made of them.

Run as a script, in its own process, because the tests around it import the same kernels for the
interpreter: `python compile_kernels.py '<json list of jobs>'` prints one JSON line per kernel.
The kernels are called through their own host code with the launch replaced by a recorder, so
what is compiled is what would run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention import tiles
from kernels.attention.portable import Features, backward, forward

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Job:
    """Compile every kernel of one call."""

    capability: tuple[int, int]
    head_size: int
    causal: bool = True
    dtype: str = "bfloat16"
    alibi: bool = False
    everything: bool = False  # window, softcap, sinks and documents
    value_size: int = 0  # 0: head_size
    bias: str | None = None  # the dimensions it has beside keys, of "bht"
    bias_dtype: str = "bfloat16"
    key_mask: bool = False
    dropout: float = 0.0
    T: int = 512
    S: int = 512


@dataclass
class Compiled:
    kernel: str
    shared: int  # bytes
    spilled: int  # bytes of stack per thread
    registers: int


def record(job: Job) -> list[tuple[Any, list[Any], dict[str, Any]]]:
    """The launches of a forward and a backward pass: (kernel, arguments, keyword arguments)."""
    launches = []
    dtype = getattr(torch, job.dtype)
    chosen = tiles_of(job)

    def recorder(kernel: Any) -> Any:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            launches.append((kernel, list(args), kwargs))

        return run

    kernels = {
        name: value
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("kernels.attention.portable")
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    for kernel in kernels.values():
        kernel.run = recorder(kernel)
    q = torch.zeros(2, job.T, 4, job.head_size, dtype=dtype)
    k = torch.zeros(2, job.S, 2, job.head_size, dtype=dtype)
    slopes = torch.zeros(4) if job.alibi else None
    features = Features(0.1, after=0 if job.causal else -1, alibi_slopes=slopes)
    if job.everything:
        bounds = torch.zeros(2, 2, job.T, dtype=torch.int32)
        more = {"before": 100, "softcap": 20.0, "sinks": torch.zeros(4), "bounds": bounds}
        features = replace(features, **more)
    v = torch.zeros(2, job.S, 2, job.value_size or job.head_size, dtype=dtype)
    if job.bias is not None:
        full = {"b": 2, "h": 4, "t": job.T}
        sizes = [n if name in job.bias else 1 for name, n in full.items()]
        bias = torch.zeros(*sizes, job.S, dtype=getattr(torch, job.bias_dtype))
        features = replace(features, bias=bias)
    if job.key_mask:
        seen, ends = torch.ones(2, job.S, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int32)
        features = replace(features, key_mask=seen, key_range=ends)
    if job.dropout > 0:
        features = replace(features, dropout=job.dropout, dropout_seed=torch.zeros(1).long())
    out, lse = forward(q, k, v, features, tile=chosen.forward)
    backward(
        out, None, q, k, v, out, lse, features,
        bias_gradient=job.bias is not None, tiles=chosen,
    )  # fmt: skip
    return launches


def tiles_of(job: Job) -> tiles.Tiles:
    """The tiles the host code would choose on that card."""
    widest = max(job.head_size, job.value_size)
    dtype = getattr(torch, job.dtype)
    crowded = job.bias is not None or job.dropout > 0
    return tiles.choose_for(
        tuple(job.capability), widest, dtype, causal=job.causal, crowded=crowded
    )


def compile_launch(
    kernel: Any, args: list[Any], kwargs: dict[str, Any], capability: tuple[int, int]
) -> Compiled:
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values.update(kwargs)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        signature[name] = kind_of(value, constant=name in kwargs)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = resources(compiled.asm["cubin"])
    return Compiled(kernel.fn.__name__, compiled.metadata.shared, spilled, registers)


def kind_of(value: Any, *, constant: bool) -> str:
    """Triton's name for an argument's type, as its launcher would find it."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread; with all functions inlined, stack is spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def compile_jobs(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        for kernel, args, kwargs in record(job):
            yield {**asdict(job), **asdict(compile_launch(kernel, args, kwargs, job.capability))}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    for line in compile_jobs([Job(**job) for job in json.loads(sys.argv[1])]):
        sys.stdout.write(json.dumps(line) + "\n")
