"""Heads are turned in the memory that the projection wrote: in compiled blocks no copy is left, and
with blocks that run again in backward the numbers are those of a rotation apart."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from flashtrain.config import (
    LinearKind,
    Mlp,
    Norm,
    PositionConfig,
    PositionKind,
    PrecisionConfig,
    Recompute,
)
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.recompute import recompute_blocks
from flashtrain.model.float8 import use_float8
from flashtrain.model.gpt import GPT
from tests.flashtrain.model.test_gpt import build, some_tokens, tiny
from tests.kernels.interpreter import Platform, platforms

platform = platforms("kernels.attention.portable", cpu=(torch.float32,), cuda=(torch.bfloat16,))
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"bias": True},
    "llama": {"n_kv_heads": 2, "norm": Norm.rmsnorm, "mlp": Mlp.swiglu, "bias": False},
}


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kernels_of(platform: Platform) -> str:
    return "auto" if platform.on_gpu else "triton"


def model_for(
    name: str, kind: Recompute, platform: Platform, *, backend: str, compiles: bool = False,
    fp8: bool = False,
) -> GPT:  # fmt: skip
    config = tiny(head_size=64, **MODELS[name])
    position = PositionConfig(PositionKind.rope, partial_rotary_factor=0.5 if fp8 else 1.0)
    model = build(config, position, backend=backend, dtype=platform.dtype).to(platform.device)
    if fp8:
        use_float8(model, PrecisionConfig(linear=LinearKind.fp8_tensorwise, keep_blocks=0))
    if kind is not Recompute.none:
        recompute_blocks(model, kind)
    if compiles:
        compile_blocks(model)
    return model


def run(model: GPT, packs: bool = False, T: int = 11) -> list[Tensor]:
    """Output and gradients."""
    tokens = some_tokens(T=T).to(next(model.parameters()).device)
    documents = (torch.arange(tokens.shape[1]) // 4).expand_as(tokens).contiguous()
    hidden = model(tokens, documents.to(tokens.device) if packs else None)
    torch.manual_seed(1)
    seed = torch.randn(hidden.shape, device=hidden.device).to(hidden.dtype)
    found = torch.autograd.grad(hidden, list(model.parameters()), seed, allow_unused=True)
    return [hidden.detach(), *(gradient for gradient in found if gradient is not None)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], platform: Platform) -> None:
    bound = 0.05 if platform.on_gpu else 2e-5  # of the largest: bf16, and fp32, two blocks deep
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound * float(other.abs().max()))


def turned_in_place(code: str) -> list[bool]:
    """Of each call that turns heads in Inductor's code: is it the very memory that a product, or
    an operator that stands for one, wrote, and that attention then reads?"""
    # a copy would be a buffer that a kernel of the compiler's own fills
    written = set(re.findall(r"out=(buf\d+)", code)) | set(
        re.findall(r"(buf\d+) = torch\.ops\.", code)
    )
    for new, old in re.findall(r"(buf\d+) = (buf\d+)(?:\[0\])?(?:;|$)", code, re.MULTILINE):
        written |= {new} if old in written else set()
    argument = r"\.default\((?:reinterpret_tensor\()?(buf\d+)"
    turned = re.findall(rf"rotate_heads_{argument}", code)
    read = re.findall(rf"attention_forward{argument}", code)
    return [one in written and one in read for one in turned]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", Recompute)
def test_the_same_with_blocks_that_run_again(
    kind: Recompute, name: str, platform: Platform
) -> None:
    ours = run(model_for(name, kind, platform, backend=kernels_of(platform)), packs=name == "llama")
    apart = model_for(name, Recompute.none, platform, backend="torch")
    assert_alike(ours, run(apart, packs=name == "llama"), platform)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt", Recompute.none), ("llama", Recompute.none), ("llama", Recompute.light),
        ("gpt", Recompute.full), ("gpt", Recompute.selective),
    ],
)  # fmt: skip
def test_compiled_blocks_turn_what_the_projection_wrote(
    name: str, kind: Recompute, platform: Platform
) -> None:
    packs = name == "llama"
    model = model_for(name, kind, platform, backend=kernels_of(platform), compiles=True)
    ours, codes = run_and_get_code(run, model, packs)
    assert_alike(
        ours, run(model_for(name, kind, platform, backend=kernels_of(platform)), packs), platform
    )
    forward, backward = codes
    if kind is Recompute.selective:  # the projection's output is kept, and turned again in backward
        assert [code.count("rotate_heads.default(") for code in codes] == [1, 1]
        assert not turned_in_place(forward + backward)
        return
    assert turned_in_place(forward) == [True]
    assert all(turned_in_place(backward))


def test_compiled_fp8_layers_leave_no_copy_either(platform: Platform) -> None:
    wide = Platform(platform.device, torch.bfloat16)
    model = model_for(
        "llama", Recompute.none, wide, backend=kernels_of(wide), compiles=True, fp8=True
    )
    _, (forward, _) = run_and_get_code(run, model, T=16)
    assert turned_in_place(forward) == [True]
