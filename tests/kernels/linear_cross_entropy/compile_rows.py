"""Compile the row kernel for a GPU that need not be there, and say what ptxas made of it.

Run as a script, in its own process, because the tests around it import the same kernel for the
interpreter: `python compile_rows.py 80 90` prints one JSON line per capability, dtype and mode.
Triton turns arguments of 1 into constants, so a vocabulary of one word is a kernel of its own.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.linear_cross_entropy.rows_triton import cross_entropy_rows_kernel
from kernels.linear_cross_entropy.tiles import choose
from tests.kernels.attention.compile_kernels import resources

MODES = {"both": (True, True), "loss": (True, False), "gradient": (False, True)}
ALIGNED = ("logits_ptr", "labels_ptr", "stride")  # a padded row; the vocabulary may be odd


def compile_for(
    capability: int, dtype: str, mode: str, softcap: bool, ones: bool = False, long: bool = False
) -> dict[str, object]:
    fp = torch.float32 if dtype == "fp32" else torch.bfloat16
    tile = choose(torch.device("cuda"), fp, 128_256 if long else 50_304)
    measures, differentiates = MODES[mode]
    constants = {
        "BLOCK": tile.block,
        "UNROLL": tile.unroll,
        "SOFTCAP": softcap,
        "MEASURE": measures,
        "DIFFERENTIATE": differentiates,
    }
    if ones:
        constants |= {"V": 1, "first_word": 1}
    signature = {
        "logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "lse_ptr": "*fp32", "target_ptr": "*fp32",
        "n": "i32", "stride": "i32", "V": "i32", "first_word": "i32", "ignore_index": "i32",
        "cap": "fp32", "z_loss": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    source = ASTSource(cross_entropy_rows_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tile.warps})
    # accesses of one number, beside the label's logit: what a mask or a stride has split
    narrow = re.findall(r"(?:ld|st)\.global(?!\S*\.v[24])\S*\.b16", compiled.asm["ptx"])
    registers, spilled = resources(compiled.asm["cubin"])
    return {
        "capability": capability, "dtype": dtype, "mode": mode, "softcap": softcap,
        "ones": ones, "long": long, "spilled": spilled, "narrow": len(narrow),
        "registers": registers, "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:]]
    cases: list[Any] = [*itertools.product(capabilities, ("bf16", "fp32"), MODES, (False, True))]
    cases += [(c, "bf16", "both", True, True) for c in capabilities]
    for softcap in (False, True):
        cases += [(c, "bf16", "both", softcap, False, True) for c in capabilities]
    for case in cases:
        sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
