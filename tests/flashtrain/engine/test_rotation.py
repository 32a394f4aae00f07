"""Heads are turned in the memory that the projection wrote: in compiled blocks no copy is left, and
with blocks that run again in backward the numbers are those of a rotation apart."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from flashtrain.build import materialize
from flashtrain.config import (
    LinearKind,
    Mlp,
    Norm,
    Overlap,
    PositionConfig,
    PositionKind,
    PrecisionConfig,
    Recompute,
)
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.recompute import recompute_blocks
from flashtrain.model.float8 import use_float8
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.parallel.mesh import build_mesh
from flashtrain.parallel.overlap import overlap_layers
from flashtrain.parallel.plan import apply_plan, gpt_plan
from tests.flashtrain.model.test_gpt import build, some_tokens, tiny
from tests.harness import run_ranks
from tests.kernels.interpreter import Platform, interpreted, platforms

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


def test_a_copy_would_show(platform: Platform) -> None:
    """Overwriting what `selective` keeps: PyTorch refuses it, and compiled makes a copy."""
    eager, compiled = (
        model_for("gpt", Recompute.selective, platform, backend=kernels_of(platform)) for _ in "12"
    )
    for block in (*eager.blocks, *compiled.blocks):
        block.attention.keeps_product = False
    with pytest.raises(RuntimeError, match="activation checkpoint has been mutated"):
        run(eager)
    compile_blocks(compiled)
    ours, (forward, backward) = run_and_get_code(run, compiled)
    assert [turned_in_place(code) for code in (forward, backward)] == [[False], [False]]
    apart = model_for("gpt", Recompute.none, platform, backend="torch")
    assert_alike(ours, run(apart), platform)


def test_compiled_fp8_layers_leave_no_copy_either(platform: Platform) -> None:
    wide = Platform(platform.device, torch.bfloat16)
    model = model_for(
        "llama", Recompute.none, wide, backend=kernels_of(wide), compiles=True, fp8=True
    )
    _, (forward, _) = run_and_get_code(run, model, T=16)
    assert turned_in_place(forward) == [True]


@pytest.mark.parametrize("overlap", [Overlap.off, Overlap.on])
def test_tensor_ranks_turn_what_their_projection_wrote(overlap: Overlap, tmp_path: Path) -> None:
    run_ranks(check_tensor_ranks, 2, tmp_path, overlap)


def check_tensor_ranks(overlap: Overlap) -> None:
    axis = build_mesh(dist.get_world_size()).tensor
    device = torch.device("cpu")

    def split(backend: str) -> GPT:
        config = tiny(head_size=64, **MODELS["llama"])
        with torch.device("meta"):
            model = GPT(config, PositionConfig(PositionKind.rope), 16, backend)
        apply_plan(model, gpt_plan(config), axis)
        overlap_layers(model, axis, overlap, device)
        materialize(model, device)
        init_weights(model, seed=3)
        return model

    model = split("triton")
    compile_blocks(model)
    with interpreted("kernels.attention.portable"):
        ours, (forward, _) = run_and_get_code(run, model, T=12)
    assert turned_in_place(forward) == [True]
    assert_alike(ours, run(split("torch"), T=12), Platform("cpu", torch.float32))
