"""The feed-forward half of a block. Dims: D = d_model, F = d_ff (this rank's part of it)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import Mlp, ModelConfig
from flashtrain.model import float8_mlp
from flashtrain.model.checkpointing import make_again
from flashtrain.model.linear import Linear, behind_norm, is_float8, is_plain, onto_stream
from flashtrain.model.norm import StreamNorm
from kernels.linear import norm_gelu_mlp, norm_swiglu_mlp, swiglu


class MLP(nn.Module, ABC):
    """s + mlp(norm(s)) [B, T, D] with s = x + branch, each token on its own: all at once, or in
    `chunks` parts.

    In parts, one after the other, what is inside is made again in backward, part by part too, so
    that [tokens, F] never exists whole. The output is the same; a weight's gradient is a sum over
    the parts.
    """

    chunks = 1

    def forward(self, norm: StreamNorm, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """branch None: s is x."""
        if self.chunks == 1:
            return self.run(norm, x, branch)
        both = [x] if branch is None else [x, branch]
        parts = [
            make_again(self._part, norm, *(t.unsqueeze(0) for t in part))
            for part in zip(*(t.flatten(0, 1).chunk(self.chunks) for t in both), strict=True)
        ]  # fmt: skip
        return torch.cat(parts, 1).view_as(x)

    def _part(self, norm: StreamNorm, x: Tensor, branch: Tensor | None = None) -> Tensor:
        return self.run(norm, x, branch)

    @abstractmethod
    def run(self, norm: StreamNorm, x: Tensor, branch: Tensor | None) -> Tensor: ...


class GeluMLP(MLP):
    """GPT-2's: D -> F, GELU in its tanh form, F -> D."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, norm: StreamNorm, x: Tensor, branch: Tensor | None) -> Tensor:
        up, down = self.up, self.down
        if branch is None and is_plain(up) and is_plain(down):
            return norm_gelu_mlp(
                x, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias,
                eps=norm.eps, centers=norm.centers, remakes=up.remakes,
            )  # fmt: skip
        if float8_mlp.takes(up, down):
            return in_float8(up, down, norm, x, branch, gated=False)
        middle, x = behind_norm(up, norm, x, branch)
        return joined(*onto_stream(down, F.gelu(middle, approximate="tanh"), x))


class SquaredReluMLP(MLP):
    """So et al. 2021, arXiv:2109.08668: relu(x)^2 between the two products."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, norm: StreamNorm, x: Tensor, branch: Tensor | None) -> Tensor:
        middle, x = behind_norm(self.up, norm, x, branch)
        return joined(*onto_stream(self.down, F.relu(middle).square(), x))


class SwigluMLP(MLP):
    """Shazeer 2020, arXiv:2002.05202: silu(x W_gate) * (x W_up), one product for both."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.gate_up = Linear(model.d_model, 2 * model.d_ff, model.bias)  # rows [gate | up]
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, norm: StreamNorm, x: Tensor, branch: Tensor | None) -> Tensor:
        up, down = self.gate_up, self.down
        if branch is None and is_plain(up) and is_plain(down):
            return norm_swiglu_mlp(
                x, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias,
                eps=norm.eps, centers=norm.centers, remakes=up.remakes,
            )  # fmt: skip
        if float8_mlp.takes(up, down):
            return in_float8(up, down, norm, x, branch, gated=True)
        middle, x = behind_norm(up, norm, x, branch)
        return joined(*onto_stream(down, swiglu(middle), x))


def in_float8(
    up: Linear, down: Linear, norm: StreamNorm, x: Tensor, branch: Tensor | None, *, gated: bool
) -> Tensor:
    """x + branch and what the MLP makes of its norm, as one over what are two layers in fp8."""
    if branch is None and is_float8(up) and is_float8(down):
        return float8_mlp.norm_float8_mlp(norm, x, up, down, gated=gated)
    normed, x = norm.add(x, branch)
    return x + float8_mlp.float8_mlp(normed, up, down, gated=gated)


def joined(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else x + branch


MLPS: dict[Mlp, type[GeluMLP | SquaredReluMLP | SwigluMLP]] = {
    Mlp.gelu: GeluMLP,
    Mlp.relu2: SquaredReluMLP,
    Mlp.swiglu: SwigluMLP,
}


def build_mlp(model: ModelConfig) -> MLP:
    return MLPS[model.mlp](model)
