"""Keys and values of the tokens a model has seen, so that the next one costs one token's work.

Dims: B sequences, S room for each, L layers, K key/value heads *of this rank*, D head size.

Filling runs whole prompts through the training forward, [B, T], which leaves its keys and values
here. After that each pass takes one new token of every sequence, laid out as one row of B tokens
[1, B]: nothing but attention tells tokens of one sequence from tokens of many, and tensor
parallelism splits that row as it splits a sequence.
"""

import torch
from torch import Tensor

from flashtrain.config import ModelConfig
from kernels.attention import attention_decode


class LayerCache:
    """What the attention of one layer asks. k, v [B, S, K, D]."""

    def __init__(self, cache: "KVCache", k: Tensor, v: Tensor) -> None:
        self.cache, self.k, self.v = cache, k, v

    @property
    def filling(self) -> bool:
        return self.cache.filling

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Keep those of whole prompts, [B, T, K, D]; what is beyond a prompt's end is never used.

        What stands past the room was padding and is dropped.
        """
        T = min(k.shape[1], self.k.shape[1])
        self.k[:, :T], self.v[:, :T] = k[:, :T], v[:, :T]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, backend: str
    ) -> Tensor:
        """Add one token of every sequence and attend from it: q [1, B, H, D] -> [1, B, H, D]."""
        rows, places = self.cache.rows, self.cache.at
        self.k[rows, places], self.v[rows, places] = k[0], v[0]
        mixed = attention_decode(
            q.transpose(0, 1),
            self.k,
            self.v,
            self.cache.seen,
            alibi_slopes=slopes,
            backend="reference" if backend == "reference" else "auto",
        )
        return mixed.transpose(0, 1)


class KVCache:
    """Room for `batch` sequences of `room` tokens in every layer.

    lengths [B] int32 on the device: how many tokens of each are kept. Whoever runs the model sets
    it: after filling to the lengths of the prompts, after each pass of new tokens one more.
    """

    def __init__(
        self,
        model: ModelConfig,
        batch: int,
        room: int,
        *,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert model.head_size is not None
        self.room, self.filling = room, True
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.rows = torch.arange(batch, device=device)
        self.at, self.seen = self.lengths.long(), self.lengths + 1
        shape = (model.n_layers, batch, room, kv_heads, model.head_size)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in "kv")
        self.layers = [LayerCache(self, k, v) for k, v in zip(self.k, self.v, strict=True)]

    def next_places(self) -> Tensor:
        """Begin a pass of new tokens; where they stand in their sequences, [1, B] int64."""
        self.at, self.seen = self.lengths.long(), self.lengths + 1
        return self.at.unsqueeze(0)


def cache_bytes_per_token(model: ModelConfig, dtype: torch.dtype, tensor: int = 1) -> int:
    """Bytes on each of `tensor` ranks for one token of one sequence; `model` is resolved."""
    assert model.n_kv_heads is not None and model.head_size is not None
    heads = max(1, model.n_kv_heads // tensor)
    return 2 * model.n_layers * heads * model.head_size * dtype.itemsize
