"""Compile the norm kernels for a GPU that need not be there, and say what ptxas made of them.

Run as a script, in its own process, because the tests around it import the same kernels for the
interpreter: `python compile_norms.py 90` prints one JSON line per capability, kernel and width.
"""

import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.norm import kernel
from kernels.norm.tiles import Tile, backward_tile, forward_tile
from tests.kernels.attention.compile_kernels import resources

WIDTHS = (768, 1024, 2048, 4096)
GPU = torch.device("cuda")


def compile_for(
    capability: int, kind: str, width: int, x: str, tile: Tile | None = None
) -> dict[str, object]:
    """kind: forward, backward, or again: backward that writes the norm once more, and sums."""
    name = "forward" if kind == "forward" else "backward"
    tile = tile or (forward_tile if name == "forward" else backward_tile)(width, GPU)
    signature = {
        "forward": {
            "x_ptr": f"*{x}", "branch_ptr": f"*{x}", "weight_ptr": "*fp32", "bias_ptr": "*fp32",
            "y_ptr": f"*{x}", "stream_ptr": f"*{x}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
            "N": "i32", "D": "i32", "eps": "fp32",
        },
        "backward": {
            "dy_ptr": f"*{x}", "ds_ptr": f"*{x}", "stream_ptr": f"*{x}", "weight_ptr": "*fp32",
            "bias_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": f"*{x}",
            "y_ptr": f"*{x}", "sums_ptr": "*fp32", "N": "i32", "D": "i32",
        },
    }[name]  # fmt: skip
    constants = {"CENTERS": True, "R": tile.rows, "BLOCK": triton.next_power_of_2(width)}
    if name == "backward":
        again = kind == "again"
        constants |= {"STAGES": tile.stages, "SUMS": again, "KINDS": 2 + again}
        constants |= {} if again else {"y_ptr": None}
    signature |= dict.fromkeys(constants, "constexpr")  # keeps the order of arguments
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind not in ("constexpr", "fp32")
    }
    source = ASTSource(getattr(kernel, f"norm_{name}_kernel"), signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tile.warps})
    words = re.findall(r"ld\.global\S*\.v(\d)\.b32", compiled.asm["ptx"])
    registers, spilled = resources(compiled.asm["cubin"])
    return {
        "capability": capability, "kernel": kind, "width": width, "x": x, "rows": tile.rows,
        "warps": tile.warps, "registers": registers, "spilled": spilled,
        "words a load": max(map(int, words), default=1), "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    kernels = itertools.product(
        map(int, sys.argv[1:]), ("forward", "backward", "again"), WIDTHS, ("bf16",)
    )
    for case in kernels:
        sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
