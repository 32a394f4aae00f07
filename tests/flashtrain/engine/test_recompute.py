"""MLPs that run chunk by chunk: the same numbers, and no whole [tokens, d_ff] at any time."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashtrain.build import materialize
from flashtrain.compose import resolve_model
from flashtrain.config import Mlp, ModelConfig, Norm, Overlap, PositionConfig, Recompute
from flashtrain.engine.compile import compile_blocks
from flashtrain.engine.recompute import chunk_mlps, recompute_blocks
from flashtrain.model import checkpointing
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.parallel.mesh import SINGLE, Axis, build_mesh
from flashtrain.parallel.overlap import overlap_layers
from tests.distributed.test_tensor_parallel import B, T, V, backward, build
from tests.harness import run_ranks

D_FF = {"gpt2": 64, "llama": 2 * 64}  # rows that the first product of an MLP makes


class Largest(TorchDispatchMode):
    """The most tokens of `width` features that any result [.., .., width] had."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dim() == 3 and leaf.size(2) == self.width:
                self.rows = max(self.rows, leaf.numel() // self.width)
        return result


def prepared(variant: str, chunks: int, kind: Recompute, axis: Axis = SINGLE) -> GPT:
    model = build(variant, axis, torch.float32)
    chunk_mlps(model, chunks)
    if kind is not Recompute.none:
        recompute_blocks(model, kind)
    return model


def assert_same_training(ours: GPT, theirs: GPT, axis: Axis = SINGLE) -> None:
    losses = [backward(model, axis)[0] for model in (ours, theirs)]
    assert_close(*losses, rtol=1e-6, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("variant", D_FF)
def test_chunks_change_memory_and_nothing_else(variant: str, kind: Recompute) -> None:
    ours, theirs = prepared(variant, 4, kind), prepared(variant, 1, kind)
    with Largest(D_FF[variant]) as whole:
        backward(theirs, SINGLE)
    theirs.zero_grad()
    assert_same_training(ours, theirs)
    assert whole.rows == B * T
    ours.zero_grad()
    with Largest(D_FF[variant]) as part:
        backward(ours, SINGLE)
    assert part.rows == B * T // 4


@pytest.mark.parametrize("kind", Recompute)
@pytest.mark.parametrize("chunks", [1, 2])
def test_one_graph_serves_all_blocks(
    kind: Recompute, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs, fullgraph=True))
    ours, theirs = prepared("llama", chunks, kind), prepared("llama", 1, Recompute.none)
    compile_blocks(ours)
    assert_same_training(ours, theirs)
    assert graphs.frame_count == 1


def test_chunks_of_tensor_ranks(tmp_path: Path) -> None:
    run_ranks(check_tensor_ranks, 2, tmp_path)


def check_tensor_ranks() -> None:
    axis = build_mesh(dist.get_world_size()).tensor
    for wanted in (Overlap.off, Overlap.on):
        ours = prepared("llama", 3, Recompute.none, axis)
        overlap_layers(ours, axis, wanted, torch.device("cpu"))
        assert_same_training(ours, prepared("llama", 1, Recompute.none, axis), axis)


def test_selective_recomputation_knows_products_that_talk(tmp_path: Path) -> None:
    run_ranks(check_selective, 2, tmp_path)


def check_selective() -> None:
    axis = build_mesh(dist.get_world_size()).tensor
    ours = prepared("llama", 1, Recompute.selective, axis)
    overlap_layers(ours, axis, Overlap.on, torch.device("cpu"))
    with Products() as seen:
        backward(ours, axis)
    ours.zero_grad()
    assert seen.count == 2 * (4 + 2) + 1  # of each block all four, two of them again; the head
    assert_same_training(ours, prepared("llama", 1, Recompute.none, axis), axis)


class Products(TorchDispatchMode):
    """How often products with their transfers ran forward."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        ours = (torch.ops.flashtrain.gather_linear, torch.ops.flashtrain.linear_scatter)
        self.count += function.overloadpacket in ours
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [checkpointing.NEEDS_POLICY, True])
@pytest.mark.parametrize("variant", D_FF)
def test_a_compiled_block_that_is_made_again_keeps_its_input(
    variant: str, policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of our autograd functions' tensors, which torch 2.11 kept."""
    monkeypatch.setattr(checkpointing, "NEEDS_POLICY", policy)
    torch._dynamo.reset()
    model = prepared(variant, 2, Recompute.full)
    block = model.blocks[0]
    block.forward = torch.compile(  # type: ignore[method-assign]
        block.forward, dynamic=False, backend="aot_eager_decomp_partition"
    )
    x = model.embedding(torch.zeros(B, T, dtype=torch.long)).detach().requires_grad_()
    position = model.position(T, x.device, None)
    others = {p.untyped_storage().data_ptr() for p in model.parameters()}
    if position is not None:
        others.add(position.untyped_storage().data_ptr())
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in others:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, position).sum().backward()
    assert [tensor.shape for tensor in kept.values()] == [x.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Recompute.none, Recompute.full])
def test_compiled_chunks_keep_the_peak_down(kind: Recompute) -> None:
    """The compiler may reorder what it recomputes: the memory is what the parts are for."""
    tokens, width, inside = 32768, 256, 8192
    peaks, results = [], []
    for chunks in (1, 16):
        one = llama_like(width, inside, tokens)
        chunk_mlps(one, chunks)
        if kind is not Recompute.none:
            recompute_blocks(one, kind)
        compile_blocks(one)
        draw = torch.Generator("cuda").manual_seed(0)
        ids = torch.randint(V, (1, tokens), generator=draw, device="cuda")
        for _ in range(2):  # the first compiles
            one.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            one(ids).float().square().mean().backward()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([p.grad for p in one.blocks.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.linalg.vector_norm(ours - theirs) <= 1e-2 * torch.linalg.vector_norm(theirs)
    # gate and up of one block are twice this many bytes; two parts of sixteen may live at a time
    whole = tokens * inside * torch.bfloat16.itemsize
    assert peaks[1] - peaks[3] >= 2 * whole * 14 / 16


def llama_like(width: int, inside: int, length: int) -> GPT:
    """Two blocks on the GPU, in bf16, nearly all of whose activations are inside the MLPs."""
    sizes = ModelConfig(
        n_layers=2, n_heads=4, d_model=width, d_ff=inside, vocabulary=V, mlp=Mlp.swiglu,
        norm=Norm.rmsnorm,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT(resolve_model(sizes), PositionConfig(), length, "auto", torch.bfloat16)
    materialize(model, torch.device("cuda"))
    init_weights(model, seed=3)
    return model
