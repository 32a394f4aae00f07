"""What the dispatch calls: may the Hopper kernels run a problem, and the two passes.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from kernels.attention.hopper.launch import (
    ALIGNMENT,
    Launch,
    Tensors,
    copyable,
    misaligned,
    plain,
)
from kernels.attention.hopper.plan import (
    LOG2_E,
    Options,
    backward_buffers,
    backward_tile,
    forward_buffers,
    forward_tile,
    plan_backward,
    plan_forward,
)
from kernels.attention.hopper.tiles import LARGEST_HEAD, BackwardTile, ForwardTile
from kernels.attention.problem import UNBOUNDED, Problem

LONGEST = 2**30  # rows of a padded buffer are counted in int32


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot compute a problem on an sm_90 GPU; None when they can."""
    p = problem
    if p.head_size % 8 or not 8 <= p.head_size <= LARGEST_HEAD["forward"]:
        return f"it takes head sizes that are multiples of 8 up to 256, got {p.head_size}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {p.dtype}"
    if p.alibi and p.after != 0:
        return "it has ALiBi under a causal mask only"
    if min(p.batch, p.queries, p.keys, p.heads) == 0:
        return "a dimension is 0"
    if p.has_blind_queries:
        return f"{p.queries} queries over {p.keys} keys leave some queries without any key"
    if p.batch * p.heads * (max(p.queries, p.keys) + 128) > LONGEST:
        return f"batch x heads x length is above {LONGEST}"
    for name, strides, heads, length in (
        ("q", p.strides[0], p.heads, p.queries),
        ("k", p.strides[1], p.kv_heads, p.keys),
        ("v", p.strides[2], p.kv_heads, p.keys),
    ):
        if misaligned(strides, (p.batch, length, heads, p.head_size), p.dtype.itemsize):
            return (
                f"strides {tuple(strides)} of {name} do not suit the copy engine:"
                " the last must be 1, the others multiples of 8 above 0"
            )
    return None


def supports_backward(problem: Problem) -> str | None:
    """Why only the backward cannot; None when it can."""
    if problem.deterministic:
        return "dQ is added up in no fixed order"
    if problem.head_size > LARGEST_HEAD["backward"]:
        return f"it takes head sizes up to {LARGEST_HEAD['backward']}, got {problem.head_size}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    alibi_slopes: Tensor | None = None,
    before: int = UNBOUNDED,
    after: int = UNBOUNDED,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bounds: Tensor | None = None,
    tile: ForwardTile | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T] fp32, natural log; `supports` must have agreed.

    Args:
        q: [B, T, H, D]; k, v: [B, S, H_kv, D].
        alibi_slopes: [H] fp32; sinks: [H].
        before, after: keys a query sees around its place; `after` is 0 when causal.
        softcap: 0 for none.
        bounds: [B, 2, T] int32, where each token's document starts and ends (exclusive).
        tile: overrides the choice of tiles.py; for sweeps.
    """
    options = Options(
        causal, scale, alibi_slopes is not None, before, after, softcap,
        None if sinks is None else sinks.dtype, bounds is not None,
    )  # fmt: skip
    more = _contiguous(slopes=alibi_slopes, sinks=sinks, bounds=bounds)
    if torch.cuda.current_device() == q.get_device():
        return _forward(q, k, v, options, more, tile)
    with torch.cuda.device(q.device):  # Triton launches on the current device
        return _forward(q, k, v, options, more, tile)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, more: Tensors, tile: ForwardTile | None
) -> tuple[Tensor, Tensor]:
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
        q, k, v = copyable(q), copyable(k), copyable(v)
    launch = _forward_plans.get((*_layout(q, k, v), options, tile))
    if launch is None:
        q, k, v = copyable(q), copyable(k), copyable(v)
        key = (*_layout(q, k, v), options, tile)
        launch = _forward_plans.get(key)
        if launch is None:
            tile = tile or forward_tile(q, k, options)
            launch = plan_forward(q, k, options, tile, _n_sm(q.device))
            _remember(_forward_plans, key, launch)
    made = forward_buffers(q)
    counter = None if launch.arguments["CHAINED"] else _counter(q.get_device())
    launch.run({"q": q, "k": k, "v": v, "counter": counter, **more, **made})
    return made["out"], made["lse"]


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    alibi_slopes: Tensor | None = None,
    before: int = UNBOUNDED,
    after: int = UNBOUNDED,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bounds: Tensor | None = None,
    deterministic: bool = False,
    packed: bool = False,
    tile: BackwardTile | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, shaped like q, k, v and contiguous, and with sinks d_sinks [H].

    The order of additions to dq varies from run to run.

    Args:
        d_out: [B, T, H, D]; d_lse: [B, H, T] or None.
        out, lse: what `forward` returned for the same options.
        packed: return one tensor, [B, T, H + 2 H_kv, D], of dq, dk and dv; T = S, no sinks.
        tile: overrides the choice of tiles.py; for sweeps.

    Raises:
        ValueError: deterministic was asked for.
    """
    if deterministic:
        raise ValueError("the hopper backward adds dQ up in no fixed order; backend='triton' does")
    options = Options(
        causal, scale, alibi_slopes is not None, before, after, softcap,
        documents=bounds is not None,
    )  # fmt: skip
    more = _contiguous(out=out, lse=lse, d_lse=d_lse, slopes=alibi_slopes, bounds=bounds)
    if torch.cuda.current_device() == q.get_device():
        return _backward(d_out, q, k, v, options, more, sinks, packed, tile)
    with torch.cuda.device(q.device):
        return _backward(d_out, q, k, v, options, more, sinks, packed, tile)


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options, more: Tensors,
    sinks: Tensor | None, packed: bool, tile: BackwardTile | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if (q.data_ptr() | k.data_ptr() | v.data_ptr() | d_out.data_ptr()) % ALIGNMENT:
        q, k, v, d_out = copyable(q), copyable(k), copyable(v), copyable(d_out)
    rest = (options, more["d_lse"] is None, packed, tile)
    plan = _backward_plans.get((*_layout(q, k, v), d_out.stride(), *rest))
    if plan is None:
        q, k, v, d_out = copyable(q), copyable(k), copyable(v), copyable(d_out)
        key = (*_layout(q, k, v), d_out.stride(), *rest)
        plan = _backward_plans.get(key)
        if plan is None:
            tile = tile or backward_tile(q, k, options)
            n_sm = _n_sm(q.device)
            plan = plan_backward(q, k, d_out, options, tile, n_sm, packed), tile
            _remember(_backward_plans, key, plan)
    launches, tile = plan
    made = backward_buffers(q, k, tile, packed)
    counter = _counter(q.get_device())
    tensors = {"q": q, "k": k, "v": v, "d_out": d_out, "counter": counter, **more, **made}
    for launch in launches:
        launch.run(tensors)
    if packed:
        return (made["dqkv"],)
    grads = made["dq"], made["dk"], made["dv"]
    return grads if sinks is None else (*grads, sink_gradient(sinks, made["stats"], q.shape[0]))


def sink_gradient(sinks: Tensor, stats: Tensor, batch: int) -> Tensor:
    """d_sinks [H]: a sink's value is zero, so dP is too; left is its probability times -delta.

    Args:
        stats: of the backward, [2, B, H, T padded] flat: lse in log2 units, +inf past the end of T,
            and -delta.
    """
    lse, minus_delta = stats.view(2, batch, sinks.shape[0], -1)
    p = torch.exp2(sinks.float()[:, None] * LOG2_E - lse)
    return (p * minus_delta).sum((0, 2)).to(sinks.dtype)


def _contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if x is None else plain(x) for name, x in tensors.items()}


def _layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[object, ...]:
    """What a plan depends on beside the options."""
    return (q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.get_device())


_forward_plans: dict[object, Launch] = {}
_backward_plans: dict[object, tuple[tuple[Launch, Launch, Launch], BackwardTile]] = {}
MOST_PLANS = 1024  # a few KB each; sequences of many lengths must not fill the memory


def _remember(plans: dict[Any, Any], key: object, plan: object) -> None:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan


@cache
def _n_sm(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(device: int) -> Tensor:
    """A zero that launches on the current stream may draw from: each leaves it zero again.

    A captured graph may be replayed beside other work, so it gets its own, zeroed at each replay.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device="cuda")
    key = (device, driver.active.get_current_stream(device))
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(1, dtype=torch.int32, device="cuda")
    return counter
