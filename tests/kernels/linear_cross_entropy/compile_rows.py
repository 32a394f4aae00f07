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
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.linear_cross_entropy.rows_shared import shared_rows_kernel
from kernels.linear_cross_entropy.rows_triton import cross_entropy_rows_kernel
from kernels.linear_cross_entropy.tiles import KEPT, choose
from kernels.sizes import cdiv
from tests.kernels.attention.compile_kernels import resources

MODES = {"both": (True, True), "loss": (True, False), "gradient": (False, True)}
ALIGNED = ("logits_ptr", "labels_ptr", "stride")  # a padded row; the vocabulary may be odd


NUMBERS = {
    "n": "i32", "stride": "i32", "V": "i32", "first_word": "i32", "ignore_index": "i32",
    "cap": "fp32", "z_loss": "fp32",
}  # fmt: skip


def compile_for(
    capability: int, dtype: str, mode: str, softcap: bool, ones: bool = False
) -> dict[str, object]:
    tile = choose(torch.device("cuda"), torch.float32 if dtype == "fp32" else torch.bfloat16)
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
    made = build(cross_entropy_rows_kernel, ASTSource, capability, dtype, constants, tile.warps)
    case = {"capability": capability, "dtype": dtype, "mode": mode, "softcap": softcap}
    return {**case, "ones": ones, **made}


def compile_kept(words: int, softcap: bool) -> dict[str, object]:
    """The kernel that keeps rows, for Hopper."""
    constants = {"BLOCK": KEPT.block, "TILES": cdiv(words, KEPT.block), "SOFTCAP": softcap}
    if words == 1:
        constants |= {"V": 1, "first_word": 1}
    made = build(shared_rows_kernel, GluonASTSource, 90, "bf16", constants, KEPT.warps)
    return {"capability": 90, "mode": "kept", "softcap": softcap, "ones": words == 1, **made}


def build(
    kernel: Any, source: Any, capability: int, dtype: str, constants: dict[str, Any], warps: int
) -> dict[str, object]:
    signature = {
        "logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "lse_ptr": "*fp32", "target_ptr": "*fp32",
        **NUMBERS, **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", capability, 32)
    made = source(kernel, signature, fixed, aligned)
    compiled = triton.compile(made, target=target, options={"num_warps": warps})
    # accesses of one number, beside the label's: what a mask or a stride has split
    narrow = re.findall(r"(?:ld|st)\.global(?!\S*\.v[24])\S*\.b16", compiled.asm["ptx"])
    registers, spilled = resources(compiled.asm["cubin"])
    return {
        "spilled": spilled, "narrow": len(narrow), "registers": registers,
        "shared": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:]]
    cases = [*itertools.product(capabilities, ("bf16", "fp32"), MODES, (False, True))]
    for case in [*cases, *((c, "bf16", "both", True, True) for c in capabilities)]:
        sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
    if 90 in capabilities:
        for words, softcap in ((50304, False), (50304, True), (1, True)):
            sys.stdout.write(json.dumps(compile_kept(words, softcap)) + "\n")
