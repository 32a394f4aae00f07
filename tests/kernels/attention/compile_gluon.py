"""Compile a Hopper launch for sm_90, where no GPU need be, and read what ptxas made of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.hopper.launch import OPTIONS, Launch, Tensors

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass
class Built:
    """One compiled kernel."""

    shared: int  # bytes of shared memory
    partitions: int  # of warp_specialize, beside the default one
    sass: list[tuple[int, str]]  # (address, instruction)
    log: str  # of ptxas

    def count(self, name: str) -> int:
        return sum(name in text for _, text in self.sass)

    @property
    def spilled(self) -> int:
        """Bytes of registers per thread that ptxas stores away somewhere."""
        found = re.search(r"(\d+) bytes spill stores", self.log)
        assert found, self.log
        return int(found[1])

    def hot_loops(self) -> list[list[str]]:
        """The innermost loops that multiply."""
        spans = []
        for address, text in self.sass:
            jump = re.match(r"@!?U?P\d+ +BRA.* `?\(?(0x[0-9a-f]+)", text)
            if jump and int(jump[1], 16) < address:
                spans.append((int(jump[1], 16), address))
        bodies = {
            span: [text for at, text in self.sass if span[0] <= at <= span[1]] for span in spans
        }
        loops = [span for span, body in bodies.items() if any("HGMMA" in text for text in body)]
        return [
            bodies[a]
            for a in loops
            if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)
        ]


def compile_launch(launch: Launch, tensors: Tensors) -> Built:
    """Compile what `launch.run(tensors)` would, for tensors on any device."""
    kernel = launch.kernel
    bound = launch.bind(tensors)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        signature[name] = "constexpr" if parameter.is_constexpr else _kind(value)
        if signature[name] == "constexpr":
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel, signature, constants, attributes
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=OPTIONS)
    sass, log = _assemble(compiled.asm["ptx"])
    partitions = len(re.findall(r"^\s*partition\d+\(", compiled.asm["ttgir"], re.MULTILINE))
    return Built(compiled.metadata.shared, partitions, sass, log)


def _kind(value: Any) -> str:
    """Triton's name for an argument's type, as its launcher would find it."""
    if value is None:
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _assemble(ptx: str) -> tuple[list[tuple[int, str]], str]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        ptxas = [tools / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", cubin]
        log = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
        dump = [tools / "cuobjdump", "-sass", cubin]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text)
    return [(int(address, 16), instruction) for address, instruction in lines], log
