"""The feed-forward half of a block. Dims: D = d_model, F = d_ff (this rank's part of it)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashtrain.config import Mlp, ModelConfig
from flashtrain.model.linear import Linear, product
from kernels.linear import gelu_mlp


class MLP(nn.Module):
    """[B, T, D] -> [B, T, D], each token on its own: all at once, or in `chunks` parts.

    In parts, one after the other, what is inside is made again in backward, part by part too, so
    that [tokens, F] never exists whole. The output is the same; a weight's gradient is a sum over
    the parts.
    """

    chunks = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.chunks == 1:
            return self.run(x)
        parts = [
            checkpoint(self.run, part.unsqueeze(0), use_reentrant=False, preserve_rng_state=False)
            for part in x.flatten(0, 1).chunk(self.chunks)
        ]
        return torch.cat(parts, 1).view_as(x)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GeluMLP(MLP):
    """GPT-2's: D -> F, GELU in its tanh form, F -> D.

    fused: both products and GELU as one operation; False: as three, each for itself.
    """

    fused = True

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        # not as a shard, nor with products of another kind (fp8)
        plain = all(getattr(each, "product", None) is product for each in (up, down))
        if self.fused and x.is_cuda and plain:
            return gelu_mlp(x, up.weight, up.bias, down.weight, down.bias)
        y: Tensor = down(F.gelu(up(x), approximate="tanh"))
        return y


class SquaredReluMLP(MLP):
    """So et al. 2021, arXiv:2109.08668: relu(x)^2 between the two products."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)).square())
        return y


class SwigluMLP(MLP):
    """Shazeer 2020, arXiv:2002.05202: silu(x W_gate) * (x W_up), one product for both."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.gate_up = Linear(model.d_model, 2 * model.d_ff, model.bias)  # rows [gate | up]
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def run(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


MLPS: dict[Mlp, type[GeluMLP | SquaredReluMLP | SwigluMLP]] = {
    Mlp.gelu: GeluMLP,
    Mlp.relu2: SquaredReluMLP,
    Mlp.swiglu: SwigluMLP,
}


def build_mlp(model: ModelConfig) -> MLP:
    return MLPS[model.mlp](model)
