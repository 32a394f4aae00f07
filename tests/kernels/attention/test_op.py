"""The public function: refusals, torch.library, torch.compile, layouts, determinism."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_decode, explain
from kernels.attention.ranges import document_bounds, document_ids, key_range
from kernels.attention.registration import attention_backward, attention_forward
from tests.kernels.attention.cases import CASES, Case, inputs_of, run, run_by
from tests.kernels.interpreter import Platform


def qkv(*shape: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*(shape or (1, 4, 2, 8)), **options) for _ in range(3))
    return q, k, v


Q, K, V = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8), torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (Q[0], K, V, {}, r"\[5, 4, 8\]"),
        (Q, K, V[:, :6], {}, r"k and v must share .*, got \[2, 7, 2, 8\] and \[2, 6, 2, 8\]"),
        (Q[:1], K, V, {}, "q has batch 1, k and v have 2"),
        (Q[..., :4], K, V, {}, "q has head size 4, k has 8"),
        (Q[:, :, :3], K, V, {}, "3 query heads are not a multiple of 2 kv heads"),
        (*qkv(1, 2, 1, 257), {}, "head size 257 is not between 1 and 256"),
        (Q, K.half(), V, {}, "share a dtype, got torch.float32, torch.float16"),
        (Q.int(), K.int(), V.int(), {}, "must be floating point, got torch.int32"),
        (Q, K, V, {"scale": 0.0}, "scale=0.0 must be above 0"),
        (Q, K, V, {"softcap": -1.0}, "softcap=-1.0 must be above 0"),
        (Q, K, V, {"window": (4, -2)}, r"window=\(4, -2\)"),
        (Q, K, V, {"sinks": torch.zeros(3)}, r"sinks must be \[4\] on cpu, got \[3\]"),
        (Q, K, V, {"alibi_slopes": torch.zeros(4).half()}, "must be torch.float32"),
        (Q, K, V, {"alibi_slopes": torch.zeros(4, requires_grad=True)}, "no gradient"),
        (Q, K, V, {"documents": torch.zeros(2, 5).int()}, "as many queries as keys, got 5 and 7"),
        (
            Q,
            Q,
            Q,
            {"documents": torch.zeros(2, 4).int()},
            r"documents must be ids \[2, 5\] or cu_seqlens",
        ),
        (Q, Q, Q, {"documents": torch.zeros(2, 5)}, "int32 or int64, got torch.float32"),
        (Q, Q, Q, {"documents": torch.zeros(1).int()}, r"cu_seqlens .*, got \[1\] on cpu"),
        (*qkv(1, 2, 1, 8)[:2], torch.zeros(1, 2, 1, 300), {}, "value size 300 is not between"),
        (Q, K, V, {"bias": torch.zeros(4, 5, 7)}, r"\[2 or 1, 4 or 1, 5 or 1, 7\] on cpu, got"),
        (Q, K, V, {"bias": torch.zeros(1, 4, 5, 1)}, r"bias must be .*, got \[1, 4, 5, 1\]"),
        (Q, K, V, {"bias": torch.ones(1, 1, 1, 7).bool()}, "torch.bool; .* goes into key_mask"),
        (Q, K, V, {"key_mask": torch.ones(2, 5).bool()}, r"key_mask must be \[2, 7\]"),
        (Q, K, V, {"key_mask": torch.ones(2, 7)}, "torch.bool, True where seen, got torch.float32"),
        (Q, K, V, {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        (Q, K, V, {"dropout_seed": torch.zeros(1).int()}, r"one torch.int64 on cpu, got \[1\]"),
        (Q, K, V, {"backend": "flash"}, "backend='flash' is not one of auto, hopper"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        attention(q, k, v, causal=True, **options)
    assert "\n" not in str(refusal.value)


def test_backends_that_need_a_gpu_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("triton", "hopper"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot run .* CUDA tensors, got cpu"):
            attention(*qkv(), causal=True, backend=backend)


def test_explain_names_the_backend_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert explain(*qkv(), causal=True) == "torch (PyTorch's fused CPU kernel)"
    assert explain(*qkv(), causal=True, softcap=1.0) == (
        "reference (scaled_dot_product_attention has no softcap)"
    )
    with pytest.raises(ValueError, match="got cpu"):
        explain(*qkv(), causal=True, backend="triton")


def test_triton_refuses_what_it_would_have_to_copy_or_widen(platform: Platform) -> None:
    q, k, v = qkv(1, 8, 2, 4, device=platform.device, dtype=platform.dtype)
    strided = torch.stack([k, k], -1).flatten(3)[..., ::2]
    with pytest.raises(ValueError, match="last dimension of k has stride 2, not 1"):
        attention(q, strided, v, causal=True, backend="triton")
    with pytest.raises(ValueError, match="float16, bfloat16 and float32, got"):
        attention(q.double(), k.double(), v.double(), causal=True, backend="triton")


def test_library_checks_pass(platform: Platform) -> None:
    q, k, v = qkv(1, 20, 2, 16, device=platform.device, dtype=platform.dtype)
    sinks = torch.zeros(2, device=platform.device)
    slopes = torch.ones(2, device=platform.device)
    bounds = document_bounds(torch.zeros(1, 20, dtype=torch.int32, device=platform.device))
    bias = torch.randn(1, 2, 20, 20, device=platform.device)
    seen = torch.ones(1, 20, dtype=torch.bool, device=platform.device)
    seed = torch.tensor([5], device=platform.device)
    everything = (slopes, sinks, bounds, bias.requires_grad_(), seen, key_range(seen), seed)
    for optional, dropout in (((None,) * 7, 0.0), (everything, 0.1)):
        options = (*optional, 0.25, -1, 0, 0.0, dropout, True, "triton")
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(attention_forward, (*leaves, *options))
        options = tuple(x.detach() if isinstance(x, Tensor) else x for x in options)
        out, lse = attention_forward(q, k, v, *options)
        given = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, dropout > 0)
        torch.library.opcheck(attention_backward, (*given, *options))


COMPILED = [
    ("documents", "triton"),
    ("documents", "auto"),
    ("documents, both sides", "reference"),
    ("narrow values", "triton"),
    ("bias, all its own", "triton"),
    ("bias of pairs", "auto"),
    ("key mask", "triton"),
    ("dropout", "triton"),
    ("everything and more", "triton"),
]


@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_compiles_without_a_graph_break(name: str, backend: str, platform: Platform) -> None:
    inputs = inputs_of(CASES[name], platform.device, platform.dtype)

    def call(**arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(**arguments)
        return out * 1.0, lse

    torch._dynamo.reset()  # or the cases before this one count as recompilations
    # inductor takes half a minute to build its first C++ kernel; on GPUs it is what users get
    dynamic = True if name == "everything and more" else None  # one case with symbolic sizes
    compiled = torch.compile(call, fullgraph=True, backend=_compiler(platform), dynamic=dynamic)
    plain, other = (run_by(function, inputs, backend=backend) for function in (call, compiled))
    loose = 2e-2 if platform.on_gpu else 1e-5  # inductor fuses, so bf16 rounds elsewhere
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=loose, atol=loose)


def test_compiled_lengths_may_change() -> None:
    """As they do in a curriculum; torch.compile then holds every size as a symbol."""
    torch._dynamo.reset()

    def call(q: Tensor) -> Tensor:
        return attention(q, q, q, causal=True) * 1.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (16, 24, 33):
        q = torch.randn(2, T, 2, 16, requires_grad=True)
        (mine,), (other,) = (torch.autograd.grad(f(q).sum(), q) for f in (compiled, call))
        torch.testing.assert_close(mine, other)


def test_a_compiler_may_take_some_sizes_of_packed_sequences_for_symbols() -> None:
    torch._dynamo.reset()

    def call(q: Tensor, ids: Tensor) -> Tensor:
        return attention(q, q, q, causal=True, documents=ids) * 1.0

    q, ids = torch.randn(4, 16, 2, 16), torch.zeros(4, 16, dtype=torch.int32)
    torch._dynamo.maybe_mark_dynamic(q, [0, 1])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, ids), call(q, ids))


def _compiler(platform: Platform) -> str:
    return "inductor" if platform.on_gpu else "aot_eager"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_layout_gives_the_same_answer(backend: str, platform: Platform) -> None:
    if backend == "torch" and platform.on_gpu:
        pytest.skip("PyTorch picks another kernel for another layout")
    fused = torch.randn(2, 21, 3 * 2 * 16, device=platform.device, dtype=platform.dtype)
    d_out = torch.randn(2, 2, 16, 21, device=platform.device, dtype=platform.dtype)

    def gradients(layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        q, k, v = (layout(x.unflatten(-1, (2, 16))) for x in fused.chunk(3, -1))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, backend=backend)
        arriving = d_out.permute(0, 3, 1, 2)  # last dimension not contiguous
        if layout is packed:
            arriving = arriving.contiguous()
        return [out, *torch.autograd.grad(out, leaves, arriving)]

    def packed(x: Tensor) -> Tensor:
        return x.contiguous()

    def view(x: Tensor) -> Tensor:
        return x

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def unaligned(x: Tensor) -> Tensor:
        room = x.new_zeros(2, 21, 2, 17)
        room[..., 1:] = x
        return room[..., 1:]

    expected = gradients(packed)
    loose = 1e-2 if platform.on_gpu else 1e-5
    for layout in (view, heads_first, unaligned):
        torch.testing.assert_close(gradients(layout), expected, rtol=loose, atol=loose)


def test_gradients_through_one_output_alone_are_right(platform: Platform) -> None:
    inputs = inputs_of(CASES["seventeen"], platform.device, torch.float32)
    for pick in (0, 1):
        grads = {}
        for backend in ("triton", "reference"):
            leaves = [x.clone().requires_grad_() for x in inputs.tensors.values()]
            result = attention(*leaves, causal=True, return_lse=True, backend=backend)[pick]
            # .sum() arrives as an expanded gradient: every stride is 0
            grads[backend] = torch.autograd.grad(result.sum(), leaves, materialize_grads=True)
        torch.testing.assert_close(grads["triton"], grads["reference"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "everything"])
def test_deterministic_gradients_repeat_bit_for_bit(name: str, platform: Platform) -> None:
    case = CASES[name].on_gpu() if platform.on_gpu else CASES[name]
    inputs = inputs_of(case, platform.device, platform.dtype)
    first = run(inputs, "triton", deterministic=True)
    for _ in range(20 if platform.on_gpu else 1):
        again = run(inputs, "triton", deterministic=True)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_documents_are_separate_calls(backend: str, platform: Platform) -> None:
    if backend == "torch" and platform.on_gpu:
        pytest.skip("its lse is for the CPU")
    q, k, v = qkv(1, 40, 2, 16, device=platform.device, dtype=platform.dtype)
    # the same id comes back after another one: it is a new document
    ids = torch.tensor([3] * 7 + [1] * 20 + [3] * 13, device=platform.device)[None]
    out = attention(q, k, v, causal=True, documents=ids, backend=backend)
    for dtype in (torch.int32, torch.int64):  # an empty document among them, and a rest
        starts = torch.tensor([0, 7, 7, 27], dtype=dtype, device=platform.device)
        packed = attention(q, k, v, causal=True, documents=starts, backend=backend)
        assert torch.equal(packed, out)
    apart = [
        attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=True, backend=backend)
        for a, b in ((0, 7), (7, 27), (27, 40))
    ]
    tolerance = 1e-5 if platform.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, torch.cat(apart, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_empty_inputs_give_empty_or_zero_results(
    shape: tuple[int, int, int], platform: Platform
) -> None:
    B, T, S = shape
    case = Case(T=T, S=S, B=B, options={"causal": False})
    inputs = inputs_of(case, platform.device, platform.dtype)
    for backend in ("triton", "auto"):
        results = run(inputs, backend)
        assert results["out"].shape == (B, T, 2, 16)
        for key, value in results.items():
            expected = float("-inf") if key == "lse" else 0.0
            assert bool((value == expected).all()), key


def test_large_scores_do_not_overflow(platform: Platform) -> None:
    inputs = inputs_of(CASES["causal"], platform.device, platform.dtype)
    inputs.tensors["q"] *= 60  # scores of several hundred: exp would be infinite
    for key, value in run(inputs, "triton").items():
        assert value.isfinite().all(), key


def test_cu_seqlens_count_through_the_rows_of_a_batch() -> None:
    starts = torch.tensor([0, 3, 8, 12])
    ids = document_ids(starts, 2, 6)
    assert ids.tolist() == [[1, 1, 1, 2, 2, 2], [2, 2, 3, 3, 3, 3]]


def test_bias_gets_a_gradient_only_where_it_is_asked_for(platform: Platform) -> None:
    inputs = inputs_of(CASES["bias of pairs"], platform.device, platform.dtype)
    bias = inputs.tensors.pop("bias")
    results = run(inputs, "triton", bias=bias)  # not a leaf, so no gradient of it is computed
    inputs.tensors["bias"] = bias
    for key, value in run(inputs, "triton").items():
        if key == "dbias":
            assert value.shape == bias.shape and value.dtype == bias.dtype
        else:
            assert torch.equal(value, results[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("features", [False, True])
def test_cuda_graph_replays_with_new_inputs(features: bool) -> None:
    q, k, v = qkv(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    more: dict[str, Tensor] = {}
    if features:
        more = {
            "bias": torch.randn(1, 4, 300, 300, device="cuda"),
            "key_mask": torch.rand(2, 300, device="cuda") < 0.7,
            "documents": torch.tensor([0, 100, 250, 420, 600], device="cuda"),
            "dropout_seed": torch.tensor([1], device="cuda"),
        }
        leaves.append(more["bias"].requires_grad_())
    dropout = 0.2 if features else 0.0

    def step() -> list[Tensor]:
        out = attention(q, k, v, causal=True, dropout=dropout, **more)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up: compile outside the capture
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
        if features:
            more["key_mask"].logical_not_()
            more["documents"].copy_(torch.tensor([0, 50, 350, 360, 600]))
            more["dropout_seed"] += 1
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "bias of pairs", "everything and more"])
def test_fifty_repeats_are_identical(name: str) -> None:
    # several tiles for each multiprocessor, so that programs finish in another order every time
    case = replace(CASES[name], B=4, T=1000, S=1000, D=64, Dv=64, H=32, H_kv=8)
    inputs = inputs_of(case, "cuda", torch.bfloat16)
    first = run(inputs, "triton")
    for _ in range(50):
        for key, value in run(inputs, "triton").items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bounds_made_once_say_the_same_as_ids(backend: str, platform: Platform) -> None:
    inputs = inputs_of(CASES["documents"], platform.device, platform.dtype)
    ids = inputs.extras["documents"]
    by_ids = run(inputs, backend)
    inputs.extras["documents"] = document_bounds(ids)
    for name, value in run(inputs, backend).items():
        assert torch.equal(value, by_ids[name]), name


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_vectors_may_be_parts_of_others(backend: str, platform: Platform) -> None:
    """Every other head's slope, one document's bounds for a whole batch."""
    B = 2
    made = inputs_of(replace(CASES["everything"], B=B), platform.device, platform.dtype)
    bounds = document_bounds(made.extras["documents"][:1])

    def grown(x: Tensor) -> Tensor:
        return torch.stack([x.detach(), torch.full_like(x, 9)], -1).flatten()[::2]

    def call(change: Callable[[Tensor], Tensor], bounds: Tensor) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in made.tensors.items()}
        given = {**leaves, "sinks": change(leaves["sinks"]).requires_grad_()}
        options = {**made.extras, "alibi_slopes": change(made.extras["alibi_slopes"])}
        options["documents"] = bounds
        out = attention(**given, **options, backend=backend)
        return [out, *torch.autograd.grad(out, list(given.values()), made.d_out)]

    plain = call(torch.clone, bounds.expand(B, -1, -1).contiguous())
    for mine, other in zip(call(grown, bounds.expand(B, -1, -1)), plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_windows_wider_than_any_sequence_are_none(platform: Platform) -> None:
    """2^31 - 1 and sys.maxsize are how others say it; added to a place they pass the integers."""
    q, k, v = (
        torch.randn(1, 20, 1, 16, device=platform.device).to(platform.dtype) for _ in range(3)
    )
    lengths = torch.tensor([4], dtype=torch.int32, device=platform.device)
    for far in (2**31 - 1, sys.maxsize):
        wide, none = (
            attention(q, k, v, causal=False, window=(5, right), backend="triton")
            for right in (far, -1)
        )
        assert torch.equal(wide, none)
        wide, none = (
            attention_decode(q[:, :9], k, v, lengths, window=(left, 0), backend="triton")
            for left in (far, -1)
        )
        torch.testing.assert_close(wide, none)
