"""How initial weights, learning rates, logits and scores depend on the width of the model.

`standard` is GPT-2's: none of them do, so the best learning rate falls as the model gets wider.
`mup` is the maximal update parametrization (Yang et al. 2022, arXiv:2203.03466, table 8): every
activation moves by as much per step at any width, and what was tuned on a narrow model holds on a
wide one. With m = d_model / base_width:

    matrices of the blocks      initial std / sqrt(m)      Adam's rate / m, Muon's / sqrt(m)
    embedding, positions, head  unchanged                  unchanged
    norms and biases            unchanged                  unchanged
    hidden states at the head   times 1 / m
    scores q k                  times sqrt(base_head_size) / head_size

At m = 1 both are the same. A family of models keeps d_ff / d_model and n_layers, and grows either
the number of heads or (then name base_head_size) their size. Muon's update U V^T has the norm of
its largest singular value, Adam's that of all its entries: hence the two rates.

Weight decay is divided by what multiplies the rate, so that a step pulls by rate x decay at every
width (Wortsman et al. 2023, arXiv:2309.14322).
"""

import math

from flashtrain.config import ModelConfig, Parametrization


def width_ratio(model: ModelConfig) -> float:
    """m above; 1 for the standard parametrization. `model` is resolved, here and below."""
    if model.parametrization is Parametrization.standard:
        return 1.0
    assert model.base_width is not None
    return model.d_model / model.base_width


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter multiplies hidden states into hidden states: both sides grow."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in module


def initial_std(name: str, model: ModelConfig) -> float:
    """Of a matrix or table; norms and biases start at one and zero.

    The projections that write to the residual stream are divided by sqrt(2 n_layers), so that its
    variance does not grow with depth (Radford et al. 2019, section 2.3).
    """
    std = model.init_std
    if is_hidden_matrix(name):
        std /= math.sqrt(width_ratio(model))
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * model.n_layers)
    return std


def rate_ratio(name: str, model: ModelConfig) -> float:
    """What multiplies the learning rate of a parameter that Adam updates."""
    return 1 / width_ratio(model) if is_hidden_matrix(name) else 1.0


def muon_rate_ratio(model: ModelConfig) -> float:
    """What multiplies the learning rate of the matrices that Muon updates."""
    return 1 / math.sqrt(width_ratio(model))


def output_ratio(model: ModelConfig) -> float:
    """What multiplies the hidden states that the head turns into logits."""
    return 1 / width_ratio(model)


def query_ratio(model: ModelConfig) -> float:
    """What multiplies queries, so that scores are q k sqrt(base_head_size) / head_size."""
    if model.parametrization is Parametrization.standard or model.base_head_size is None:
        return 1.0
    assert model.head_size is not None
    return math.sqrt(model.base_head_size / model.head_size)
