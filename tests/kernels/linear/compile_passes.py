"""Compile the passes for a GPU that need not be there, and say what ptxas made of them.

Run as a script, in its own process, because the tests around it import the same kernels for the
interpreter: `python compile_passes.py 90` prints one JSON line per capability and kernel.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.linear import kernel
from kernels.linear.tiles import cast_block, pass_tile
from tests.kernels.attention.compile_kernels import resources

GPU = torch.device("cuda")
PASSES = {
    "gelu": ("gelu_backward", {"a_ptr": None}),
    "gelu again": ("gelu_backward", {}),
    "gelu without sums": ("gelu_backward", {"a_ptr": None, "sums_ptr": None}),
    "swiglu": ("swiglu_backward", {"a_ptr": None, "sums_ptr": None}),
    "swiglu again": ("swiglu_backward", {"sums_ptr": None}),
    "swiglu again, sums": ("swiglu_backward", {}),
    "column sums": ("column_sums", {}),
    "cast": ("cast", {}),
}


def compile_for(capability: int, case: str) -> dict[str, object]:
    name, constants = PASSES[case]
    tile = pass_tile(GPU, gated=name == "swiglu_backward", sums="sums_ptr" not in constants)
    sizes = {"N": "i32", "F": "i32", "rows_each": "i32"}
    signature = {
        "gelu_backward": {
            "d_ptr": "*bf16", "z_ptr": "*bf16", "a_ptr": "*bf16", "sums_ptr": "*fp32", **sizes,
        },
        "swiglu_backward": {
            "d_ptr": "*bf16", "z_ptr": "*bf16", "dz_ptr": "*bf16", "a_ptr": "*bf16",
            "sums_ptr": "*fp32", **sizes,
        },
        "column_sums": {"x_ptr": "*bf16", "sums_ptr": "*fp32", **sizes},
        "cast": {
            "weight_ptr": "*fp32", "to_ptr": "*bf16", "bias_ptr": "*fp32", "bias_to_ptr": "*bf16",
            "n": "i32", "m": "i32",
        },
    }[name]  # fmt: skip
    if name == "cast":
        constants = {"BLOCK": cast_block(GPU)}
    else:
        constants = {"R": tile.rows, "BLOCK": tile.columns, "STAGES": tile.stages, **constants}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
        if kind != "constexpr"
    }  # fmt: skip
    source = ASTSource(getattr(kernel, f"{name}_kernel"), signature, constants, aligned)
    warps = 4 if name == "cast" else tile.warps
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    words = re.findall(r"(?:ld|st)\.global\S*\.v(\d)\.b32", compiled.asm["ptx"])
    copied = re.findall(r"cp\.async\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", compiled.asm["ptx"])
    registers, spilled = resources(compiled.asm["cubin"])
    return {
        "capability": capability, "kernel": case, "registers": registers, "spilled": spilled,
        "widest": max([4 * int(n) for n in words] + [int(n, 16) for n in copied], default=4),
        "ahead": len(copied), "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        for case in PASSES:
            sys.stdout.write(json.dumps(compile_for(number, case)) + "\n")
