"""Time of work on a GPU without the host's part: calls recorded as a CUDA graph, and replayed."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

CALLS, REPLAYS = 8, 7  # in a graph, of which the first is not counted


@cache
def _side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def on_the_side() -> AbstractContextManager[Any]:
    """The stream that is recorded. A backward runs on the stream of its forward, so a forward whose
    backward is timed alone belongs here."""
    _side().wait_stream(torch.cuda.default_stream())
    return torch.cuda.stream(_side())


def microseconds(call: Callable[[], object], calls: int = CALLS, replays: int = REPLAYS) -> float:
    """Median time of one call; it must not wait for the device."""
    with on_the_side():  # compiles, chooses, makes what is kept
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side(), capture_error_mode="thread_local"):
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
    """GB/s read and written by a kernel that doubles 1 GiB; a copy goes another way in a graph."""
    source = torch.ones(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 4 * source.numel() / microseconds(lambda: torch.add(source, source, out=target)) / 1e3


def product_rate(m: int = 8192, n: int = 8192, k: int = 8192) -> float:
    """TFLOP/s of a bf16 product."""
    a, b = (torch.randn(size, device="cuda").bfloat16() for size in ((m, k), (n, k)))
    return 2e-6 * m * n * k / microseconds(lambda: a @ b.t())
