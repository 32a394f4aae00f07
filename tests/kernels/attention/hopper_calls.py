"""A forward and a backward pass of the Hopper kernels as launches, on tensors of any device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.hopper import plan
from kernels.attention.hopper.launch import Launch
from kernels.attention.hopper.tiles import BACKWARD, FORWARD, BackwardTile, ForwardTile
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
) -> Passes:
    """Both passes of a case, by the shipped tiles unless others are given."""
    q, k, v = (inputs.tensors[name] for name in "qkv")
    D, causal = q.shape[3], inputs.extras["causal"]
    slopes = inputs.extras.get("alibi_slopes")
    options = plan.Options(causal, D**-0.5, slopes is not None)
    forward = forward or FORWARD[D, causal]
    backward = backward or BACKWARD[D, causal]
    return Passes(
        [
            plan.plan_forward(q, k, options, forward, n_sm),
            *plan.plan_backward(q, k, inputs.d_out, options, backward, n_sm),
        ],
        {
            "q": q,
            "k": k,
            "v": v,
            "slopes": slopes,
            "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
            "d_out": inputs.d_out,
            "d_lse": inputs.d_lse,
            **plan.forward_buffers(q),
            **plan.backward_buffers(q, k, backward),
        },
    )
