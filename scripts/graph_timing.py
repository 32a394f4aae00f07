"""Time of work on a GPU without the host's part: calls recorded as a CUDA graph, and replayed."""

import statistics
from collections.abc import Callable

import torch

CALLS, REPLAYS = 8, 7  # in a graph, of which the first is not counted


def microseconds(call: Callable[[], object], calls: int = CALLS, replays: int = REPLAYS) -> float:
    """Median time of one call; it must not wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, chooses, makes what is kept
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


def copy_rate() -> float:
    """GB/s read and written by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source)) / 1e3


def product_rate(m: int = 8192, n: int = 8192, k: int = 8192) -> float:
    """TFLOP/s of a bf16 product."""
    a, b = (torch.randn(size, device="cuda").bfloat16() for size in ((m, k), (n, k)))
    return 2e-6 * m * n * k / microseconds(lambda: a @ b.t())
