"""The Hopper kernels compile for sm_90 and come out of ptxas as tiles.py means them. No GPU."""

import pytest
import torch

from kernels.attention.hopper.tiles import BACKWARD, FORWARD
from tests.kernels.attention.cases import Case, inputs_of
from tests.kernels.attention.compile_gluon import Built, compile_launch
from tests.kernels.attention.hopper_calls import passes_of

SHARED_LIMIT = 232_448  # bytes a program may use on sm_90
# ptxas' words for products that run one after the other instead of at the same time
SERIALISED = ("C7510", "C7514", "C7517")
FORWARD_PASS, BACKWARD_PASS = 0, 2  # of the launches: between them delta, after them the cast


def built(number: int, D: int, causal: bool, dtype: torch.dtype, alibi: bool) -> Built:
    case = Case(T=512, S=512, D=D, H=4, H_kv=2, options={"causal": causal}, alibi=alibi)
    passes = passes_of(inputs_of(case, "cpu", dtype))
    return compile_launch(passes.launches[number], passes.tensors)


@pytest.mark.parametrize(
    ("D", "causal", "alibi"), [*((*key, False) for key in FORWARD), (128, True, True)]
)
def test_forward_keeps_all_in_registers(D: int, causal: bool, alibi: bool) -> None:
    kernel = built(FORWARD_PASS, D, causal, torch.bfloat16, alibi)
    consumers = FORWARD[D, causal].consumers
    check(kernel, consumers)
    assert kernel.spilled == 0


@pytest.mark.parametrize(
    ("D", "causal", "alibi"), [*((*key, False) for key in BACKWARD), (64, True, True)]
)
def test_backward_spills_outside_of_its_loops_only(D: int, causal: bool, alibi: bool) -> None:
    kernel = built(BACKWARD_PASS, D, causal, torch.bfloat16, alibi)
    check(kernel, consumers=2)
    assert kernel.spilled <= 256
    # at D = 64 the 128 queries of a tile leave no register: a few words go through the stack
    allowed = 0 if D == 128 else 16
    for body in kernel.hot_loops():
        assert sum("STL" in text or "LDL" in text for text in body) <= allowed


def test_float16_compiles() -> None:
    for number in range(4):
        built(number, 64, True, torch.float16, False)


def check(kernel: Built, consumers: int) -> None:
    """Specialised warps, tensor-core products that overlap, shared memory that fits."""
    assert kernel.partitions == consumers  # all but one of the consumers, and the producer
    assert len(kernel.hot_loops()) == consumers
    assert all(sum("HGMMA" in text for text in body) >= 8 for body in kernel.hot_loops())
    assert kernel.count("USETMAXREG") > 0
    assert kernel.shared <= SHARED_LIMIT
    assert not [word for word in SERIALISED if word in kernel.log], kernel.log
