"""Random shapes and random sets of features, against the reference by the accuracy rule.

On the CPU a few small ones, in Triton's interpreter; with -m gpu more, at several tiles a side.
"""

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.kernels.attention.cases import Case, inputs_of
from tests.kernels.attention.test_accuracy import check
from tests.kernels.interpreter import Platform


@st.composite
def cases(draw: DrawFn, longest: int, sizes: SearchStrategy[int]) -> Case:
    """A call with about half of the features that it can have."""
    flags = {name: draw(st.booleans()) for name in ("alibi", "sinks", "documents", "key_mask")}
    T = draw(st.integers(1, longest))
    S = T if flags["documents"] else draw(st.integers(1, longest))
    kv_heads = draw(st.integers(1, 2))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        side = st.integers(-1, longest // 2)
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.5, 20.0]))
    if draw(st.booleans()):
        options["dropout"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        options["dropout_seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    return Case(
        T=T,
        S=S,
        D=draw(sizes),
        Dv=draw(sizes),
        B=draw(st.integers(1, 2)),
        H=kv_heads * draw(st.integers(1, 3)),
        H_kv=kv_heads,
        options=options,
        bias=draw(st.sampled_from([None, None, "", "h", "ht", "b", "bht"])),
        **flags,
    )


def examples(n: int) -> settings:
    """The same examples in every run; no shrinking, which in the interpreter takes minutes."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


def test_any_mix_of_features_is_as_accurate_as_eager(platform: Platform) -> None:
    longest, n = (700, 60) if platform.on_gpu else (40, 15)
    # few head sizes on a GPU: each is a compilation
    sizes = st.sampled_from([16, 40, 64, 128]) if platform.on_gpu else st.integers(1, 40)

    @examples(n)
    @given(cases(longest, sizes), st.integers(0, 2**31))
    def every_case_passes(case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        check(inputs_of(case, platform.device, platform.dtype))

    every_case_passes()
