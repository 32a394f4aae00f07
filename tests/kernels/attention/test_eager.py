"""Eager calls that go around the custom ops: the same numbers, and only where nobody looks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import attention
from kernels.attention.eager import is_plain
from kernels.attention.op import _judged
from tests.kernels.attention.cases import CASES, inputs_of, run
from tests.kernels.interpreter import Platform


class Seen(TorchDispatchMode):
    """Writes down the ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["grouped", "everything and more"])
def test_eager_and_op_give_the_same_bits(name: str, platform: Platform) -> None:
    inputs = inputs_of(CASES[name], platform.device, platform.dtype)
    around = run(inputs, "triton")
    with Seen() as seen:
        through = run(inputs, "triton")
    for key, value in around.items():
        assert torch.equal(value, through[key]), key
    assert "flashtrain::attention_forward" in seen.names
    assert "flashtrain::attention_backward" in seen.names


def test_a_mode_entered_after_the_forward_sees_the_backward_op(platform: Platform) -> None:
    q = torch.randn(1, 8, 1, 16, device=platform.device, dtype=platform.dtype, requires_grad=True)
    out = attention(q, q, q, causal=True, backend="triton")
    with Seen() as seen:
        out.sum().backward()
    assert "flashtrain::attention_backward" in seen.names


def test_only_plain_tensors_are_plain() -> None:
    x = torch.zeros(2)
    assert is_plain(x, torch.nn.Parameter(x), None, 3)
    with FakeTensorMode() as mode:
        assert not is_plain(x)
        fake = mode.from_tensor(x)
    assert not is_plain(fake)
    seen = []
    torch.func.vmap(lambda y: seen.append(is_plain(y)) or y)(x)
    torch.func.grad(lambda y: seen.append(is_plain(y)) or y.sum())(x)
    assert seen == [False, False]


def test_what_is_looked_up_is_checked_again_when_anything_differs(platform: Platform) -> None:
    q = torch.randn(1, 6, 2, 16, device=platform.device, dtype=platform.dtype)
    options = {"causal": True, "backend": "triton"}
    attention(q, q, q, **options)
    known = len(_judged)
    attention(q.clone(), q, q, **options)
    assert len(_judged) == known
    for wrong, message in (
        ({"scale": -1.0}, "scale=-1.0"),
        ({"window": (-2, 0)}, "window"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"key_mask": torch.ones(1, 7, device=platform.device).bool()}, "key_mask must be"),
        ({"alibi_slopes": torch.ones(2, device=platform.device).half()}, "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, **options, **wrong)
    slopes = torch.ones(2, device=platform.device)
    attention(q, q, q, **options, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="no gradient"):
        attention(q, q, q, **options, alibi_slopes=slopes.requires_grad_())
    with pytest.raises(ValueError, match="stride 2, not 1"):
        attention(torch.stack([q, q], -1)[..., 0], q, q, **options)


def test_second_derivatives_are_refused(platform: Platform) -> None:
    q = torch.randn(1, 8, 1, 16, device=platform.device, dtype=platform.dtype, requires_grad=True)
    out = attention(q, q, q, causal=True, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()
