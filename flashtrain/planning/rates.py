"""How much of a GPU's stated speed the code gets: the few measured constants of the time model.

Measured on H200s (2026-11-22 and 2026-11-27, torch 2.11.0+cu130, triton 3.6.0) and kept as shares
of what gpus.py states, so that they carry over to other cards, where they are an extrapolation.
*Fitted* ones are what the rows of tests/flashtrain/planning/measured.py that the host does not
bound say together, by least squares of the logarithm, rounded.
"""

import math

from flashtrain.config import Backend
from flashtrain.planning.gpus import Gpu

# Matrix products: smallest of their three sizes -> share of the peak. cuBLAS, bf16: 16384 x 2304 x
# 768 at 625 TFLOP/s; mean of 16384 x {6144 x 2048, 2048 x 8192, 50304 x 2048} at 677, 707, 679;
# of 989.4. For 4096 fitted: a product of 8192^3 alone reaches 792, but not one in a step.
PRODUCTS = {768: 0.632, 2048: 0.695, 4096: 0.70}

# fp8 products run so many times as fast, and so with fast accumulation in the backward pass. Fitted
# with their casts to gpt2_124m, gpt2_350m and gpt_1.3b, with and without fast_backward, on one H200
# (2026-11-28, README.md). 16384 x {6144 x 2048, 2048 x 8192} alone are at 1,313 to 1,341 TFLOP/s
# beside 677 and 707 in bf16, 1.92 times that
FP8, FP8_FAST = 1.92, 2.07

# Attention, TFLOP/s forward and backward by head size and length, causal:
# kernels/attention/README.md, "Measured" (hopper, triton, and FA2, which `torch` runs); used as
# shares of 989.4.
ATTENTION = {
    "hopper": {
        64: {1024: (353, 314), 4096: (499, 470), 16384: (529, 535)},
        128: {1024: (486, 351), 4096: (622, 511), 16384: (643, 588)},
    },
    "triton": {
        64: {1024: (299, 225), 4096: (396, 325), 16384: (434, 361)},
        128: {1024: (321, 277), 4096: (469, 375), 16384: (550, 434)},
    },
    "torch": {
        64: {1024: (215, 185), 4096: (277, 247), 16384: (296, 274)},
        128: {1024: (246, 205), 4096: (300, 274), 16384: (315, 316)},
    },
}
MEASURED_PEAK = 989.4  # TFLOP/s of the card of the two tables above

# Memory-bound kernels: share of the stated bandwidth. A copy reaches 4,267 of 4,800 GB/s; norms,
# rotations, activations and casts of gpt_1.3b 3,717 together, the optimizer 4,087
# (scripts/profile_step.py, 2026-11-27).
STREAM = 0.77
# the row kernel of linear_cross_entropy: 3,415 of 4,800 GB/s (its README)
ROWS = 0.71

# NCCL on two H200 with NVLink: 67 MB all-gathered in 156 us, all-reduced in 245 us. That is 67 us
# and then 376 of 450 GB/s.
START = 67e-6  # seconds of any collective, with what a size of some ten MB loses at its ends
LINK = 0.84  # share of NVLink's bandwidth
# 46 to 48 of 50 GB/s per NDR adapter: NCCL's maintainers, github.com/NVIDIA/nccl-tests/issues/290
NETWORK = 0.93
# Of a PCIe link's bandwidth, from and to pinned memory, all GPUs of a host at once: an assumption,
# not a measurement
HOST = 0.8
# a further rank in a ring, and a further host: NCCL's own model of itself, protocol Simple, rings
# (github.com/NVIDIA/nccl, src/graph/tuning.cc, hwLat); trees have the same 14 us a level
HOP = 3.4e-6
HOST_HOP = 14e-6

# Communication beside computation slows it by this share of its own time: NCCL's kernels take
# multiprocessors and memory bandwidth. Fitted, mostly to llama_8b with FSDP.
INTERFERENCE = 0.8

# A gather or scatter beside its own product, part by part: of its time this share is hidden.
# Fitted; PyTorch's symmetric-memory operators alone hid 60, 47, 19 and 83 % of four shapes.
HIDDEN = 0.4

# Seconds of the host for one block and micro-batch, forward and backward, of a step that is not a
# CUDA graph: what launching its kernels takes; where that is longer than running them the GPU
# waits. On the hosts of H200s of 2026-11-27, others are faster or slower: gpt_1.3b on 4 tensor
# ranks 103 ms a step of 24 blocks, gpt2_124m with 2 sequences on one GPU 58 ms of 12.
LAUNCH = 4.4e-3
# And more of it: FSDP's hooks (fsdp x tensor 2 212 ms; with fp8 and no tensor ranks fsdp takes 217,
# which leaves nothing for fp8), DDP's (gpt2_124m 61 ms of 12 blocks, or less), fp8 layers of tensor
# ranks (177 ms on 2 and on 4), and for each rank that transfers are cut into pieces to run beside
# products (from 2 to 4 ranks 2.9 ms a block, when blocks still ran as two parts)
LAUNCH_FSDP, LAUNCH_DDP, LAUNCH_FP8, LAUNCH_PIECE = 4.4e-3, 0.6e-3, 3.0e-3, 1.4e-3


def product_share(*sizes: int) -> float:
    """Of the peak, for a matrix product of these three sizes; linear in the log of the least."""
    return max(_interpolate(PRODUCTS, min(sizes)), 0.1)


def attention_rates(head_size: int, length: int, backend: Backend, gpu: Gpu) -> tuple[float, float]:
    """FLOP/s of forward and backward, counting half of the square."""
    name = backend.name
    if backend is Backend.auto:
        name = "hopper" if gpu.hopper else "triton"
    if name == "hopper" and not gpu.hopper:
        raise ValueError(f"attention=hopper does not run on {gpu.name}: take triton or auto")
    if name not in ATTENTION:
        raise ValueError(f"attention={name} is for tests: no speed is known of it")
    by_size = ATTENTION[name]
    table = by_size[128 if head_size > 64 else 64]
    forward, backward = (
        _interpolate({t: rates[i] for t, rates in table.items()}, length) / MEASURED_PEAK
        for i in (0, 1)
    )
    # narrower heads leave part of a product's tile empty
    filled = min(1.0, head_size / 64) if head_size <= 64 else min(1.0, head_size / 128)
    return forward * filled * gpu.peak, backward * filled * gpu.peak


def _interpolate(table: dict[int, float], at: int) -> float:
    """Linear in log(at); the outer lines go on below the table, above it its last value holds."""
    points = sorted(table.items())
    if at >= points[-1][0]:
        return points[-1][1]
    pair = next(i for i in range(1, len(points)) if at < points[i][0])
    (low, first), (high, last) = points[pair - 1 : pair + 1]
    value = first + (last - first) * math.log(at / low) / math.log(high / low)
    return max(value, 0.1 * first)
