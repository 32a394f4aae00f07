"""Compile the rotation for a GPU that need not be there, and say what ptxas made of it.

Run as a script, in its own process, because the tests around it import the same kernel for the
interpreter: `python compile_rotation.py 90` prints one JSON line per capability and kind of heads.
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

from kernels.rope.kernel import rotate_kernel
from kernels.rope.tiles import tile_for
from tests.kernels.attention.compile_kernels import resources

# heads that are turned, their size, rotated dims
HEADS = ((24, 64, 64), (32, 128, 128), (40, 128, 128), (5, 128, 128), (32, 80, 80), (32, 128, 32))


def compile_for(capability: int, heads: tuple[int, int, int], x: str) -> dict[str, object]:
    count, D, R = heads
    tile = tile_for(count, R // 2, torch.device("cuda"))
    signature = {"x_ptr": f"*{x}", "y_ptr": f"*{x}", "table_ptr": "*fp32"} | dict.fromkeys(
        ("N", "T", "H", "x_batch", "x_token", "y_batch", "y_token", "table_batch"), "i32"
    )
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in "NTH"
    }
    constants = {
        "X_HEAD": D, "Y_HEAD": D, "HALF": R // 2, "BACK": True, "TOKENS": tile.tokens,
        "HEADS": tile.heads, "PAIRS": triton.next_power_of_2(R // 2),
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(rotate_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tile.warps})
    registers, spilled = resources(compiled.asm["cubin"])
    found = {"capability": capability, "heads": heads, "x": x, "registers": registers}
    for way, name in (("ld", "loads"), ("st", "stores")):
        all_of = re.findall(rf"{way}\.global\S*", compiled.asm["ptx"])
        found[name], found[f"wide {name}"] = len(all_of), sum("v4" in one for one in all_of)
    return found | {"spilled": spilled, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    for case in itertools.product(map(int, sys.argv[1:]), HEADS, ("bf16", "fp32")):
        sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
