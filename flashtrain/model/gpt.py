"""A dense GPT: embedding -> blocks of attention and MLP -> norm -> head. No process group here.

Dims: B batch, T tokens, D = d_model, V vocabulary. Pre-norm blocks (Xiong et al. 2020,
arXiv:2002.04745). The same code runs whole or as one rank's shard: `parallel/plan.py` swaps layers
from outside, and the residual stream may then hold a part of the sequence only.
"""

import torch
from torch import Tensor, nn

from flashtrain.config import Mlp, ModelConfig, Norm, PositionConfig, PositionKind, Target
from flashtrain.model.attention import Attention
from flashtrain.model.cache import KVCache, LayerCache
from flashtrain.model.embedding import Embedding
from flashtrain.model.linear import Linear
from flashtrain.model.mlp import build_mlp
from flashtrain.model.norm import build_norm
from flashtrain.model.parametrization import output_ratio
from flashtrain.model.position import build_position, places_in
from kernels.attention import document_bounds


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: ModelConfig, position: PositionConfig, backend: str) -> None:
        super().__init__()
        self.norm_attention = build_norm(model)
        self.attention = Attention(model, position, backend)
        self.norm_mlp = build_norm(model)
        self.mlp = build_mlp(model)

    def forward(
        self,
        x: Tensor,
        position: Tensor | None,
        documents: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x, branch = self.attention(self.norm_attention, x, position, documents, cache)
        y: Tensor = self.mlp(self.norm_mlp, x, branch)
        return y


class GPT(nn.Module):
    """`tokens [B, T] int64 -> hidden [B, T, D]`; `logits(hidden) -> [B, T, V]`.

    `model` and `position` are resolved configs (`resolve_model`); `max_length` is the longest
    sequence of the run. Parameters hold no values before `init_weights`: build under
    `torch.device("meta")`, shard, give them memory, then fill them.
    """

    def __init__(
        self,
        model: ModelConfig,
        position: PositionConfig,
        max_length: int,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if model.vocabulary is None:
            raise ValueError("model.vocabulary is not known yet: take the tokenizer's size")
        self.config, self.output_ratio = model, output_ratio(model)
        self.embedding = Embedding(model.vocabulary, model.d_model, dtype)
        self.position = build_position(model, position, max_length)
        self.position_on_embedding = Target.embedding in position.applies_to and position.kind in (
            PositionKind.learned,
            PositionKind.sinusoidal,
        )
        self.blocks = nn.ModuleList(Block(model, position, backend) for _ in range(model.n_layers))
        self.norm = build_norm(model)
        self.head = Linear(model.d_model, model.vocabulary)
        if model.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """documents [B, T] int64: a token sees those of its own run of equal numbers only, and
        positions count from the first of them.

        cache: while it is filling, keeps the keys and values of `tokens`; after that `tokens` is
        [1, B], the next token of each of its sequences.

        x: what earlier blocks made of the tokens, in place of their embedding; for a model whose
        first blocks are elsewhere (flashtrain/parallel/pipeline.py).
        """
        x = self.embedding(tokens) if x is None else x
        length = tokens.shape[1]
        places = bounds = None
        if documents is not None:
            places, bounds = places_in(documents), document_bounds(documents)
        if cache is not None and not cache.filling:
            length, places = cache.room, cache.next_places()
        position = self.position(length, tokens.device, places)
        if self.position_on_embedding:
            x, position = self.embedding.add(x, position), None
        for number, block in self.blocks.named_children():
            x = block(x, position, bounds, None if cache is None else cache.layers[int(number)])
        hidden: Tensor = self.norm(x)
        return hidden if self.output_ratio == 1 else hidden * self.output_ratio

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def n_parameters(model: ModelConfig, position: PositionConfig, max_length: int) -> int:
    """Numbers that are trained; a tied head counts once. `model` is resolved."""
    assert model.vocabulary is not None and model.d_ff is not None
    assert model.head_size is not None and model.n_kv_heads is not None
    width, size, bias = model.d_model, model.head_size, int(model.bias)
    norm = width * (1 + bias * (model.norm is Norm.layernorm))
    qkv = (model.n_heads + 2 * model.n_kv_heads) * size * (width + bias)
    out = (model.n_heads * size + bias) * width
    up = (2 if model.mlp is Mlp.swiglu else 1) * model.d_ff * (width + bias)
    down = (model.d_ff + bias) * width
    block = 2 * norm + qkv + out + up + down + 2 * size * model.qk_norm
    table = max_length * width if position.kind is PositionKind.learned else 0
    vectors = model.vocabulary * width * (1 if model.tied_head else 2)
    return vectors + table + model.n_layers * block + norm
