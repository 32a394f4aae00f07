"""How much of a GPU's stated speed the code gets: the few measured constants of the time model.

Most were measured on H200s (2026-11-22, torch 2.11.0+cu130, triton 3.6.0) and are kept as shares of
what gpus.py states, so that they carry over to other cards, where they are an extrapolation.
"""

import math

from flashtrain.config import Backend
from flashtrain.planning.gpus import Gpu

# Matrix products: smallest of their three sizes -> share of the peak. cuBLAS, bf16: 16384 x 2304 x
# 768 at 625 TFLOP/s; mean of 16384 x {6144 x 2048, 2048 x 8192, 50304 x 2048} at 677, 707, 679;
# 8192^3 at 792; of 989.4.
PRODUCTS = {768: 0.632, 2048: 0.695, 8192: 0.800}

# fp8 products run so many times as fast: 16384 x {6144 x 2048, 2048 x 8192} at 1,313 to 1,341
# TFLOP/s beside 677 and 707 in bf16
FP8 = 1.92

# Attention, TFLOP/s forward and backward by head size and length, causal:
# kernels/attention/README.md, second table (hopper, triton, and FA2, which `torch` runs); used as
# shares of 989.4.
ATTENTION = {
    "hopper": {
        64: {1024: (311, 306), 4096: (443, 448), 16384: (504, 500)},
        128: {1024: (437, 340), 4096: (600, 472), 16384: (637, 535)},
    },
    "triton": {
        64: {1024: (297, 249), 4096: (398, 339), 16384: (436, 363)},
        128: {1024: (321, 275), 4096: (478, 377), 16384: (555, 427)},
    },
    "torch": {
        64: {1024: (215, 184), 4096: (276, 247), 16384: (296, 275)},
        128: {1024: (248, 208), 4096: (299, 274), 16384: (320, 307)},
    },
}
MEASURED_PEAK = 989.4  # TFLOP/s of the card of the two tables above

# Memory-bound kernels: share of the stated bandwidth. A copy reaches 4,267 of 4,800 GB/s; compiled
# norms, rotations, activations and the optimizer less, so that the three one-GPU rows of README.md
# (gpt2_124m, gpt2_350m, gpt_1.3b) come out.
STREAM = 0.73
# the row kernel of linear_cross_entropy: 2,578 of 4,800 GB/s (its README)
ROWS = 0.54

# NCCL on two H200 with NVLink: 67 MB all-gathered in 156 us, all-reduced in 245 us. That is 67 us
# and then 376 of 450 GB/s.
START = 67e-6  # seconds of any collective, with what a size of some ten MB loses at its ends
LINK = 0.84  # share of NVLink's bandwidth
# 46 to 48 of 50 GB/s per NDR adapter: NCCL's maintainers, github.com/NVIDIA/nccl-tests/issues/290
NETWORK = 0.93
# a further rank in a ring, and a further host: NCCL's own model of itself, protocol Simple, rings
# (github.com/NVIDIA/nccl, src/graph/tuning.cc, hwLat); trees have the same 14 us a level
HOP = 3.4e-6
HOST_HOP = 14e-6

# Communication beside computation slows it by this share of its own time: NCCL's kernels take
# multiprocessors and memory bandwidth. From gpt_1.3b on two H200, parallel=data (README.md): its
# step is 29 ms longer than one GPU's, of which 8 ms attention=triton, and its sums take 19 ms.
INTERFERENCE = 0.5

# A gather or scatter beside its own product, part by part: of its time this share is hidden. Mean
# of four shapes with PyTorch's symmetric-memory operators on two H200: 60, 47, 19 and 83 %.
HIDDEN = 0.5

# Seconds of the host for one block and micro-batch of tensor ranks, forward and backward: their
# steps are launched kernel by kernel, and at small widths the GPU waits for that. gpt_1.3b on H200
# (2026-11-27): 149.9 ms a step of 24 blocks on 4 ranks without overlap; with it 175.2 on 2, since
# every transfer is cut into pieces, one a rank. From 2 to 4 ranks it was 2.9 ms a block more when
# the host took longer for all of it. Other hosts are faster or slower.
LAUNCH = 6.2e-3
LAUNCH_OVERLAP, LAUNCH_PIECE = 4.5e-3, 1.4e-3  # and this for each rank


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
