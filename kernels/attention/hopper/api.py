"""What the dispatch calls: may the Hopper kernels run a problem, and the two passes.

Dims: B batch, T queries, S keys, H heads, H_kv key/value heads, D head size.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.attention.hopper.launch import Launch, copyable, misaligned, plain
from kernels.attention.hopper.plan import (
    Options,
    backward_buffers,
    forward_buffers,
    plan_backward,
    plan_forward,
)
from kernels.attention.hopper.tiles import BACKWARD, BackwardTile, ForwardTile, choose_forward
from kernels.attention.problem import UNBOUNDED, Problem

HEAD_SIZES = (64, 128)
LONGEST = 2**30  # rows of a padded buffer are counted in int32


def supports(problem: Problem) -> str | None:
    """Why these kernels cannot compute a problem on an sm_90 GPU; None when they can."""
    p = problem
    if p.head_size not in HEAD_SIZES:
        return f"it takes head sizes 64 and 128, got {p.head_size}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {p.dtype}"
    if p.before != UNBOUNDED or p.after > 0 or (p.after == 0 and not p.causal):
        return "it has no window"
    for name, used in (("softcap", p.softcap > 0), ("sinks", p.sinks), ("documents", p.documents)):
        if used:
            return f"it has no {name}"
    if p.alibi and not p.causal:
        return "it has ALiBi under a causal mask only"
    if min(p.batch, p.queries, p.keys, p.heads) == 0:
        return "a dimension is 0"
    if p.causal and p.queries > p.keys:
        return f"{p.queries} queries over {p.keys} keys leave causal queries without any key"
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
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    alibi_slopes: Tensor | None = None,
    tile: ForwardTile | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T] fp32, natural log; `supports` must have agreed.

    Args:
        q: [B, T, H, D]; k, v: [B, S, H_kv, D].
        tile: overrides the choice of tiles.py; for sweeps.
    """
    q, k, v = copyable(q), copyable(k), copyable(v)
    tile = tile or choose_forward(q.shape[3], causal, q.shape[1])
    options = Options(causal, scale, alibi_slopes is not None)
    made = forward_buffers(q)
    key = _key(q, k, v, options, tile)
    with _current(q.device):
        launch = _forward_plans.get(key)
        if launch is None:
            launch = plan_forward(q, k, options, tile, _n_sm(q.device))
            _remember(_forward_plans, key, launch)
        launch.run({"q": q, "k": k, "v": v, "slopes": alibi_slopes, "counter": _counter(), **made})
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
    deterministic: bool = False,
    tile: BackwardTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped like q, k, v and contiguous; the order of additions to dq varies.

    Args:
        d_out: [B, T, H, D]; d_lse: [B, H, T] or None.
        out, lse: what `forward` returned.
        tile: overrides the choice of tiles.py; for sweeps.

    Raises:
        ValueError: deterministic was asked for.
    """
    if deterministic:
        raise ValueError("the hopper backward adds dQ up in no fixed order; backend='triton' does")
    q, k, v, d_out = copyable(q), copyable(k), copyable(v), copyable(d_out)
    tile = tile or BACKWARD[q.shape[3], causal]
    options = Options(causal, scale, alibi_slopes is not None)
    given = {"q": q, "k": k, "v": v, "d_out": d_out, "slopes": alibi_slopes}
    given |= {"out": plain(out), "lse": plain(lse)}
    given["d_lse"] = None if d_lse is None else plain(d_lse)
    made = backward_buffers(q, k, tile)
    key = (*_key(q, k, v, options, tile), d_out.stride(), d_lse is None)
    with _current(q.device):
        launches = _backward_plans.get(key)
        if launches is None:
            launches = plan_backward(q, k, d_out, options, tile, _n_sm(q.device))
            _remember(_backward_plans, key, launches)
        tensors = {**given, **made, "counter": _counter()}
        for launch in launches:
            launch.run(tensors)
    return made["dq"], made["dk"], made["dv"]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; to set it again costs 4 microseconds."""
    same = torch.cuda.current_device() == device.index
    return nullcontext() if same else torch.cuda.device(device)


def _key(q: Tensor, k: Tensor, v: Tensor, *more: object) -> tuple[object, ...]:
    """What a plan depends on."""
    return (q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, *more)


_forward_plans: dict[object, Launch] = {}
_backward_plans: dict[object, tuple[Launch, Launch, Launch]] = {}
MOST_PLANS = 1024  # a few KB each; sequences of many lengths must not fill the memory


def _remember(plans: dict[object, Any], key: object, plan: object) -> None:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan


@cache
def _n_sm(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], Tensor] = {}


def _counter() -> Tensor:
    """A zero that launches on the current stream may draw from: each leaves it zero again.

    A captured graph may be replayed beside other work, so it gets its own, zeroed at each replay.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream()
    key = (stream.device_index, stream.cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device="cuda")
    return _counters[key]
