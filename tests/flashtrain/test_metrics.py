"""Formulas against counts, figures against a clock that the test turns."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flashtrain.compose import resolve_model
from flashtrain.config import (
    Compute,
    Config,
    DataConfig,
    Mlp,
    ModelConfig,
    Norm,
    PositionConfig,
    PositionKind,
    TrainerConfig,
)
from flashtrain.metrics import (
    Speedometer,
    flops_per_token,
    matrix_parameters,
    peak_memory,
    peak_tflops,
    run_peak,
)
from flashtrain.model.gpt import GPT, n_parameters

SMALL = ModelConfig(n_layers=2, n_heads=4, d_model=64, vocabulary=256)
T = 64
MODELS = {
    "gpt2": SMALL,
    "llama": replace(SMALL, norm=Norm.rmsnorm, mlp=Mlp.swiglu, n_kv_heads=2, tied_head=False),
    "everything": replace(SMALL, bias=True, qk_norm=True, head_size=32, mlp=Mlp.relu2),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_flops_formula_counts_what_torch_counts(model: ModelConfig) -> None:
    model = resolve_model(model)
    gpt = GPT(model, PositionConfig(), max_length=T, backend="reference")
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(256, (2, T))
    with FlopCounterMode(display=False) as counter:
        gpt.logits(gpt(tokens)).float().square().mean().backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(
        flops_per_token(model, T).full, rel=0.02
    )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", [PositionKind.learned, PositionKind.rope])
def test_parameter_formula_counts_what_the_model_holds(
    model: ModelConfig, kind: PositionKind
) -> None:
    model, position = resolve_model(model), PositionConfig(kind=kind)
    with torch.device("meta"):
        gpt = GPT(model, position, max_length=T)
    assert n_parameters(model, position, T) == sum(p.numel() for p in gpt.parameters())


def test_published_sizes_are_met() -> None:
    gpt2 = ModelConfig(n_layers=12, n_heads=12, d_model=768, vocabulary=50257, bias=True)
    learned = PositionConfig(kind=PositionKind.learned)
    assert n_parameters(resolve_model(gpt2), learned, 1024) == 124_439_808
    # 6 N + 12 L H Q T by hand, N without embedding and position table but with the head
    flops = flops_per_token(resolve_model(gpt2), 1024)
    assert matrix_parameters(resolve_model(gpt2)) == 12 * 12 * 768**2 + 50257 * 768
    assert flops.attention == 12 * 12 * 768 * 1024
    assert flops.full - flops.causal == flops.attention / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_known_gpus_have_their_own_peak(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA B2000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_an_unknown_gpu_has_no_peak_and_not_a_neighbours(name: str) -> None:
    assert peak_tflops(name) is None


def config(**tracking: float) -> Config:
    made = Config(
        model=resolve_model(SMALL),
        data=DataConfig(batch_size=8, micro_batch_size=4, sequence_length=T),
        trainer=TrainerConfig(steps=10),
    )
    for key, value in tracking.items():
        setattr(made.tracking, key, value)
    return made


def test_peak_is_the_configs_then_the_gpus_and_for_bf16_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert run_peak(config(), gpu) == 989.4
    assert run_peak(config(), torch.device("cpu")) is None
    assert run_peak(config(peak_tflops=5.0), torch.device("cpu")) == 5.0
    fp32 = config()
    fp32.precision.compute = Compute.fp32
    assert run_peak(fp32, gpu) is None


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_leaves_out_the_first_steps_and_pauses() -> None:
    clock = Clock()
    speed = Speedometer(config(peak_tflops=0.001), 2, torch.device("cpu"), clock)
    clock.now += 60  # compiling
    first = speed.read(10, data_time=5.0)
    assert set(first) == {"perf/memory_gib"}
    clock.now += 3
    with speed.pause():
        clock.now += 1000  # evaluation
    clock.now += 1
    metrics = speed.read(30, data_time=6.0)
    assert metrics["perf/step_s"] == pytest.approx(0.2)
    rate = 20 * 8 * T / 4.0
    assert metrics["perf/tokens_per_s"] == pytest.approx(rate)
    assert metrics["perf/tokens_per_s_per_gpu"] == pytest.approx(rate / 2)
    assert metrics["perf/data_share"] == pytest.approx(0.25)
    flops = flops_per_token(config().model, T)
    assert metrics["perf/mfu"] == pytest.approx(rate * flops.causal / 2e9)
    assert metrics["perf/mfu_full"] == pytest.approx(rate * flops.full / 2e9)
    clock.now += 2
    assert speed.read(32, data_time=6.0)["perf/step_s"] == pytest.approx(1.0)  # pause forgotten


def test_reading_twice_at_one_step_divides_by_nothing() -> None:
    clock = Clock()
    speed = Speedometer(config(), 1, torch.device("cpu"), clock)
    speed.read(1, 0.0)
    assert "perf/tokens_per_s" not in speed.read(1, 0.0)
    assert "perf/mfu" not in speed.read(2, 0.0)  # no peak known on the CPU


def test_peak_memory_on_the_cpu_is_resident_bytes() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(1 << 28, dtype=torch.uint8)
    after = peak_memory(torch.device("cpu"))
    assert 50 << 20 < before <= after < 64 << 30  # bytes, not KiB or pages
    assert after >= held.numel()
