"""The attention half of a block: norm, projections and positions around the fused kernel.

Dims: B batch, T tokens, D head size, H query heads and K key/value heads *of this rank*.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import ModelConfig, PositionConfig, PositionKind, Target
from flashtrain.model.cache import LayerCache
from flashtrain.model.linear import Linear, behind_norm, onto_stream
from flashtrain.model.norm import StreamNorm, head_norm
from flashtrain.model.parametrization import query_ratio
from kernels.attention import attention, attention_packed
from kernels.rope import rotate

HEADS = (Target.q, Target.k, Target.v)  # their order in the fused projection


class Attention(nn.Module):
    """Causal self-attention, grouped queries, any kind of position on any of q, k, v.

    Runs whole or as a shard: head counts are read off the projections, and `first_head` is this
    rank's first query head in the whole model.
    """

    def __init__(self, model: ModelConfig, position: PositionConfig, backend: str) -> None:
        super().__init__()
        assert model.head_size is not None and model.n_kv_heads is not None
        size = model.head_size
        self.head_size, self.backend, self.first_head = size, backend, 0
        rows = (model.n_heads + 2 * model.n_kv_heads) * size  # [q heads | k heads | v heads]
        self.qkv = Linear(model.d_model, rows, model.bias)
        self.out = Linear(model.n_heads * size, model.d_model, model.bias)
        self.q_norm = head_norm(model) if model.qk_norm else None
        self.k_norm = head_norm(model) if model.qk_norm else None
        self.targets = [HEADS.index(t) for t in position.applies_to if t in HEADS]
        self.adds = position.kind in (PositionKind.learned, PositionKind.sinusoidal)
        self.rotates = position.kind is PositionKind.rope
        self.slopes = position.kind is PositionKind.alibi
        # whether somebody keeps the projection's output, which is then not to be overwritten
        self.keeps_product = False
        self.query_ratio = query_ratio(model)
        # what mixes the tokens of the heads where ranks hold parts of the sequence
        self.attend: Callable[..., Tensor] | None = None

    @property
    def kv_heads(self) -> int:
        """Key/value heads of this rank."""
        rows: int = self.qkv.out_features - self.out.in_features
        return rows // (2 * self.head_size)

    def forward(
        self,
        norm: StreamNorm,
        x: Tensor,
        position: Tensor | None,
        documents: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x + attention(norm(x)), as their sum and None or still as two.

        `x [B, T, d_model]` (or its part of the sequence), `position` as in `position.py`, `cache`
        as in `GPT.forward`; `documents [B, 2, T]` are `document_bounds`.

        T is that of the projection's output: under tensor parallelism x holds fewer tokens.
        """
        fused, x = behind_norm(self.qkv, norm, x)
        own = None
        if self.slopes:
            assert position is not None
            count = self.out.in_features // self.head_size
            own = position[self.first_head : self.first_head + count]
        if cache is None and self._stays_packed(position):
            mixed = self._mix_packed(fused, position, own, documents)
            return onto_stream(self.out, mixed.flatten(2), x)
        q, k, v = self._heads(fused, position)
        if cache is not None and not cache.filling:
            mixed = cache.attend(q, k, v, own, self.backend)
        else:
            if cache is not None:
                cache.fill(k, v)
            attend = partial(attention, causal=True) if self.attend is None else self.attend
            mixed = attend(q, k, v, alibi_slopes=own, documents=documents, backend=self.backend)
        return onto_stream(self.out, mixed.flatten(2), x)

    def _stays_packed(self, position: Tensor | None) -> bool:
        """Whether nothing tells q from k on their way to attention: their gradients then come back
        as the projection's output lies, in one tensor."""
        alike = not self.rotates or self.targets == [0, 1]
        added = self.adds and position is not None
        plain = not added and self.q_norm is None and self.query_ratio == 1
        return self.attend is None and alike and plain

    def _mix_packed(
        self,
        fused: Tensor,
        position: Tensor | None,
        slopes: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        heads = fused.unflatten(-1, (-1, self.head_size))  # [B, T, H + 2 K, D]
        count = self.out.in_features // self.head_size
        return attention_packed(
            heads, count, causal=True, rotation=position if self.rotates else None,
            in_place=not self.keeps_product, alibi_slopes=slopes, documents=documents,
            backend=self.backend,
        )  # fmt: skip

    def _heads(self, fused: Tensor, position: Tensor | None) -> list[Tensor]:
        """q [B, T, H, D], k and v [B, T, K, D]: views of the fused projection where untouched."""
        wide = self.out.in_features
        narrow = (fused.shape[-1] - wide) // 2
        parts = list(torch.split(fused, [wide, narrow, narrow], dim=-1))
        if position is not None and self.adds:
            # W (x + p) = W x + W p: [T, ..] more work, where x + p would unfuse the projection
            weights = torch.split(self.qkv.weight, [wide, narrow, narrow])
            vectors = position.to(fused.dtype)
            for i in self.targets:
                parts[i] = parts[i] + F.linear(vectors, weights[i].to(fused.dtype))
        heads = [part.view(*part.shape[:-1], -1, self.head_size) for part in parts]
        # after vectors that went into the projection, before a rotation, which keeps lengths
        if self.q_norm is not None and self.k_norm is not None:
            heads[0], heads[1] = self.q_norm(heads[0]), self.k_norm(heads[1])
        if self.rotates:
            assert position is not None
            for i in self.targets:
                heads[i] = rotate(heads[i], position)
        if self.query_ratio != 1:
            heads[0] = heads[0] * self.query_ratio
        return heads
