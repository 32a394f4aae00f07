"""Sizes of the passes, and which product of two ways; `scripts/bench_block.py` times others:
`--only passes --sweep`, `--only products`."""

from dataclasses import dataclass

import torch

from kernels.device import processors


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` numbers at a time in `warps` warps, `programs` of them for each
    multiprocessor, which load `stages` - 1 turns ahead."""

    rows: int
    columns: int
    warps: int
    programs: int
    stages: int


# 16 numbers of a tensor a thread, two 16-byte loads; six programs' registers fit, GELU written too
_GPU = Tile(rows=8, columns=256, warps=4, programs=6, stages=3)
_GATED = Tile(rows=4, columns=256, warps=4, programs=6, stages=3)  # three tensors in, three out
# nothing to add up: no program walks, as in a compiler's kernel for GELU's backward, which took 202
# us at gpt_1.3b where ours walked 219 (one H200, 2026-11-27)
_ONCE = Tile(rows=1, columns=2048, warps=4, programs=2**20, stages=1)
_INTERPRETER = Tile(rows=4, columns=16, warps=1, programs=4, stages=1)


def pass_tile(device: torch.device, gated: bool = False, sums: bool = True) -> Tile:
    """Of GELU's backward and of sums over tokens; gated: of SwiGLU's. sums: if there are any."""
    if device.type == "cpu":
        return _INTERPRETER
    if gated:
        return _GATED
    return _GPU if sums else _ONCE


def cast_block(device: torch.device) -> int:
    """Numbers of a program, four warps: 8 a thread, two 16-byte loads of fp32."""
    return 32 if device.type == "cpu" else 1024


OUTPUT_TILE = 128 * 256  # numbers of a product's result that a multiprocessor makes at a time


def rounds_gradient(features: int, inputs: int, device: torch.device) -> bool:
    """Whether dW [features, inputs] is rounded to 16 bits before it is fp32.

    A result of fewer tiles than multiprocessors is summed in parts, and there cuBLAS's products
    with fp32 results are slow: of gpt2_124m's layers, 32,768 tokens, in all 12 blocks, 2.86 ms for
    qkv where 16 bits and a cast take 2.17, 1.04 and 0.74 for out, 2.77 and 2.41 for down (one H200,
    2026-11-27, torch 2.11.0). The head's, of many tiles, is as fast in fp32.
    """
    if device.type == "cpu":
        return False
    return features * inputs < OUTPUT_TILE * processors(device)
