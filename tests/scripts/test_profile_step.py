"""The table of a step: every moment counted once, every product found, on the CPU and in a trace
made by hand as a GPU would have left it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashtrain.compose import load
from flashtrain.metrics import flops_per_token, matrix_parameters
from scripts.parts.step_parts import (
    BACKWARD,
    DATA,
    MODEL,
    RANGE,
    STEP,
    UPDATE,
    Part,
    Problem,
    profile,
)

ROOT = Path(__file__).resolve().parents[2]
# 192 tokens a micro-batch: no layer has as many inputs or outputs
CASE = [
    "model=gpt_tiny", "model.n_layers=2", "model.mlp=swiglu", "data=random",
    "model.vocabulary=640", "data.batch_size=4", "data.micro_batch_size=2",
    "data.sequence_length=96", "precision=fp32", "trainer.compile=false",
]  # fmt: skip


@pytest.fixture(scope="module", params=["true", "false"], ids=["fused", "logits"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("profile")
    case = " ".join([*CASE, f"loss.fused={request.param}"])
    subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "profile_step.py", "--case", case),
            *("--steps", "1", "--warmup", "1"),
            *("--json", folder / "rows.json", "--trace", folder / "trace.json"),
        ],
        check=True,
        timeout=120,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    return json.loads((folder / "rows.json").read_text())


def flops(row: dict[str, Any]) -> float:
    return float(row.get("tflops", 0) * row["busy_ms"] * 1e9)


def test_the_groups_are_the_whole_step(table: Any) -> None:
    groups = [row for row in table["rows"] if not row["detail"]]
    assert sum(row["share"] for row in groups) == pytest.approx(1)
    assert sum(row["ms"] for row in groups) == pytest.approx(table["traced_step_ms"], abs=1e-3)
    parts = {row["part"] for row in groups}
    assert {"attention", "projections", "MLP", "embedding", "head + loss", "data"} <= parts
    assert {"norms + elementwise", "optimizer", "gradient norm + clip", "launch gaps"} <= parts


def test_every_product_is_found_under_its_layer(table: Any) -> None:
    config = load(CASE)
    tokens = config.data.batch_size * config.data.sequence_length
    details = {row["detail"]: row for row in table["rows"] if row["detail"]}
    layers = {"qkv": (384, 128), "out": (128, 128), "gate_up": (1024, 128), "down": (128, 512)}
    for layer, (out, into) in layers.items():
        for way in ("y", "dx", "dW"):
            expected = 2 * 2 * tokens * out * into  # in two blocks
            assert flops(details[f"{layer}: {way}"]) == pytest.approx(expected), (layer, way)
    for way in ("y", "dx", "dW"):
        assert flops(details[f"head: {way}"]) == pytest.approx(2 * tokens * 640 * 128)
    products = sum(flops(row) for name, row in details.items() if ": " in name)
    assert products == pytest.approx(6 * matrix_parameters(config.model) * tokens)


def test_attention_counts_its_own_arithmetic(table: Any) -> None:
    config = load(CASE)
    tokens = config.data.batch_size * config.data.sequence_length
    square = flops_per_token(config.model, config.data.sequence_length).attention * tokens
    rows = {row["detail"]: row for row in table["rows"] if row["part"] == "attention"}
    assert flops(rows["forward"]) == pytest.approx(square / 3 / 2)
    assert flops(rows["backward"]) == pytest.approx(2.5 * square / 3 / 2)


class Trace:
    """Two steps of spans on a host thread and kernels on a device; the second is looked at."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.span(STEP, 0, 10)
        self.kernel("warm", 1, at=1, length=9)
        self.span(STEP, 10, 90)

    def span(
        self, name: str, at: float, length: float, tid: int = 1, cat: str = "user_annotation",
        **arguments: Any,
    ) -> None:  # fmt: skip
        event = {"ph": "X", "cat": cat, "name": name, "ts": at, "dur": length, "tid": tid}
        self.events.append({**event, "args": arguments})

    def operator(self, name: str, at: float, length: float, tid: int = 1, **arguments: Any) -> None:
        self.span(name, at, length, tid, "cpu_op", **arguments)

    def kernel(self, name: str, launched: float, at: float, length: float, tid: int = 1) -> None:
        number = len(self.events)
        self.span("cudaLaunchKernel", launched, 0.1, tid, "cuda_runtime", correlation=number)
        self.span(name, at, length, 99, "kernel", correlation=number)

    def times(self) -> dict[Part, float]:
        problem = Problem({"up": (64, 32), "down": (32, 64)}, 128, 1e6, "c10::BFloat16")
        result = profile(self.events, problem)
        assert sum(total.time for total in result.totals.values()) == pytest.approx(result.time)
        return {part: total.time for part, total in result.totals.items() if total.time}


def test_communication_counts_where_nothing_else_runs() -> None:
    trace = Trace()
    trace.kernel("ncclDevKernel_AllReduce", 11, at=20, length=20)
    trace.operator("triton_fused", 12, 2)
    trace.span(MODEL, 11.5, 5)
    trace.kernel("triton_fused", 12.5, at=10, length=15)
    trace.kernel("triton_fused", 13.5, at=30, length=5)
    times = trace.times()
    assert times[Part("norms + elementwise", "forward")] == 20
    assert times[Part("communication", "with nothing beside it")] == 10


def test_an_idle_device_waits_for_data_or_for_the_host() -> None:
    trace = Trace()
    trace.span(DATA, 12, 10)
    trace.span("Optimizer.step#AdamW.step", 30, 5)
    trace.kernel("multi_tensor", 31, at=35, length=5)
    trace.span(UPDATE, 40, 5)
    trace.kernel("norm", 41, at=42, length=3)
    assert trace.times() == {
        Part("data", "waited for"): 10,
        Part("launch gaps", "nothing runs"): 2 + 13 + 2,
        Part("optimizer", "update"): 5,
        Part("gradient norm + clip", "all"): 3,
    }


def test_backward_kernels_on_their_own_thread_go_by_node_and_shape() -> None:
    trace = Trace()
    trace.span(MODEL, 10, 10)
    trace.span(RANGE + "head", 15, 5)
    trace.operator("CompiledFunction", 11, 3, **{"Sequence number": 7})
    trace.operator("CompiledFunction", 16, 3, **{"Sequence number": 8})
    for number, start in ((8, 20), (7, 40)):
        node = f"{BACKWARD}: CompiledFunctionBackward"
        trace.operator(node, start, 18, tid=2, **{"Sequence number": number, "Fwd thread id": 1})
        trace.kernel("triton_x", start + 1, at=start + 1, length=2, tid=2)
    for at, (a, b) in enumerate([((128, 64), (64, 32)), ((64, 128), (128, 32))]):
        arguments = {"Input Dims": [list(a), list(b)], "Input type": ["c10::BFloat16"] * 2}
        trace.operator("aten::mm", 44 + at, 1, tid=2, **arguments)
        trace.kernel("nvjet", 44.2 + at, at=50 + at, length=1, tid=2)
    times = trace.times()
    assert times[Part("head + loss", "rows")] == 2
    assert times[Part("norms + elementwise", "backward")] == 2
    assert times[Part("MLP", "up: dx")] == 1  # [128, 64] x [64, 32]
    assert times[Part("MLP", "up: dW")] == 1


def test_kernels_of_ours_have_names_and_their_products_count_apart() -> None:
    trace = Trace()
    trace.span(MODEL, 10, 10)
    trace.operator("CompiledFunction", 11, 3, **{"Sequence number": 7})
    node = f"{BACKWARD}: CompiledFunctionBackward"
    trace.operator(node, 20, 60, tid=2, **{"Sequence number": 7, "Fwd thread id": 1})
    half, single = "c10::BFloat16", "float"
    dims: dict[str, list[Any]] = {
        "gelu_gradient": [[128, 32], [32, 64], [128, 64], [], []],
        "weight_gradient": [[128, 64], [128, 32], [], []],
        "cast": [[64, 32], [64], [], []],
        "swiglu_gradient": [[128, 64], [128, 128], [], []],
    }
    for at, (name, shapes) in zip((22, 40, 60, 70), dims.items(), strict=True):
        kind = single if name == "cast" else half
        arguments = {"Input Dims": shapes, "Input type": [kind if s else "Scalar" for s in shapes],
                     "Concrete Inputs": ["", "", "", "True", "True"]}  # fmt: skip
        trace.operator(f"flashtrain_linear::{name}", at, 10, tid=2, **arguments)
    product = {"Input Dims": [[128, 32], [32, 64]], "Input type": [half] * 2}
    trace.operator("aten::mm", 23, 1, tid=2, **product)
    trace.kernel("nvjet", 23.5, at=24, length=3, tid=2)
    for start in (25, 26):  # GELU's derivative, and the sums over tokens
        trace.kernel("gelu_backward_kernel", start, at=start + 3, length=1, tid=2)
    trace.kernel("nvjet", 42, at=43, length=4, tid=2)
    trace.kernel("cast_kernel", 62, at=63, length=2, tid=2)
    trace.kernel("swiglu_backward_kernel", 72, at=73, length=5, tid=2)
    problem = Problem({"up": (64, 32), "down": (32, 64)}, 128, 1e6, half)
    totals = profile(trace.events, problem).totals
    gelu = totals[Part("norms + elementwise", "GELU: backward")]
    assert (gelu.time, gelu.bytes) == (2, 4 * 128 * 64 * 2)
    assert totals[Part("MLP", "down: dx")].time == 3
    assert totals[Part("MLP", "up: dW")].time == 4
    casts = totals[Part("norms + elementwise", "casts")]
    assert (casts.time, casts.bytes) == (2, 1.5 * 4 * (64 * 32 + 64))
    swiglu = totals[Part("norms + elementwise", "SwiGLU: backward")]
    assert (swiglu.time, swiglu.bytes) == (5, (2 * 64 + 2 * 128) * 128 * 2)


def test_only_waits_inside_the_steps_are_counted() -> None:
    trace = Trace()
    for at in (5, 20, 60, 101):  # in the first step, twice in the second, after the last
        trace.span("cudaStreamSynchronize", at, 1, cat="cuda_runtime", correlation=1000 + at)
    trace.kernel("x", 30, at=31, length=1)
    assert profile(trace.events, Problem({}, 1, 1.0, "float")).waits == {"cudaStreamSynchronize": 2}


def test_one_marked_step_is_not_enough() -> None:
    with pytest.raises(ValueError, match="1 marked steps: at least 2"):
        profile(Trace().events[:3], Problem({}, 1, 1.0, "float"))
