"""A whole GPT whose tensor ranks talk while they compute, against the same ranks that do not."""

import importlib
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from flashtrain.config import Overlap
from flashtrain.model.gpt import GPT
from flashtrain.parallel import pipelined
from flashtrain.parallel.gradients import gradient_norm
from flashtrain.parallel.mesh import Axis, build_mesh
from flashtrain.parallel.overlap import (
    Form,
    choose_form,
    gather_linear,
    linear_scatter,
    overlap_layers,
)
from flashtrain.parallel.peer_memory import PeerMemory
from flashtrain.parallel.transport import use_transport
from tests.accuracy import assert_as_accurate
from tests.distributed.test_tensor_parallel import backward, build
from tests.harness import run_ranks

CPU = torch.device("cpu")


def overlapped(variant: str, axis: Axis, **options: object) -> GPT:
    model = build(variant, axis, torch.float32, **options)  # type: ignore[arg-type]
    assert overlap_layers(model, axis, Overlap.on, CPU) is Form.pipelined
    return model


def assert_same_training(ours: GPT, theirs: GPT, axis: Axis) -> None:
    (loss, logits), (plain_loss, plain_logits) = backward(ours, axis), backward(theirs, axis)
    assert_close(loss, plain_loss)
    assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)
    norms = [gradient_norm(model.parameters(), axis) for model in (ours, theirs)]
    assert_close(*norms, rtol=1e-5, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_pipelined_products_train_as_plain_ones(variant: str, ranks: int, tmp_path: Path) -> None:
    run_ranks(check_pipelined, ranks, tmp_path, variant)


def check_pipelined(variant: str) -> None:
    pipelined.SMALLEST = 1
    axis = build_mesh(dist.get_world_size()).tensor
    assert_same_training(overlapped(variant, axis), build(variant, axis, torch.float32), axis)


def test_compiled_blocks_keep_the_operators_whole(tmp_path: Path) -> None:
    run_ranks(check_compiled, 2, tmp_path)


def check_compiled() -> None:
    axis = build_mesh(2).tensor
    compiled = overlapped("llama", axis)
    compiled.blocks[0].compile(fullgraph=True, backend="aot_eager")
    assert_same_training(compiled, build("llama", axis, torch.float32), axis)


def test_operators_are_registered_right(tmp_path: Path) -> None:
    run_ranks(check_operators, 2, tmp_path)


def check_operators() -> None:
    axis = build_mesh(2).tensor
    choose_form(axis, Overlap.on, CPU)
    draw = torch.Generator().manual_seed(axis.rank)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).requires_grad_()

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    gather = (leaf(2, 4, 6), leaf(10, 6).detach(), leaf(10, 6), leaf(10), axis.size, axis.name)
    torch.library.opcheck(pipelined.gather_linear, gather, test_utils=checks)
    scatter = (leaf(2, 4, 6), leaf(10, 6).detach(), leaf(10, 6), axis.size, axis.name)
    torch.library.opcheck(pipelined.linear_scatter, scatter, test_utils=checks)
    # whose gradients are ops, too
    low, dtype = leaf(10, 6).detach(), torch.float32
    back = (leaf(2, 8, 10).detach(), leaf(2, 4, 6).detach(), low, axis.size, axis.name, dtype)
    torch.library.opcheck(pipelined._gather_linear_backward, back, test_utils=checks)
    back = (leaf(2, 4, 10).detach(), leaf(2, 8, 6).detach(), low, axis.name, dtype)
    torch.library.opcheck(pipelined._linear_scatter_backward, back, test_utils=checks)


def test_a_weight_in_the_compute_dtype_is_kept_as_itself(tmp_path: Path) -> None:
    run_ranks(check_kept_weight, 2, tmp_path)


def check_kept_weight() -> None:
    """ZeRO 3 puts other memory in a parameter's place between forward and backward, which then has
    to read that."""
    axis = build_mesh(2).tensor
    choose_form(axis, Overlap.on, CPU)
    ops: list[Callable[..., Tensor]] = [gather_linear, linear_scatter]
    for form, op in product((Form.plain, Form.pipelined), ops):
        torch.manual_seed(0)
        x, weight = torch.randn(2, 4, 6).requires_grad_(), nn.Parameter(torch.randn(6, 6))
        given = [x, weight, None] if op is gather_linear else [x, weight]
        (expected,) = torch.autograd.grad(op(*given, axis, form).sum(), x)
        y, own = op(*given, axis, form), weight.data
        weight.data = torch.empty(0)
        weight.data = 2 * own
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert_close(dx, 2 * expected)


def test_fused_operators_take_what_they_are_given(tmp_path: Path) -> None:
    run_ranks(check_fused_shapes, 2, tmp_path)


def check_fused_shapes() -> None:
    """Without GPUs only shapes can be had: those of tensors that have no values."""
    axis = build_mesh(2).tensor
    importlib.import_module("torch.distributed._symmetric_memory")
    with torch.device("meta"):
        x, y = torch.empty(2, 4, 6).requires_grad_(), torch.empty(2, 8, 10).requires_grad_()
        up, down = torch.empty(10, 6).requires_grad_(), torch.empty(6, 10).requires_grad_()
    made = gather_linear(x, up, None, axis, Form.fused)
    dx, dw = torch.autograd.grad(made, (x, up), y)
    assert (made.shape, dx.shape, dw.shape) == (y.shape, x.shape, up.shape)
    made = linear_scatter(y, down, axis, Form.fused)
    dy, dw = torch.autograd.grad(made, (y, down), x)
    assert (made.shape, dy.shape, dw.shape) == (x.shape, y.shape, down.shape)


def test_auto_is_plain_on_a_cpu_and_says_so(tmp_path: Path) -> None:
    run_ranks(check_auto, 2, tmp_path)


def check_auto() -> None:
    axis = build_mesh(2).tensor
    assert choose_form(axis, Overlap.auto, CPU) is Form.plain
    model = build("gpt2", axis, torch.float32)
    for wanted in (Overlap.auto, Overlap.on):
        overlap_layers(model, axis, wanted, CPU)
        forms = {module.form for module in model.modules() if hasattr(module, "form")}
        assert forms == {Form.pipelined if wanted is Overlap.on else Form.plain}
    assert choose_form(axis, Overlap.off, CPU) is Form.plain
    with pytest.raises(ValueError, match=r"overlap=fused needs .* cpu has no memory"):
        choose_form(axis, Overlap.fused, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["stream", "kernel", "fused"])
def test_products_on_gpus_are_as_accurate_as_plain_ones(kind: str, tmp_path: Path) -> None:
    run_ranks(check_products_on_gpus, 2, tmp_path, kind, backend="nccl", limit=300)


def check_products_on_gpus(kind: str) -> None:
    """Many in a row, of sizes that change, so that memory read too early shows."""
    axis, device = build_mesh(2).tensor, torch.device("cuda", dist.get_rank())
    form = choose_form(axis, Overlap.fused if kind == "fused" else Overlap.on, device)
    if kind != "fused":
        assert axis.group is not None
        use_transport(axis.name, PeerMemory(axis.group, device, kind))
    draw = torch.Generator(device).manual_seed(axis.rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).bfloat16()

    for part in (256, 1024, 512, 1024, 768, 1024, 1024, 256):
        inside, outside = 512, 384
        leaves = random(2, part, inside), random(outside, inside) / inside**0.5
        grad = random(2, 2 * part, outside)
        compare(lambda form, x, w: gather_linear(x, w, None, axis, form), leaves, grad, form)
        leaves = random(2, 2 * part, outside), random(inside, outside) / outside**0.5
        grad = random(2, part, inside)
        compare(lambda form, x, w: linear_scatter(x, w, axis, form), leaves, grad, form)


def compare(
    op: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor, form: Form
) -> None:
    found = []
    for its_form, dtype in ((form, None), (Form.plain, None), (Form.plain, torch.float64)):
        inputs = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
        y = op(its_form, *inputs)
        found.append([y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))])
    for name, *results in zip(("output", "dx", "dW"), *found, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wanted", [Overlap.on, Overlap.fused])
def test_compiled_training_on_gpus(wanted: Overlap, tmp_path: Path) -> None:
    run_ranks(check_compiled_on_gpus, 2, tmp_path, wanted, backend="nccl", limit=300)


def check_compiled_on_gpus(wanted: Overlap) -> None:
    axis, device = build_mesh(2).tensor, torch.device("cuda", dist.get_rank())
    results = []
    for choice in (Overlap.off, wanted):
        model = build("llama", axis, torch.bfloat16, "auto", "cuda", head_size=64)
        overlap_layers(model, axis, choice, device)
        for block in model.blocks:
            block.compile(fullgraph=True)
        loss, _ = backward(model, axis)
        results.append((loss, gradient_norm(model.parameters(), axis)))
    # as far apart as sums of bf16 terms in another order
    assert_close(results[1], results[0], rtol=5e-3, atol=0)
