"""Attention over parts of a sequence against attention over the whole, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from flashtrain import layout
from flashtrain.data.loader import Batch
from flashtrain.layout import ENOUGH_ROWS, head_groups
from flashtrain.model.position import alibi_slopes
from flashtrain.parallel.chunks import cut_parts, join_parts
from flashtrain.parallel.context import (
    gather_attention,
    own_batch,
    own_part,
    ulysses_attention,
)
from flashtrain.parallel.mesh import SINGLE, Axis, build_mesh
from flashtrain.parallel.ring import ring_attention, ring_backward, ring_forward
from kernels.attention import attention, document_bounds
from kernels.attention.reference import attention_reference
from tests.accuracy import assert_as_accurate
from tests.harness import run_ranks

B, H, K, D = 2, 4, 2, 8
GROUP: Any = object()  # stands for a process group that nobody talks to
FORMS: dict[str, Callable[..., Tensor]] = {
    "gather": gather_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}


def test_chunks_are_dealt_from_both_ends() -> None:
    places = torch.arange(12)
    mine = [own_part(places, Axis(3, rank, GROUP), dim=0).tolist() for rank in range(3)]
    assert mine == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    whole = torch.randn(2, 12, 5)
    parts = torch.stack([own_part(whole, Axis(3, rank, GROUP)) for rank in range(3)])
    assert_close(join_parts(parts), whole, rtol=0, atol=0)
    assert_close(cut_parts(whole.chunk(6, 1)), parts, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("work", "heads", "groups"),
    [
        (4, (16, 16), [4, 8, 4]),
        (9, (32, 8), [2, 4, 2]),
        (9, (6, 3), [1, 1, 1]),
        (9, (10, 10), [2, 6, 2]),
        (9, (8, 2), [1, 1]),
        (9, (8, 1), [1]),
        (3, (16, 16), [5, 6, 5]),
        (2, (16, 16), [8, 8]),
        (1, (16, 16), [16]),
        (0, (16, 16), [16]),
    ],
)
def test_heads_are_grouped_where_each_group_has_enough_work(
    work: int, heads: tuple[int, int], groups: list[int]
) -> None:
    found = head_groups(2, work * ENOUGH_ROWS // heads[0] // 2, *heads)
    queries, keys = (
        [list(range(n))[own] for own in x]
        for n, x in zip(heads, zip(*found, strict=True), strict=True)
    )
    assert [len(own) for own in keys] == groups
    for n, dealt in zip(heads, (queries, keys), strict=True):
        assert [head for own in dealt for head in own] == list(range(n))
    assert [len(own) * heads[1] for own in queries] == [len(own) * heads[0] for own in keys]


def test_a_batch_keeps_its_labels_beside_its_tokens_and_all_its_documents() -> None:
    tokens = torch.arange(16).view(2, 8)
    own = own_batch(Batch(tokens, tokens + 1, tokens // 4), Axis(2, 1, GROUP))
    assert_close(own.tokens, tokens[:, 2:6])
    assert_close(own.labels, own.tokens + 1)
    assert_close(own.documents, tokens // 4)
    whole = Batch(tokens, tokens + 1)
    assert own_batch(whole, SINGLE) is whole
    with pytest.raises(ValueError, match=r"8 tokens .* 6 chunks of 3 context ranks.* 12"):
        own_part(tokens, Axis(3, 0, GROUP))


# 2 and 3 groups of heads where those of gather are as small as they can be
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_form_equals_attention_over_the_whole(ranks: int, tmp_path: Path) -> None:
    run_ranks(check_forms, ranks, tmp_path, list(FORMS), ENOUGH_ROWS)
    run_ranks(check_forms, ranks, tmp_path, ["gather"], 1)


def check_forms(names: list[str], enough: int) -> None:
    layout.ENOUGH_ROWS = enough
    size = dist.get_world_size()
    axis = build_mesh(1, context=size).context
    heads, narrow = (H, K) if size == 2 else (2 * size, size)
    expected = min(narrow, 3) if enough == 1 else 1
    assert len(head_groups(B, 4, heads, narrow)) == expected
    T = 8 * size
    slopes = torch.tensor(alibi_slopes(heads))
    # runs that end inside chunks, at their ends, and one over several chunks; ids repeat
    ends = torch.tensor([[1, 2, 2 * T // 3], [T // 2, T // 2 + 1, T - 1]])
    ids = (torch.arange(T) >= ends.unsqueeze(-1)).sum(1) % 2
    for name in names:
        form = FORMS[name]
        for backend in ("torch", "reference"):
            plain = name == "ring"
            for options in ({}, {"slopes"}, {"ids"}, {"slopes", "ids"}) if not plain else ({},):
                check(
                    form,
                    axis,
                    (heads, narrow, T),
                    slopes if "slopes" in options else None,
                    ids if "ids" in options else None,
                    backend,
                    f"{name} {backend} {options}",
                )
    q, k, v = (torch.zeros(B, 4, 2, D) for _ in "qkv")
    with pytest.raises(ValueError, match="use gather"):
        ring_attention(q, k, v, axis=axis, alibi_slopes=slopes, documents=None, backend="auto")


def check(
    form: Callable[..., Tensor],
    axis: Axis,
    sizes: tuple[int, int, int],
    slopes: Tensor | None,
    ids: Tensor | None,
    backend: str,
    what: str,
) -> None:
    heads, narrow, T = sizes
    draw = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(B, T, n, D, generator=draw, dtype=torch.float64)
        for n in (heads, narrow, narrow, heads)
    ]
    *inputs, d_out = whole
    dense = [x.clone().requires_grad_() for x in inputs]
    expected = attention(
        *dense, causal=True, alibi_slopes=slopes, documents=ids, backend="reference"
    )
    expected.backward(d_out)

    own = [own_part(x, axis).requires_grad_() for x in inputs]
    out = form(*own, axis=axis, alibi_slopes=slopes, documents=bounds_of(ids), backend=backend)
    out.backward(own_part(d_out, axis))
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(own, dense, strict=True))]
    for tensor, (found, wanted) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        assert found is not None and wanted is not None
        assert_close(
            found, own_part(wanted, axis), rtol=1e-9, atol=1e-9,
            msg=lambda text, tensor=tensor: f"{what}: {tensor}: {text}",
        )  # fmt: skip


def bounds_of(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else document_bounds(ids)


def test_operators_are_registered_right(tmp_path: Path) -> None:
    run_ranks(check_operators, 2, tmp_path)


def check_operators() -> None:
    axis = build_mesh(1, context=2).context
    q, k, v = (torch.randn(B, 4, 2, D, requires_grad=True) for _ in "qkv")
    ring = ("reference", axis.rank, axis.size, axis.name)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ring_forward, (q, k, v, *ring), test_utils=checks)
    with torch.no_grad():
        out, lse = ring_forward(q, k, v, *ring)
        given = (x.detach() for x in (out, q, k, v, out, lse))
        torch.library.opcheck(ring_backward, (*given, *ring), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_form_is_as_accurate_as_eager_on_gpus(tmp_path: Path) -> None:
    run_ranks(check_accuracy, 2, tmp_path, backend="nccl", limit=300)


def check_accuracy() -> None:
    axis = build_mesh(1, context=2).context
    draw = torch.Generator().manual_seed(0)
    T, heads, size = 2048, 8, 64
    inputs = [
        torch.randn(2, T, n, size, generator=draw).bfloat16().cuda()
        for n in (heads, heads // 2, heads // 2, heads)
    ]
    ids = (torch.rand(2, T, generator=draw) < 0.002).long().cumsum(1).cuda()
    for name, enough in [*((name, ENOUGH_ROWS) for name in FORMS), ("gather", 1)]:
        form, layout.ENOUGH_ROWS = FORMS[name], enough  # 1: in several groups of heads
        for documents in (None, ids) if name != "ring" else (None,):
            exact, eager = (whole_gradients(inputs, documents, d) for d in (torch.float64, None))
            own = [own_part(x, axis).requires_grad_() for x in inputs[:3]]
            bounds = bounds_of(documents)
            out = form(*own, axis=axis, alibi_slopes=None, documents=bounds, backend="auto")
            out.backward(own_part(inputs[3], axis))
            for i, tensor in enumerate((out, *(x.grad for x in own))):
                assert tensor is not None
                expected = (own_part(results[i], axis) for results in (eager, exact))
                assert_as_accurate(tensor.detach(), *expected, name=f"{name} {i}")


def whole_gradients(
    inputs: list[Tensor], documents: Tensor | None, dtype: torch.dtype | None
) -> list[Tensor]:
    """out, dq, dk and dv with every step in a dtype; None: in that of the inputs."""
    q, k, v, d_out = (x.to(dtype or x.dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, _ = attention_reference(*leaves, causal=True, documents=documents, compute=q.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]
