"""Compile the cast kernels for a GPU that need not be there, and say what ptxas made of them.

Run as a script, in its own process, because the tests around it import the same kernels for the
interpreter: `python compile_casts.py 89 90` prints one JSON line per capability and kernel.
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

from kernels.fp8_cast import kernel, mlp_kernel, norm_kernel
from kernels.fp8_cast.tiles import choose, row_warps
from kernels.norm.tiles import forward_tile
from tests.kernels.attention.compile_kernels import resources

TILES = choose(torch.device("cuda"))
WIDTH = 2048  # of a norm
WHOLE = forward_tile(WIDTH, torch.device("cuda"))
TOPS = {"fp8e4nv": 448.0, "fp8e5": 57344.0}


def hidden(x: str, fp8: str) -> dict[str, tuple[dict[str, str], dict[str, object], int]]:
    """The two kernels of an MLP, GELU's and SwiGLU's: forward in e4m3, backward in e5m2."""
    made: dict[str, tuple[dict[str, str], dict[str, object], int]] = {}
    sizes = {"N": "i32", "F": "i32"}
    walk = TILES.gated_maxima
    made["gated_maxima"] = (
        {"z_ptr": f"*{x}", "bits_ptr": "*i32", **sizes, "rows_each": "i32"},
        {"R": walk.rows, "BLOCK": walk.columns, "STAGES": walk.stages},
        walk.warps,
    )
    backward = fp8 == "fp8e5"
    of_hidden = TILES.hidden_summed if backward else TILES.hidden
    for gated, tile in ((False, of_hidden), (True, TILES.gated)):
        prefix = "gated_" if gated else "hidden_"
        nothing = {} if backward else {"d_ptr": None, "sums_ptr": None}
        made[prefix + "cast"] = (
            {
                "z_ptr": f"*{x}", "d_ptr": f"*{x}", "maximum_ptr": "*fp32", "q_ptr": f"*{fp8}",
                "qt_ptr": f"*{fp8}", "scale_ptr": "*fp32", "sums_ptr": "*fp32", **sizes,
            },
            {**nothing, "TOP": TOPS[fp8], "GATED": gated, "BM": tile.rows, "BK": tile.columns},
            tile.warps,
        )  # fmt: skip
    return made


def compile_for(capability: int, name: str, x: str, fp8: str) -> dict[str, object]:
    top = {"TOP": TOPS[fp8]}
    cast = TILES.summed if fp8 == "fp8e5" else TILES.tensorwise
    rows = dict.fromkeys(("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
    signature, constants, warps = {
        "maximum": (
            {"x_ptr": f"*{x}", "bits_ptr": "*i32", "n": "i32"},
            {"POSITIVE": x == "bf16", "BLOCK": TILES.maximum},
            8,
        ),
        "tensorwise": (
            {
                "x_ptr": f"*{x}", "maximum_ptr": "*fp32", "q_ptr": f"*{fp8}", "qt_ptr": f"*{fp8}",
                "scale_ptr": "*fp32", "sums_ptr": "*fp32", "M": "i32", "K": "i32",
            },
            {
                **top, "ROWS": True, "COLUMNS": True, "BM": cast.rows, "BK": cast.columns,
                **({"sums_ptr": None} if fp8 == "fp8e4nv" else {}),
            },
            cast.warps,
        ),
        "rowwise": (
            {"x_ptr": f"*{x}", "q_ptr": f"*{fp8}", "scale_ptr": "*fp32", "K": "i32"},
            {**top, "BLOCK": 16384},
            row_warps(16384),
        ),
        "columnwise": (
            {"x_ptr": f"*{x}", "qt_ptr": f"*{fp8}", "scale_ptr": "*fp32", "M": "i32", "K": "i32"},
            {**top, "BM": TILES.columnwise.rows, "BK": TILES.columnwise.columns},
            TILES.columnwise.warps,
        ),
        "statistics": (
            {
                "x_ptr": f"*{x}", **rows, "bounds_ptr": "*fp32", "N": "i32", "D": "i32",
                "eps": "fp32", "root": "fp32",
            },
            {"R": WHOLE.rows, "BLOCK": WIDTH},
            WHOLE.warps,
        ),
        "norm_cast": (
            {
                "x_ptr": f"*{x}", **rows, "bounds_ptr": "*fp32", "q_ptr": f"*{fp8}",
                "qt_ptr": f"*{fp8}", "scale_ptr": "*fp32", "N": "i32", "D": "i32",
            },
            {**top, "BM": TILES.tensorwise.rows, "BK": TILES.tensorwise.columns},
            TILES.tensorwise.warps,
        ),
        **hidden(x, fp8),
    }[name]  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32")
        and argument not in ("scale_ptr", "maximum_ptr", "bits_ptr", "bounds_ptr")
    }
    module, short = kernel, name
    if name in hidden(x, fp8):
        module, short = mlp_kernel, "cast" if name.endswith("_cast") else name
    elif name in ("statistics", "norm_cast"):
        module = norm_kernel
    function = getattr(module, f"{short}_kernel")
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    widest = {
        way: max(
            (int(n) for n in re.findall(rf"{way}\.global\S*\.v(\d)\.b32", ptx)),
            default=1,
        )
        for way in ("ld", "st")
    }
    registers, spilled = resources(compiled.asm["cubin"])
    moves = re.findall(r"convert_layout .*: tensor<\w+x(f8\w+|i8)", compiled.asm["ttgir"])
    return {
        "capability": capability, "kernel": name, "x": x, "fp8": fp8, "registers": registers,
        "spilled": spilled, "words a load": widest["ld"], "words a store": widest["st"],
        "one pass": kernel.ONE_PASS, "moves fp8": bool(moves),
    }  # fmt: skip


if __name__ == "__main__":
    names = ("maximum", "tensorwise", "rowwise", "columnwise")
    for case in itertools.product(map(int, sys.argv[1:]), names, ("bf16", "fp32"), TOPS):
        if case[1] != "maximum" or case[3] == "fp8e4nv":
            sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
    names = ("hidden_cast", "gated_maxima", "gated_cast", "statistics", "norm_cast")
    for case in itertools.product(map(int, sys.argv[1:]), names, ("bf16",), TOPS):
        sys.stdout.write(json.dumps(compile_for(*case)) + "\n")
