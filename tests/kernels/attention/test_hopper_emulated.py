"""The Hopper kernels on the CPU, by gluon_emulator.py: right results, and no race or deadlock."""

# ruff: noqa: ANN001, ANN202 -- arguments of kernels have no Python type

import math
from dataclasses import replace

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.hopper import plan
from kernels.attention.hopper.api import sink_gradient
from kernels.attention.hopper.launch import Blocks, Launch
from kernels.attention.hopper.shim import tma_load, tma_store
from kernels.attention.hopper.softmax import MASKED
from kernels.attention.hopper.tiles import (
    BACKWARD,
    FORWARD,
    FORWARD_128_ROWS,
    BackwardTile,
    ForwardTile,
    choose_backward,
    choose_forward,
)
from tests.accuracy import assert_as_accurate
from tests.kernels.attention import gluon_emulator
from tests.kernels.attention.cases import Case, Inputs, inputs_of, run_reference
from tests.kernels.attention.gluon_emulator import emulate
from tests.kernels.attention.hopper_calls import passes_of

CASES = {
    "causal": Case(T=256, S=256, D=128, options={"causal": True}),
    "full": Case(T=256, S=128, D=64, options={"causal": False}),
    "ragged, grouped, alibi": Case(
        T=200, S=200, D=64, H=4, H_kv=2, options={"causal": True}, alibi=True
    ),
    "ragged, grouped": Case(T=150, S=330, D=128, H=3, H_kv=1, options={"causal": False}),
    "causal, more keys": Case(T=70, S=333, D=64, B=2, options={"causal": True}),
    "causal, 64 more keys": Case(T=192, S=256, D=128, options={"causal": True}),
    "window": Case(T=300, S=300, D=128, options={"causal": True, "window": (70, 0)}),
    "window, both sides": Case(
        T=200, S=333, D=64, H=4, options={"causal": False, "window": (70, 33)}
    ),
    "window, keys unseen": Case(T=70, S=500, D=64, options={"causal": True, "window": (20, 0)}),
    "window, more queries": Case(T=200, S=100, D=64, options={"causal": False, "window": (20, -1)}),
    "documents": Case(T=300, S=300, D=128, B=2, options={"causal": True}, documents=True),
    "documents, both sides": Case(
        T=300, S=300, D=64, B=2, options={"causal": False}, documents=True
    ),
    "softcap": Case(T=150, S=150, D=64, options={"causal": True, "softcap": 1.5}),
    "softcap, full": Case(T=150, S=200, D=128, options={"causal": False, "softcap": 15.0}),
    "sinks": Case(T=150, S=150, D=128, options={"causal": True}, sinks=True),
    "everything": Case(
        T=300,
        S=300,
        D=64,
        H=4,
        options={"causal": True, "window": (90, 0), "softcap": 2.0},
        alibi=True,
        sinks=True,
        documents=True,
    ),
    "padded head": Case(T=100, S=150, D=96, H=4, options={"causal": True}),
    "small head": Case(T=100, S=150, D=24, options={"causal": False}),
    "large head": Case(T=150, S=200, D=256, options={"causal": True}),
    "large padded head, window": Case(
        T=150, S=200, D=160, options={"causal": True, "window": (70, 0)}
    ),
    "one query": Case(T=1, S=37, D=128, options={"causal": True}),
    "one token": Case(T=1, S=1, D=64, options={"causal": False}),
}


def check(
    inputs: Inputs,
    forward: ForwardTile | None = None,
    backward: BackwardTile | None = None,
    n_sm: int = 3,
    packed: bool = False,
) -> None:
    passes = passes_of(inputs, forward, backward, n_sm, packed)
    for launch in passes.launches:
        emulate(launch, passes.tensors)
    if inputs.case.sinks and len(passes.launches) > 1:
        sinks, stats = passes.tensors["sinks"], passes.tensors["stats"]
        assert sinks is not None and stats is not None
        passes.tensors["dsinks"] = sink_gradient(sinks, stats, inputs.case.B)
    counter = passes.tensors["counter"]
    assert counter is not None and counter.item() == 0, "the next launch would start off zero"
    eager = run_reference(inputs, inputs.tensors["q"].dtype)
    exact = run_reference(inputs, torch.float64)
    names = exact if len(passes.launches) > 1 else ("out", "lse")  # no backward at D = 256
    factor = 3.0 if "softcap" in inputs.extras else 2.0
    for name in names:
        got = passes.tensors[name]
        assert got is not None
        assert_as_accurate(got, eager[name], exact[name], factor=factor, name=name)


@pytest.mark.parametrize("name", CASES)
def test_results_are_as_accurate_as_eager(name: str) -> None:
    check(inputs_of(CASES[name], "cpu", torch.bfloat16))


@pytest.mark.parametrize("name", ["ragged, grouped, alibi", "documents", "padded"])
def test_gradients_side_by_side(name: str) -> None:
    padded = Case(T=100, S=100, D=96, H=4, H_kv=2, B=2, options={"causal": True})
    case = padded if name == "padded" else CASES[name]
    check(inputs_of(case, "cpu", torch.bfloat16), packed=True)


def test_float16_is_as_accurate_as_eager() -> None:
    check(inputs_of(CASES["ragged, grouped"], "cpu", torch.float16))


def test_views_into_one_projection_are_read_in_place() -> None:
    inputs = inputs_of(CASES["causal"], "cpu", torch.bfloat16)
    joint = torch.cat([inputs.tensors[name] for name in "qkv"], 2)
    inputs.tensors = dict(zip("qkv", joint.split(2, 2), strict=True))
    check(inputs)


@pytest.mark.parametrize("room", [0, 1 << 19])  # for one head, for 5 forward and 2 backward
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_sm", [1, 5])
def test_every_schedule_takes_every_tile_once(
    causal: bool, room: int, n_sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TOGETHER", dict.fromkeys(("forward", "backward"), room))
    case = Case(T=400, S=400, D=64, B=2, H=3, H_kv=3, options={"causal": causal})
    check(inputs_of(case, "cpu", torch.bfloat16), n_sm=n_sm)


def test_fewer_rows_are_taken_where_the_last_tile_would_be_empty() -> None:
    assert choose_forward(64, True, 1024) is FORWARD_128_ROWS
    assert choose_forward(64, True, 1152) is FORWARD[64, True]  # 6 tiles of 192
    assert choose_forward(64, False, 16384) is FORWARD[64, False]
    assert choose_forward(128, True, 1024) is FORWARD[128, True]
    case = Case(T=130, S=200, D=64, options={"causal": True})
    check(inputs_of(case, "cpu", torch.bfloat16), forward=FORWARD_128_ROWS)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=400, S=528, D=64, H=3, H_kv=3, options={"causal": True}, sinks=True, alibi=True),
        Case(T=330, S=330, D=128, options={"causal": True, "softcap": 2.0}),
    ],
)
def test_half_a_key_tile_at_the_diagonal_is_enough(case: Case) -> None:
    tile = replace(FORWARD_128_ROWS, stages=2)
    inputs = inputs_of(case, "cpu", torch.bfloat16)
    assert passes_of(inputs, tile).launches[0].arguments["HALF"]
    check(inputs, tile)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=400, S=400, D=64, B=2, H=3, H_kv=1, options={"causal": False}),
        Case(T=300, S=333, D=128, H=4, options={"causal": False}),
        Case(T=200, S=130, D=64, H=3, H_kv=3, options={"causal": False}, sinks=True),
        Case(T=300, S=300, D=128, options={"causal": False, "softcap": 2.0}),
    ],
)
@pytest.mark.parametrize("n_sm", [2, 50])
def test_chained_tiles_are_right(case: Case, n_sm: int) -> None:
    check(inputs_of(case, "cpu", torch.bfloat16), n_sm=n_sm)


def test_scores_of_a_row_that_is_masked_so_far_cancel_exactly() -> None:
    """On the GPU s * scale - peak * scale is one rounding and then a fused multiply-add."""
    mantissa, _ = math.frexp(-MASKED.value)
    assert mantissa == 0.5


@pytest.mark.parametrize(
    "case", ["causal", "ragged, grouped, alibi", "ragged, grouped", "padded head"]
)
def test_scores_a_tile_ahead_are_right(case: str) -> None:
    tile = choose_backward(CASES[case].D, CASES[case].options["causal"], 4096)
    check(inputs_of(CASES[case], "cpu", torch.bfloat16), backward=replace(tile, ahead=True))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("queries", [64, 128])
def test_other_backward_tiles_are_right(D: int, early: bool, queries: int) -> None:
    case = Case(T=300, S=300, D=D, options={"causal": True})
    tile = replace(BACKWARD[D, True], queries=queries, early=early, stages=3)
    check(inputs_of(case, "cpu", torch.bfloat16), backward=tile)


# The emulator itself: a kernel that multiplies what a copy brings, and what it may forget.


@gluon.jit
def _multiply(a, full, out, out_desc, WAIT: gl.constexpr, FENCE: gl.constexpr):
    nothing = gl.zeros([64, 64], gl.float32, None)
    if WAIT:
        mbarrier.wait(full, 0)
    product = warpgroup_mma(a, a.permute((1, 0)), nothing, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    out.store(product)
    if FENCE:
        fence_async_shared()
    tma_store(out_desc, [0, 0], out)
    tma.store_wait(0)


@gluon.jit
def _bring(a_desc, a, full, TIMES: gl.constexpr):
    for _ in range(TIMES):
        mbarrier.expect(full, a_desc.block_type.nbytes)
    tma_load(a_desc, [0, 0], full, a)


@gluon.jit
def _toy_kernel(
    a_desc, out_desc, WAIT: gl.constexpr, FENCE: gl.constexpr, TIMES: gl.constexpr
):  # fmt: skip
    a = gl.allocate_shared_memory(gl.bfloat16, [64, 64], None)
    out = gl.allocate_shared_memory(gl.float32, [64, 64], None)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize(
        [
            (_multiply, (a, full, out, out_desc, WAIT, FENCE)),
            (_bring, (a_desc, a, full, TIMES)),
        ],
        [1],
        [24],
    )


def multiply(*, wait: bool = True, fence: bool = True, times: int = 1) -> torch.Tensor:
    a = torch.randn(64, 64, dtype=torch.bfloat16)
    out = torch.zeros(64, 64)
    arguments = {
        "a_desc": Blocks("a", (64, 64)),
        "out_desc": Blocks("out", (64, 64)),
        "WAIT": wait,
        "FENCE": fence,
        "TIMES": times,
    }
    emulate(Launch(_toy_kernel, (1, 1, 1), arguments), {"a": a, "out": out})
    return out - a.float() @ a.float().T


def test_emulator_runs_a_right_kernel() -> None:
    assert multiply().abs().max() == 0


def test_emulator_shows_a_product_that_did_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "SHORTEST_DELAY", 0.05)
    assert multiply(wait=False).isnan().all()


def test_emulator_asks_for_the_fence_before_a_copy() -> None:
    with pytest.raises(AssertionError, match="not fenced before a copy"):
        multiply(fence=False)


def test_emulator_names_the_barrier_that_never_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.2)
    with pytest.raises(AssertionError, match=r"never ended: phase 0, 1 of 1 arrivals"):
        multiply(times=0)


def test_emulator_counts_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.2)
    with pytest.raises(AssertionError, match="more arrivals"):
        multiply(times=2)
