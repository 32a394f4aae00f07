"""Decoding over a cache: accuracy, layouts, pages, lengths on the device, refusals."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_decode
from kernels.attention.decode import attention_decode_op
from kernels.attention.decode_reference import decode_reference
from tests.accuracy import assert_as_accurate
from tests.kernels.interpreter import Platform

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One call: sizes, options, and which tensors come with it."""

    lengths: tuple[int, ...] = (0, 1, 37, 96)  # the last fills the cache
    T: int = 1
    H: int = 2
    H_kv: int = 2
    D: int = 16
    DV: int = 16
    page: int = 0  # keys of a page; 0: contiguous
    options: dict[str, Any] = field(default_factory=dict)  # window, softcap, scale
    alibi: bool = False
    sinks: bool = False

    def on(self, platform: Platform) -> "Case":
        """The same case at a size for the device: on a GPU thirty times as long, odd ends kept."""
        if not platform.on_gpu:
            return self
        lengths = tuple(n if n < 2 else 32 * n + n % 2 * 5 for n in self.lengths)
        options = dict(self.options)
        if "window" in options:
            options["window"] = (32 * options["window"][0], 0)
        return replace(self, lengths=lengths, D=4 * self.D, DV=4 * self.DV, options=options)


# lengths leave ragged last tiles of the interpreter's 16 keys
CASES = {
    "one token": Case(),
    "grouped": Case(H=8, H_kv=2),
    "one kv head": Case(H=5, H_kv=1),
    "several tokens": Case(T=5, H=4, H_kv=2, lengths=(0, 3, 5, 50, 96)),
    "more rows than a tile": Case(T=33, H=3, H_kv=1, lengths=(20, 40, 96)),
    "narrow values": Case(H=4, D=32, DV=16, lengths=(40, 96)),
    "odd head sizes": Case(H=4, H_kv=2, D=20, DV=24, lengths=(40, 96)),
    "scale": Case(options={"scale": 0.7}),
    "window": Case(T=3, options={"window": (20, 0)}),
    "alibi": Case(T=2, H=4, H_kv=2, alibi=True),
    "softcap": Case(H=4, H_kv=2, options={"softcap": 1.5}),
    "sinks": Case(H=4, H_kv=2, sinks=True),
    "pages": Case(H=4, H_kv=2, page=16),
    "pages of two tiles": Case(H=4, H_kv=2, page=32, DV=8),
    "everything": Case(
        T=4,
        H=6,
        H_kv=2,
        D=20,
        page=16,
        options={"window": (40, -1), "softcap": 2.0},
        alibi=True,
        sinks=True,
    ),
}
FEW = ("grouped", "several tokens", "everything")


def made(case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a call; past each length the cache holds NaN, the page table nonsense."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    B, room = len(case.lengths), max(case.lengths)
    k, v = normal(B, room, case.H_kv, case.D), normal(B, room, case.H_kv, case.DV)
    for b, n in enumerate(case.lengths):
        k[b, n:], v[b, n:] = NAN, NAN
    arguments: dict[str, Any] = {
        "q": normal(B, case.T, case.H, case.D),
        "k_cache": k,
        "v_cache": v,
        "lengths": torch.tensor(case.lengths, dtype=torch.int32, device=device),
        **case.options,
    }
    if case.alibi:
        arguments["alibi_slopes"] = 0.5 ** torch.arange(1.0, case.H + 1, device=device)
    if case.sinks:
        arguments["sinks"] = torch.randn(case.H, device=device)
    return paged(arguments, case.page) if case.page else arguments


def paged(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    """The same call with its cache cut into pages, scattered among pages of NaN."""
    k, v, lengths = (arguments[name] for name in ("k_cache", "v_cache", "lengths"))
    B, room = k.shape[:2]
    each = -(-room // size)
    numbers = torch.randperm(B * each + 3)[: B * each].view(B, each).to(k.device)
    caches = {}
    for name, x in (("k_cache", k), ("v_cache", v)):
        whole = torch.cat([x, x.new_full((B, each * size - room, *x.shape[2:]), NAN)], 1)
        pool = x.new_full((B * each + 3, size, *x.shape[2:]), NAN)
        pool[numbers] = whole.unflatten(1, (each, size))
        caches[name] = pool
    used = torch.arange(each, device=k.device) < -(-lengths[:, None] // size)
    table = torch.where(used, numbers, -(2**31) + 1).to(torch.int32)
    return {**arguments, **caches, "page_table": table}


def exact(arguments: dict[str, Any], compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference's answer, every step in `compute`."""
    options = dict(arguments)
    window = options.pop("window", None)
    before = -1 if window is None else window[0]
    return decode_reference(**options, before=before, compute=compute)


def check(arguments: dict[str, Any], out: Tensor, lse: Tensor) -> None:
    """The accuracy rule for out and lse."""
    dtype = arguments["q"].dtype
    eager, right = exact(arguments, dtype), exact(arguments, torch.float64)
    factor = 3.0 if "softcap" in arguments else 2.0
    value = arguments["v_cache"].nan_to_num().abs().max().item()
    terms = value if dtype == torch.float32 else 0.0
    assert_as_accurate(out, eager[0], right[0], factor=factor, name="out", terms=terms)
    assert_as_accurate(lse, eager[1], right[1], factor=factor, name="lse")


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_as_accurate_as_eager(name: str, platform: Platform) -> None:
    arguments = made(CASES[name].on(platform), platform.device, platform.dtype)
    check(arguments, *attention_decode(**arguments, return_lse=True, backend="triton"))


@pytest.mark.parametrize("name", FEW)
def test_other_dtypes_are_as_accurate_as_eager(name: str, other_platform: Platform) -> None:
    platform = other_platform
    arguments = made(CASES[name].on(platform), platform.device, platform.dtype)
    check(arguments, *attention_decode(**arguments, return_lse=True, backend="triton"))


@pytest.mark.parametrize("head_size", [1, 33, 96, 256])
def test_every_head_size_is_accurate(head_size: int, platform: Platform) -> None:
    lengths = (500, 1000) if platform.on_gpu else (20, 33)
    case = Case(lengths, H=2, H_kv=1, D=head_size, DV=257 - head_size)
    arguments = made(case, platform.device, platform.dtype)
    check(arguments, *attention_decode(**arguments, return_lse=True, backend="triton"))


@pytest.mark.parametrize("n_splits", [1, 2, 5, 40])
def test_any_number_of_splits_is_accurate(
    n_splits: int, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.attention.portable import decode as module
    from kernels.attention.portable.launch import Features

    case = Case(T=3, lengths=(0, 1, 50, 96), sinks=True, options={"window": (85, 0)}).on(platform)
    arguments = made(case, platform.device, platform.dtype)
    monkeypatch.setattr(module, "MERGED_AT_ONCE", 4 * case.DV)  # 5 splits take two rounds
    names = ("q", "k_cache", "v_cache", "lengths")
    before, sinks = arguments["window"][0], arguments["sinks"]
    features = Features(arguments["q"].shape[3] ** -0.5, before=before, after=0, sinks=sinks)
    given = [arguments[name] for name in names]
    check(arguments, *module.decode(*given, None, features, n_splits=n_splits))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_decoding_is_attention_over_the_prefix(backend: str, platform: Platform) -> None:
    case = Case(T=3, H=4, lengths=(3, 40, 96), alibi=True, options={"window": (60, 0)})
    arguments = made(case.on(platform), platform.device, torch.float32)
    out, lse = attention_decode(**arguments, return_lse=True, backend=backend)
    q, k, v = (arguments.pop(name) for name in ("q", "k_cache", "v_cache"))
    for b, length in enumerate(arguments.pop("lengths").tolist()):
        one = slice(b, b + 1)
        expected, expected_lse = attention(
            q[one], k[one, :length], v[one, :length], causal=True, return_lse=True,
            backend="reference", **arguments,
        )  # fmt: skip
        torch.testing.assert_close(out[one], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[one], expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", [16, 64])
def test_pages_change_nothing(page: int, platform: Platform) -> None:
    case = Case(T=2, H=4, lengths=(0, 17, 64, 192), alibi=True)
    arguments = made(case.on(platform), platform.device, platform.dtype)
    contiguous = attention_decode(**arguments, return_lse=True, backend="triton")
    scattered = attention_decode(**paged(arguments, page), return_lse=True, backend="triton")
    for x, y in zip(contiguous, scattered, strict=True):
        assert torch.equal(x, y)


def test_any_layout_gives_the_same_answer(platform: Platform) -> None:
    case = Case(T=2, H=4, lengths=(5, 50)).on(platform)
    arguments = made(case, platform.device, platform.dtype)
    expected = attention_decode(**arguments, backend="triton")

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def unaligned(x: Tensor) -> Tensor:
        wider = x.new_full((*x.shape[:3], x.shape[3] + 1), NAN)
        wider[..., 1:] = x
        return wider[..., 1:]

    for layout in (heads_first, unaligned):
        changed = {n: layout(arguments[n]) for n in ("q", "k_cache", "v_cache")}
        out = attention_decode(**{**arguments, **changed}, backend="triton")
        assert torch.equal(out, expected), layout.__name__


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_lengths_past_the_cache_count_as_full(backend: str, platform: Platform) -> None:
    arguments = made(Case(lengths=(96, 96)), platform.device, platform.dtype)
    expected = attention_decode(**arguments, backend=backend)
    arguments["lengths"] += torch.tensor([1, 10**6], dtype=torch.int32, device=platform.device)
    assert torch.equal(attention_decode(**arguments, backend=backend), expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("B", "T", "room"), [(0, 1, 8), (2, 0, 8), (2, 1, 0)])
def test_empty_inputs_give_empty_or_zero_results(
    B: int, T: int, room: int, backend: str, platform: Platform
) -> None:
    make = {"device": platform.device, "dtype": platform.dtype}
    q, cache = torch.randn(B, T, 4, 16, **make), torch.randn(B, room, 2, 16, **make)
    lengths = torch.zeros(B, dtype=torch.int32, device=platform.device)
    out, lse = attention_decode(q, cache, cache, lengths, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((B, 4, T), float("-inf"), device=platform.device))


def test_large_scores_do_not_overflow(platform: Platform) -> None:
    arguments = made(Case(T=2, lengths=(50, 96)), platform.device, platform.dtype)
    arguments["q"] *= 60  # scores of several hundred: exp would be infinite
    for x in attention_decode(**arguments, return_lse=True, backend="triton"):
        assert x.isfinite().all()


def test_library_checks_pass(platform: Platform) -> None:
    for case in (Case(T=2), CASES["everything"]):
        given = made(case, platform.device, platform.dtype)
        names = ("q", "k_cache", "v_cache", "lengths", "page_table", "alibi_slopes", "sinks")
        call = (*(given.get(name) for name in names), 0.25, 30, 1.5)
        for name in ("k_cache", "v_cache"):
            given[name].nan_to_num_()  # the checks compare inputs before and after, and NaN != NaN
        torch.library.opcheck(attention_decode_op, call)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiles_without_a_graph_break(backend: str, platform: Platform) -> None:
    arguments = made(CASES["everything"], platform.device, platform.dtype)

    def call(**given: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention_decode(**given, return_lse=True, backend=backend)
        return out * 1.0, lse

    # inductor takes half a minute to build its first C++ kernel; on GPUs it is what users get
    compiler = "inductor" if platform.on_gpu else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for x, y in zip(call(**arguments), compiled(**arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 64])
def test_a_cuda_graph_serves_other_lengths(page: int) -> None:
    case = Case(lengths=(4096,) * 4, H=8, H_kv=2, D=64, DV=64, page=page)
    arguments = made(case, "cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up: compile outside the capture
        attention_decode(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(**arguments)
    for lengths in ((4096, 1, 0, 777), (64, 65, 2048, 4095)):
        arguments["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(captured, attention_decode(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("head_size", [64, 128])
def test_long_caches_are_accurate(head_size: int, page: int) -> None:
    case = Case((1, 5000, 40000), H=8, H_kv=2, D=head_size, DV=head_size, page=page)
    arguments = made(case, "cuda", torch.bfloat16)
    first = attention_decode(**arguments, return_lse=True)
    check(arguments, *first)
    for _ in range(50):
        for x, y in zip(first, attention_decode(**arguments, return_lse=True), strict=True):
            assert torch.equal(x, y)


Q, K = torch.zeros(2, 1, 4, 8), torch.zeros(2, 7, 2, 8)
N = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q must be \[B, T, H, D\].*got \[1, 4, 8\]"),
        ({"v_cache": K[:, :6]}, r"agree in all but the head size, got \[2, 7.* and \[2, 6"),
        ({"q": Q[..., :4]}, "q has head size 4, k_cache has 8"),
        ({"q": Q[:, :, :3]}, "3 query heads are not a multiple of 2 kv heads"),
        ({"v_cache": torch.zeros(2, 7, 2, 257)}, "head size 257 is not between 1 and 256"),
        ({"q": Q.half()}, "share a floating dtype, got torch.float16, torch.float32"),
        ({"lengths": N.long()}, r"lengths must be \[2\] int32, got \[2\] torch.int64"),
        ({"lengths": N[:1]}, r"lengths must be \[2\] int32, got \[1\]"),
        ({"q": Q[:1], "lengths": N[:1]}, "q has batch 1, the cache has 2: pass page_table"),
        ({"page_table": N}, r"page_table must be \[2, pages_per_sequence\] int32, got \[2\]"),
        ({"page_table": N[:, None]}, "page size 7 is not a power of two from 16 on"),
        ({"lengths": N.to("meta")}, "lengths must be on cpu like q, got meta"),
        ({"scale": -1.0}, "scale=-1.0 must be above 0"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"window": (-2, 0)}, r"window=\(-2, 0\) must hold counts"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[4\] on cpu, got \[2\]"),
        ({"alibi_slopes": torch.zeros(4).half()}, "must be torch.float32, got torch.float16"),
        ({"backend": "hopper"}, "backend='hopper' of decoding is not one of auto, triton"),
        ({"q": Q.clone().requires_grad_()}, "decoding has no gradient"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        attention_decode(**{"q": Q, "k_cache": K, "v_cache": K, "lengths": N, **changed})
    assert "\n" not in str(refusal.value)


def test_what_only_the_kernels_cannot_do_is_refused_there(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = made(Case(), platform.device, platform.dtype)
    strided = torch.stack([arguments["k_cache"]] * 2, -1).flatten(3)[..., ::2]
    with pytest.raises(ValueError, match="last dimension of k_cache has stride 2, not 1"):
        attention_decode(**{**arguments, "k_cache": strided}, backend="triton")
    wide = {n: arguments[n].double() for n in ("q", "k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"bfloat16 and float32, got .*float64"):
        attention_decode(**{**arguments, **wide}, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = made(Case(), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"'triton' cannot run .* CUDA tensors, got cpu"):
        attention_decode(**on_cpu, backend="triton")
