"""The same model written the long way, in fp64, for tests: loops over heads, no fused anything.

Takes a `GPT`'s parameters by name and nothing else from it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flashtrain.config import Mlp, ModelConfig, Norm, PositionConfig, PositionKind, Target


def plain_hidden(
    parameters: Mapping[str, Tensor], model: ModelConfig, position: PositionConfig, tokens: Tensor
) -> Tensor:
    """tokens [B, T] -> hidden [B, T, D] fp64."""
    weights = {name: value.detach().double() for name, value in parameters.items()}
    T = tokens.shape[1]
    x = weights["embedding.weight"][tokens]
    if Target.embedding in position.applies_to:
        x = x + position_vectors(weights, model, position, T)
    for layer in range(model.n_layers):
        own = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        x = x + attention_half(own, model, position, weights, norm(own, "norm_attention", model, x))
        x = x + mlp_half(own, model, norm(own, "norm_mlp", model, x))
    return norm(weights, "norm", model, x)


def norm(own: Mapping[str, Tensor], name: str, model: ModelConfig, x: Tensor) -> Tensor:
    if model.norm is Norm.rmsnorm:
        return rms(x, own[f"{name}.weight"], model.norm_eps)
    centred = x - x.mean(-1, keepdim=True)
    y = rms(centred, own[f"{name}.weight"], model.norm_eps)
    return y + own.get(f"{name}.bias", torch.zeros(()))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", torch.zeros(()))


def mlp_half(own: Mapping[str, Tensor], model: ModelConfig, x: Tensor) -> Tensor:
    if model.mlp is Mlp.swiglu:
        both = linear(own, "mlp.gate_up", x)
        gate, up = both[..., : model.d_ff], both[..., model.d_ff :]
        return linear(own, "mlp.down", gate / (1 + torch.exp(-gate)) * up)
    y = linear(own, "mlp.up", x)
    if model.mlp is Mlp.relu2:
        return linear(own, "mlp.down", torch.where(y > 0, y * y, 0.0))
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    return linear(own, "mlp.down", 0.5 * y * (1 + torch.tanh(inner)))


def attention_half(
    own: Mapping[str, Tensor],
    model: ModelConfig,
    position: PositionConfig,
    weights: Mapping[str, Tensor],
    x: Tensor,
) -> Tensor:
    T, size, heads, kv_heads = x.shape[1], model.head_size, model.n_heads, model.n_kv_heads
    assert size is not None
    assert kv_heads is not None
    distance = torch.arange(T)[:, None] - torch.arange(T)
    ends = [0, heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size]
    parts = {}
    for index, target in enumerate((Target.q, Target.k, Target.v)):
        rows = slice(ends[index], ends[index + 1])
        sees = x
        added = position.kind in (PositionKind.learned, PositionKind.sinusoidal)
        if added and target in position.applies_to:
            sees = x + position_vectors(weights, model, position, T)
        y = sees @ own["attention.qkv.weight"][rows].T
        if model.bias:
            y = y + own["attention.qkv.bias"][rows]
        y = y.unflatten(-1, (-1, size))
        if model.qk_norm and target is not Target.v:
            y = rms(y, own[f"attention.{target.name}_norm.weight"], model.norm_eps)
        if position.kind is PositionKind.rope and target in position.applies_to:
            y = turned(y, position)
        parts[target] = y
    mixed = []
    for head in range(heads):
        q = parts[Target.q][:, :, head]
        k, v = (parts[t][:, :, head * kv_heads // heads] for t in (Target.k, Target.v))
        scores = q @ k.mT / math.sqrt(size)
        if position.kind is PositionKind.alibi:  # heads a power of two in these tests
            scores = scores - 2 ** (-8 * (head + 1) / heads) * distance
        mixed.append(scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v)
    return linear(own, "attention.out", torch.cat(mixed, -1))


def turned(y: Tensor, position: PositionConfig) -> Tensor:
    """Unscaled RoPE on y [B, T, H, size], pairs as complex numbers."""
    rotated = int(y.shape[-1] * position.partial_rotary_factor)
    pairs = torch.complex(y[..., : rotated // 2], y[..., rotated // 2 : rotated])
    speed = position.rope_theta ** (-torch.arange(0, rotated, 2).double() / rotated)
    angle = torch.arange(y.shape[1]).double()[:, None, None] * speed
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag, y[..., rotated:]), -1)


def position_vectors(
    weights: Mapping[str, Tensor], model: ModelConfig, position: PositionConfig, T: int
) -> Tensor:
    if position.kind is PositionKind.learned:
        return weights["position.weight"][:T]
    wave = torch.zeros(T, model.d_model, dtype=torch.float64)
    for t in range(T):
        for dim in range(model.d_model):
            angle = t / 10000 ** (dim // 2 * 2 / model.d_model)
            wave[t, dim] = math.cos(angle) if dim % 2 else math.sin(angle)
    on_embedding = Target.embedding in position.applies_to
    return wave * (model.init_std * math.sqrt(2) if on_embedding else 1.0)
