"""The feed-forward half of a block. Dims: D = d_model, F = d_ff (this rank's part of it)."""

from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import Mlp, ModelConfig
from flashtrain.model.linear import Linear


class GeluMLP(nn.Module):
    """GPT-2's: D -> F, GELU in its tanh form, F -> D."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y


class SquaredReluMLP(nn.Module):
    """So et al. 2021, arXiv:2109.08668: relu(x)^2 between the two products."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.up = Linear(model.d_model, model.d_ff, model.bias)
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)).square())
        return y


class SwigluMLP(nn.Module):
    """Shazeer 2020, arXiv:2002.05202: silu(x W_gate) * (x W_up), one product for both."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.d_ff is not None
        self.gate_up = Linear(model.d_model, 2 * model.d_ff, model.bias)  # rows [gate | up]
        self.down = Linear(model.d_ff, model.d_model, model.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


MLPS: dict[Mlp, type[GeluMLP] | type[SquaredReluMLP] | type[SwigluMLP]] = {
    Mlp.gelu: GeluMLP,
    Mlp.relu2: SquaredReluMLP,
    Mlp.swiglu: SwigluMLP,
}


def build_mlp(model: ModelConfig) -> GeluMLP | SquaredReluMLP | SwigluMLP:
    return MLPS[model.mlp](model)
