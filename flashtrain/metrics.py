"""How large a model is, how much arithmetic it asks for, and how fast this run does it.

Model FLOPs count what the mathematics needs and nothing that is done twice (recomputation,
padding), so MFU compares implementations. Two figures, because projects differ by the choice:
`mfu` counts attention once, the lower triangle only, as a causal kernel does it; `mfu_full` counts
the full square, as PaLM (arXiv:2204.02311, appendix B), nanoGPT and torchtitan do.
"""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from flashtrain.config import Compute, Config, Mlp, ModelConfig

GIB = 1 << 30

# Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's data sheets and architecture
# white papers; sheets that print "with sparsity" are halved. Whole names as CUDA reports them: a
# card that is not here (also: a MIG slice of one that is) has no MFU, never a neighbour's.
PEAKS: dict[str, float] = {
    r"A100-(SXM4|SXM-64GB|PCIE|PCIe)(-(40|80)GB)?|A100 80GB PCIe": 312.0,
    r"A10G": 70.0,
    r"L4": 121.0,
    r"L40S": 362.0,
    r"GeForce RTX 3090": 71.0,  # GA102 white paper
    r"GeForce RTX 4090": 165.2,  # Ada white paper
    r"H100 80GB HBM3": 989.4,  # SXM5
    r"H100 PCIe": 756.5,
    r"H100 NVL": 835.5,
    r"H200": 989.4,  # SXM5
    r"H200 NVL": 835.5,
    r"GH200 (480GB|144G HBM3e)": 989.4,
    r"B200": 2250.0,
}


@dataclass(frozen=True)
class Flops:
    """Per trained token: forward, and backward as twice that."""

    matrices: int  # 6 x parameters of the matrices that multiply
    attention: int  # 12 L H head_size T: scores and their product with v, the full square

    @property
    def full(self) -> float:
        return self.matrices + self.attention

    @property
    def causal(self) -> float:
        return self.matrices + self.attention / 2


def matrix_parameters(model: ModelConfig) -> int:
    """Weights each token is multiplied with. Not the embedding, a lookup; the head, also when tied.

    `model` is resolved and knows its vocabulary, here and below.
    """
    kv, size, d_ff, vocabulary = _sizes(model)
    width = model.d_model
    attention = width * (model.n_heads + 2 * kv) * size + model.n_heads * size * width
    mlp = width * d_ff * (3 if model.mlp is Mlp.swiglu else 2)
    return model.n_layers * (attention + mlp) + width * vocabulary


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """Without learned or sinusoidal vectors on q, k, v: once per micro-batch, not per token."""
    _, size, _, _ = _sizes(model)
    square = 12 * model.n_layers * model.n_heads * size * sequence_length
    return Flops(6 * matrix_parameters(model), square)


def _sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    kv, size, d_ff, vocabulary = model.n_kv_heads, model.head_size, model.d_ff, model.vocabulary
    assert kv is not None and size is not None and d_ff is not None and vocabulary is not None
    return kv, size, d_ff, vocabulary


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one GPU by the name CUDA gives it; None for one that is not in the table.

    "NVIDIA H100 80GB HBM3" -> 989.4.
    """
    short = device_name.removeprefix("NVIDIA ").strip()
    return next((peak for name, peak in PEAKS.items() if re.fullmatch(name, short)), None)


def run_peak(config: Config, device: torch.device) -> float | None:
    """TFLOP/s that MFU is a share of: the config's figure, else the GPU's for bf16, else None.

    Also of a run with fp8 layers, whose attention and head are bf16: it may pass 100 %, and
    compares with a bf16 run as its speed does.
    """
    if config.tracking.peak_tflops is not None:
        return config.tracking.peak_tflops
    if device.type != "cuda" or config.precision.compute is not Compute.bf16:
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


class Speedometer:
    """Speed between two readings, without the time inside `pause`.

    The first reading only starts the clock, so the steps that compile and warm up count nowhere.
    Read it after something that waited for the device, such as the loss: it does not wait itself.
    """

    def __init__(
        self,
        config: Config,
        world_size: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.world_size, self.device, self.clock = world_size, device, clock
        self.flops = flops_per_token(config.model, config.data.sequence_length)
        self.peak = run_peak(config, device)
        self.last: tuple[int, int, float, float] | None = None  # step, tokens, time, data seconds
        self.paused = 0.0  # seconds since the last reading

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """For evaluation, sampling and checkpoints. Waits for the device at both ends, so that
        training queued before is not counted inside, nor what is queued inside after."""
        self._synchronize()
        start = self.clock()
        try:
            yield
        finally:
            self._synchronize()
            self.paused += self.clock() - start

    def read(self, step: int, data_time: float, tokens: int | None = None) -> dict[str, float]:
        """Figures since the last reading; no speed on the first one, no MFU without a known peak.

        step: optimizer steps done. data_time: seconds waited for data since the start. tokens: of
        all steps; None where each has as many.
        """
        metrics = {"perf/memory_gib": peak_memory(self.device) / GIB}
        now = self.clock()
        tokens = step * self.tokens_per_step if tokens is None else tokens
        if self.last is not None and step > self.last[0]:
            steps, seconds = step - self.last[0], now - self.last[2] - self.paused
            seconds = max(seconds, 1e-9)  # a clock that stood still must not end a run
            rate = (tokens - self.last[1]) / seconds
            metrics["perf/tokens_per_s"] = rate
            metrics["perf/tokens_per_s_per_gpu"] = rate / self.world_size
            metrics["perf/step_s"] = seconds / steps
            metrics["perf/data_share"] = min(1.0, max(0.0, data_time - self.last[3]) / seconds)
            if self.peak is not None:
                available = self.peak * 1e12 * self.world_size
                metrics["perf/mfu"] = rate * self.flops.causal / available
                metrics["perf/mfu_full"] = rate * self.flops.full / available
        self.last, self.paused = (step, tokens, now, data_time), 0.0
        return metrics

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device) -> int:
    """Most bytes ever held: by tensors on a GPU; by this process, resident, on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
