"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix by its momentum
made orthogonal: with M = U S V^T, by about U V^T. Newton-Schulz gets there with products alone.

    m <- beta m + (1 - beta) g        u = (1 - beta) g + beta m         (Nesterov)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(u)

The factor is that of Liu et al. 2025, arXiv:2502.16982, equation 4: it gives every matrix an update
whose root mean square is about AdamW's, so one learning rate and one decay, AdamW's, serve both
kinds of parameters. (sqrt(max(1, rows / columns)), the other in use, needs a rate of its own.)

A matrix is orthogonal as a whole or not at all: q, k and v, gate and up, which share a parameter,
are taken apart, and what tensor parallelism split is put together. Every matrix is worked on by one
rank of all that hold a part or a copy of it. Its parts go there by one all-to-all over the tensor
ranks and back by another; an all-gather then hands the update to the data ranks.

Memory: 4 bytes a parameter (AdamW: 8). FLOPs of [r, c] with r <= c: 5 (4 r^2 c + 2 r^3) a step,
whatever the batch. Of the 6 r c T of training on T tokens a step that is 5 r / T for a square
matrix: 2 % at r = 2048 and half a million tokens, 60 % at 16 thousand, over all ranks together.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from flashtrain.checkpoint import adam_state
from flashtrain.config import ModelConfig, OptimizerConfig
from flashtrain.model.parametrization import muon_rate_ratio
from flashtrain.model.shard import Piece, shard_of
from flashtrain.optim.adamw import build_adamw
from flashtrain.parallel.collectives import all_gather
from flashtrain.parallel.mesh import Axis, Mesh

QUINTIC = (3.4445, -4.7750, 2.0315)  # X <- a X + (b A + c A A) X with A = X X^T; Jordan et al.
STEPS = 5
RMS = 0.2  # of an update of AdamW, arXiv:2502.16982 section 2.2
LIMIT = 2**27  # values of whole matrices that one rank holds at a time: 256 MiB in bf16


@dataclass(frozen=True)
class Kind:
    """One layer's matrix in all blocks, whose shapes are equal."""

    parameters: list[nn.Parameter]
    shape: tuple[int, ...]  # of the whole
    rows: list[int]  # of the matrices that lie below each other in it
    pieces: list[list[Piece]]  # what each tensor rank holds of it


class Muon(Optimizer):
    """Muon and AdamW as one optimizer: their groups and states lie side by side.

    `step` uses the gradients of matrices as scratch. Collective over `tensor` and `replicate`.

    0-dim fp32 on the device, as in torch's fused AdamW: `found_inf`, where the step does nothing
    unless it is 0; `grad_scale`, by which gradients are divided; and on GPUs a group's "lr". The
    step then asks the host for nothing.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        model: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        """parameters: by name, whole or tensor-parallel shards, not spans of them (FSDP).

        dtype: of Newton-Schulz and of what is sent for it.
        """
        matrices = {name: p for name, p in parameters.items() if takes_muon(name, p)}
        rest = {name: p for name, p in parameters.items() if name not in matrices}
        ratio = muon_rate_ratio(model)
        own = {
            "params": list(matrices.values()),
            "lr_ratio": ratio,
            "weight_decay": config.weight_decay / ratio,
        }
        super().__init__([own], {"lr": config.lr, "momentum": config.momentum})
        self.adamw = build_adamw(rest, config, model)
        self.on_device = bool(self.adamw.defaults["fused"])
        if self.on_device:
            device = next(iter(matrices.values())).device
            self.param_groups[0]["lr"] = torch.full((), config.lr * ratio, device=device)
        self.param_groups.extend(self.adamw.param_groups)  # the same dicts: one rate for all
        self.adamw.state = self.state
        self.tensor, self.replicate, self.dtype = mesh.tensor, mesh.replicate, dtype
        self.kinds = kinds_of(matrices, model, mesh.tensor)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        parameters = group["params"]
        gradients = [p.grad for p in parameters]
        if any(gradient is None for gradient in gradients):
            raise ValueError("a matrix has no gradient: run backward before the step")
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        self.adamw.found_inf, self.adamw.grad_scale = skip, scale  # type: ignore[attr-defined]
        self.adamw.step()
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.fresh_state(parameter, group)
        momenta = [self.state[p]["momentum"] for p in parameters]
        rate = group["lr"]
        if scale is not None:
            torch._foreach_mul_(gradients, scale.reciprocal())
        if skip is not None:  # a gradient like the momentum moves it by nothing
            for gradient, momentum in zip(gradients, momenta, strict=True):
                torch.where(skip == 0, gradient, momentum, out=gradient)
            rate = rate * (1 - skip)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, momenta, group["momentum"])
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        for kind in self.kinds:
            for parameter, update in self._updates(kind):
                if isinstance(rate, Tensor):
                    parameter.addcmul_(update.to(rate.dtype), rate, value=-1)
                else:
                    parameter.add_(update, alpha=-rate)

    def fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept of a parameter of one of the groups, before its first step."""
        if group is self.param_groups[0]:
            return {"momentum": torch.zeros_like(parameter, requires_grad=False)}
        return adam_state(parameter, group)

    def _updates(self, kind: Kind) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with what its gradient has become: this rank's part, to be subtracted.

        Dims: d data ranks, n tensor ranks, k matrices that one rank makes orthogonal at a time.
        """
        n, d, layers = self.tensor.size, self.replicate.size, len(kind.parameters)
        k = max(1, min(LIMIT // math.prod(kind.shape), -(-layers // (n * d))))
        local = kind.parameters[0].shape
        for first in range(0, layers, d * n * k):
            some = kind.parameters[first : first + d * n * k]
            begin = self.replicate.rank * n * k
            parts = torch.zeros(n * k, *local, dtype=self.dtype, device=some[0].device)
            for slot, parameter in zip(parts, some[begin : begin + n * k], strict=False):
                assert parameter.grad is not None
                slot.copy_(parameter.grad)
            whole = join(_exchange(parts.unflatten(0, (n, k)), self.tensor), kind)
            for matrix in whole.split(kind.rows, dim=1):
                scale = RMS * math.sqrt(max(matrix.shape[1:]))
                matrix.copy_(orthogonal(matrix).mul_(scale))
            parts = _exchange(cut(whole, kind), self.tensor).flatten(0, 1)  # [n k, ..]
            if self.replicate.group is not None:
                parts = all_gather(parts, d, self.replicate.name).flatten(0, 1)
            yield from zip(some, parts, strict=False)


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Matrices between hidden states: not the embedding, the head, a position table, a vector."""
    return name.startswith("blocks.") and parameter.dim() == 2


def kinds_of(matrices: Mapping[str, nn.Parameter], model: ModelConfig, tensor: Axis) -> list[Kind]:
    """The matrices by layer, with what every tensor rank holds of them. Collective over `tensor`.

    model: resolved.
    """
    assert model.head_size is not None and model.n_kv_heads is not None
    assert model.d_ff is not None
    kv = model.n_kv_heads * model.head_size
    fused = {
        "attention.qkv.weight": [model.n_heads * model.head_size, kv, kv],
        "mlp.gate_up.weight": [model.d_ff, model.d_ff],
    }
    by_layer: dict[str, list[nn.Parameter]] = {}
    for name, parameter in matrices.items():
        by_layer.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(parameter)
    kinds = []
    for layer, parameters in by_layer.items():
        shape = shard_of(parameters[0]).shape
        pieces = _everybodys_pieces(parameters[0], tensor)
        kinds.append(Kind(parameters, shape, fused.get(layer, [shape[0]]), pieces))
    return kinds


def _everybodys_pieces(parameter: Tensor, tensor: Axis) -> list[list[Piece]]:
    own = shard_of(parameter).pieces
    if tensor.group is None:
        return [list(own)]
    rows = [[p.dim, p.local, p.start, p.length, int(p.owned)] for p in own]
    table = torch.tensor(rows, device=parameter.device)
    return [
        [Piece(dim, local, start, length, bool(owned)) for dim, local, start, length, owned in rank]
        for rank in all_gather(table, tensor.size, tensor.name).tolist()
    ]


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each of [k, rows, columns] = U S V^T: singular values between 0.7 and 1.2.

    A singular value far below 1/500 of the Frobenius norm gets less far; 0 stays 0.
    """
    a, b, c = QUINTIC
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=wide)
    x: Tensor = matrices / (norms + 1e-7).to(matrices.dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # A is then the smaller of both
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def join(parts: Tensor, kind: Kind) -> Tensor:
    """[n, k, ..], tensor rank r's part of k matrices -> the whole ones [k, rows, columns]."""
    if len(kind.pieces) == 1:
        return parts[0]
    whole = parts.new_empty(parts.size(1), *kind.shape)
    for part, pieces in zip(parts, kind.pieces, strict=True):
        for piece in pieces:
            if piece.owned:
                target = whole.narrow(1 + piece.dim, piece.start, piece.length)
                target.copy_(part.narrow(1 + piece.dim, piece.local, piece.length))
    return whole


def cut(whole: Tensor, kind: Kind) -> Tensor:
    """The inverse of `join`; rows that several ranks hold go to all of them."""
    if len(kind.pieces) == 1:
        return whole.unsqueeze(0)
    parts = [
        torch.cat(
            [whole.narrow(1 + piece.dim, piece.start, piece.length) for piece in pieces],
            dim=1 + pieces[0].dim,
        )
        for pieces in kind.pieces
    ]
    return torch.stack(parts)


def _exchange(parts: Tensor, axis: Axis) -> Tensor:
    """[n, ..] -> [n, ..]: slot s of rank r becomes slot r of rank s."""
    if axis.group is None:
        return parts
    arrived = torch.empty_like(parts)
    dist.all_to_all_single(arrived, parts, group=axis.group)
    return arrived
