"""flashtrain's attention behind torch.nn.functional.scaled_dot_product_attention on CUDA.

PyTorch lets a library stand in for its FlashAttention: `activate()` does, `restore()` undoes it;
torch.nn.attention.activate_flash_attention_impl("flashtrain") and its counterpart do the same. It
changes the flash backend of scaled_dot_product_attention. Calls that PyTorch does not send there
(an attn_mask, float32, nested tensors) run what they ran before. On Hopper PyTorch prefers cuDNN
to it, which is therefore off in between.
"""

from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from kernels.attention.registration import Options, attention_backward, attention_forward

NAME = "flashtrain"


def activate() -> None:
    """Send scaled_dot_product_attention's FlashAttention calls to flashtrain's kernels.

    Raises:
        RuntimeError: this torch cannot be told to.
    """
    _check()
    torch.nn.attention.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give PyTorch its own FlashAttention back. Harmless where flashtrain's is not active.

    Raises:
        RuntimeError: as `activate`.
    """
    _check()
    if torch.nn.attention.current_flash_attention_impl() == NAME:
        torch.nn.attention.restore_flash_attention_impl()


def _check() -> None:
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl:"
            " take torch 2.11 or newer, or call kernels.attention.attention"
        )


class Handle:
    """The overrides, from its making to `remove`."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, implementation in (
            ("_scaled_dot_product_flash_attention", _forward),
            ("_scaled_dot_product_flash_attention_backward", _backward),
        ):
            self._library.impl(name, implementation, dispatch_key)
        self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def remove(self) -> None:
        """Called by torch when the implementation is restored or another one takes over."""
        self._library = None  # its end takes the overrides back
        torch.backends.cuda.enable_cudnn_sdp(self._cudnn)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: query [B, H, T, D], key [B, H_kv, S, D]."""
    if return_debug_mask:
        raise ValueError("flashtrain's attention has no debug mask: pass return_debug_mask=False")
    seed = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0:
        seed.random_()
    options = _options(seed, dropout_p, is_causal, scale or query.shape[3] ** -0.5)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = attention_forward(q, k, v, *options)
    out = _laid_out_as(query, out.transpose(1, 2))
    offset = torch.empty((), dtype=torch.uint64, device=query.device)  # not used
    debug_mask = query.new_empty(0)
    T, S = query.shape[2], key.shape[2]
    return out, lse, None, None, T, S, seed.view(torch.uint64), offset, debug_mask


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    seed = philox_seed.view(torch.int64)
    options = _options(seed, dropout_p, is_causal, scale or query.shape[3] ** -0.5)
    d_out, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    gradients = attention_backward(d_out, None, q, k, v, o, logsumexp, False, *options)
    given = (query, key, value)
    dq, dk, dv = (
        _laid_out_as(x, g.transpose(1, 2)) for x, g in zip(given, gradients[:3], strict=True)
    )
    return dq, dk, dv


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides that torch.compile counts on: those of a fresh tensor like the input."""
    fresh = torch.empty_like(like)
    return x if x.stride() == fresh.stride() else fresh.copy_(x)


def _options(seed: Tensor, dropout: float, causal: bool, scale: float) -> Options:
    return Options(
        alibi_slopes=None, sinks=None, bounds=None, bias=None, key_mask=None, key_range=None,
        dropout_seed=seed[:1] if dropout > 0 else None, scale=scale, before=-1,
        after=0 if causal else -1, softcap=0.0, dropout=dropout,
        deterministic=torch.are_deterministic_algorithms_enabled(), backend="auto",
    )  # fmt: skip


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Handle)
