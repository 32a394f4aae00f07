"""A forward and a backward pass of the Hopper kernels as launches, on tensors of any device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.hopper import plan
from kernels.attention.hopper.launch import Launch
from kernels.attention.hopper.tiles import LARGEST_HEAD, BackwardTile, ForwardTile
from kernels.attention.op import document_bounds
from kernels.attention.problem import UNBOUNDED
from tests.kernels.attention.cases import Inputs


@dataclass
class Passes:
    """The launches in order, and every tensor they read or write."""

    launches: list[Launch]
    tensors: dict[str, Tensor | None]


def passes_of(
    inputs: Inputs,
    forward: ForwardTile | None = None,
    backward: BackwardTile | None = None,
    n_sm: int = 3,
    packed: bool = False,
) -> Passes:
    """Both passes of a case, by the shipped tiles unless others are given.

    packed: q, k and v lie side by side, and so do their gradients.
    """
    q, k, v = (inputs.tensors[name] for name in "qkv")
    if packed:
        heads = [x.shape[2] for x in (q, k, v)]
        q, k, v = torch.cat((q, k, v), dim=2).detach().split(heads, dim=2)
    D, extras = q.shape[3], inputs.extras
    slopes, documents = extras.get("alibi_slopes"), extras.get("documents")
    sinks = inputs.tensors.get("sinks")
    bounds = None if documents is None else document_bounds(documents)
    before, after = extras.get("window", (UNBOUNDED, UNBOUNDED))
    options = plan.Options(
        extras["causal"], D**-0.5, slopes is not None, before, after,
        extras.get("softcap", 0.0), sinks if sinks is None else sinks.dtype, bounds is not None,
    )  # fmt: skip
    forward = forward or plan.forward_tile(q, k, options)
    launches = [plan.plan_forward(q, k, options, forward, n_sm)]
    made = plan.forward_buffers(q)
    if LARGEST_HEAD["backward"] >= D:
        backward = backward or plan.backward_tile(q, k, options)
        launches += plan.plan_backward(q, k, inputs.d_out, options, backward, n_sm, packed)
        made |= plan.backward_buffers(q, k, backward, packed)
    return Passes(
        launches,
        {
            "q": q,
            "k": k,
            "v": v,
            "slopes": slopes,
            "sinks": sinks,
            "bounds": bounds,
            "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
            "d_out": inputs.d_out,
            "d_lse": inputs.d_lse,
            **made,
        },
    )
