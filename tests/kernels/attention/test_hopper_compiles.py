"""The Hopper kernels compile for sm_90 and come out of ptxas as tiles.py means them. No GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.attention import attention
from kernels.attention.hopper.launch import Launch
from kernels.attention.hopper.tiles import choose_backward
from tests.kernels.attention.cases import Case, inputs_of
from tests.kernels.attention.compile_gluon import Built, compile_launch
from tests.kernels.attention.hopper_calls import passes_of
from tests.kernels.interpreter import interpreted

SHARED_LIMIT = 232_448  # bytes a program may use on sm_90
# ptxas' words for products that run one after the other instead of at the same time
SERIALISED = ("C7510", "C7514", "C7517")
FORWARD_PASS, BACKWARD_PASS = 0, 2  # of the launches: between them delta, after them the cast


CALLS = {  # at 1152 queries three consumers of 64 rows are taken, where they are worth it
    "causal": {"options": {"causal": True}},
    "full": {"options": {"causal": False}},
    "alibi": {"options": {"causal": True}, "alibi": True},
    "window": {"options": {"causal": False, "window": (100, 50)}},
    "documents": {"options": {"causal": True}, "documents": True},
    "softcap": {"options": {"causal": True, "softcap": 20.0}},
    "softcap, full": {"options": {"causal": False, "softcap": 20.0}},
    "sinks": {"options": {"causal": True}, "sinks": True},
    "everything": {
        "options": {"causal": True, "window": (100, 0), "softcap": 20.0},
        "alibi": True,
        "sinks": True,
        "documents": True,
    },
}


@pytest.fixture(autouse=True, scope="module")
def after_the_interpreter() -> None:
    """As other tests of the same process run it before: it must leave nothing behind."""
    with interpreted("kernels.attention.portable"):
        q = torch.randn(1, 16, 2, 16)
        attention(q, q, q, causal=True, backend="triton")


def built(
    number: int, D: int, call: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[Built, Launch]:
    """One launch of a call, compiled; `changes` of the backward's tile."""
    case = Case(T=1152, S=1152, D=D, B=3, H=4, H_kv=2, **CALLS[call])
    tile = None
    if D <= 128:
        limits = case.documents or "window" in case.options
        tile = choose_backward(D, case.options["causal"], case.T, limits=limits)
        tile = replace(tile, **changes)
    passes = passes_of(inputs_of(case, "cpu", dtype), backward=tile)
    launch = passes.launches[number]
    return compile_launch(launch, passes.tensors), launch


def few(cases: list[tuple[Any, ...]], slow: list[tuple[Any, ...]]) -> list[Any]:
    """The cases of every day, and those that only -m slow compiles."""
    return [*cases, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(
    ("D", "call", "spills"),
    few(
        [(64, "causal", 0), (128, "causal", 0), (128, "full", 0), (256, "causal", 0)],
        [
            *((D, call, 0) for D in (64, 128) for call in ("alibi", "window", "documents")),
            *((D, "softcap", 0) for D in (64, 128, 256)),
            *((D, "sinks", 0) for D in (64, 128, 256)),
            (64, "full", 0),
            (96, "causal", 0),
            (256, "full", 0),
            (256, "window", 0),
            (256, "documents", 8),
            (64, "everything", 0),
            (128, "everything", 28),
            (256, "everything", 28),
        ],
    ),
)
def test_forward_keeps_all_in_registers(D: int, call: str, spills: int) -> None:
    kernel, launch = built(FORWARD_PASS, D, call)
    consumers = launch.arguments["CONSUMERS"]
    assert consumers == (3 if D == 64 and call not in ("everything", "documents") else 2)
    check(kernel, consumers, consumers)
    assert kernel.spilled <= spills


@pytest.mark.parametrize(
    # bytes a thread spills, and loads and stores of them inside a loop of 390 to 1200 instructions
    ("D", "call", "changes", "spills", "inside"),
    few(
        # at D = 64 the 128 queries of a tile leave no register
        [
            (64, "causal", {}, 128, 0),
            (64, "full", {}, 128, 0),
            (128, "causal", {}, 0, 0),
            (128, "full", {"ahead": True}, 192, 2),
        ],
        [
            (128, "full", {}, 16, 0),
            (128, "causal", {"ahead": True}, 256, 0),
            (96, "causal", {}, 0, 0),
            (64, "alibi", {}, 160, 0),
            (128, "alibi", {}, 0, 0),
            *((64, call, {}, 0, 0) for call in ("window", "documents", "everything")),
            (128, "window", {}, 0, 0),
            (128, "documents", {}, 16, 0),
            (128, "everything", {}, 64, 0),
            (64, "softcap", {}, 128, 2),
            (64, "softcap, full", {}, 192, 12),
            (128, "softcap", {}, 0, 0),
            (128, "softcap, full", {}, 128, 0),
        ],
    ),
)
def test_backward_spills_outside_of_its_loops_mostly(
    D: int, call: str, changes: dict[str, Any], spills: int, inside: int
) -> None:
    kernel, _ = built(BACKWARD_PASS, D, call, **changes)
    check(kernel, partitions=2, consumers=2)  # one consumer and the producer beside the default
    assert kernel.spilled <= spills
    for body in kernel.hot_loops():
        assert sum("STL" in text or "LDL" in text for text in body) <= inside


def test_float16_compiles() -> None:
    for number in range(4):
        built(number, 64, "causal", torch.float16)


def check(kernel: Built, partitions: int, consumers: int) -> None:
    """Specialised warps, tensor-core products that overlap, shared memory that fits."""
    assert kernel.partitions == partitions
    assert len(kernel.hot_loops()) % consumers == 0
    assert all(sum("HGMMA" in text for text in body) >= 8 for body in kernel.hot_loops())
    assert kernel.count("USETMAXREG") > 0
    assert kernel.shared <= SHARED_LIMIT
    assert not [word for word in SERIALISED if word in kernel.log], kernel.log
