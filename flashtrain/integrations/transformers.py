"""flashtrain's attention in Hugging Face models: `register()`, and it is an attn_implementation.

Works for every model that calls its attention through AttentionInterface, BLIP-2 and its T5
included; masks.py says what happens to masks. Decoding calls the same kernels with one query.
"""

import functools
import importlib.metadata
import sys
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.utils import generic

    from flashtrain.integrations import masks
except ImportError as error:
    try:
        other = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        reason = "install it with `pip install 'flashtrain[transformers]'`"
    else:
        reason = (
            f"Hugging Face's package `kernels` {other} is installed too, and transformers looks in"
            " flashtrain's kernels for what is in there: `pip uninstall kernels`"
        )
    raise ImportError(f"transformers cannot be imported ({error}); {reason}") from None

NAME = "flashtrain"
OLDEST = (5, 20)  # some versions earlier T5 kept its attention to itself
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transformers {transformers.__version__} is older than {OLDEST[0]}.{OLDEST[1]}, the first"
        " that flashtrain works with: `pip install --upgrade 'flashtrain[transformers]'`"
    )

# what changes the result and has no counterpart here, by the names models pass it under
_REFUSED = ("cache", "head_mask", "indices", "output_attentions", "sinks")


@functools.cache  # calling it again changes nothing
def register() -> None:
    """Make attn_implementation="flashtrain" known to transformers; again is harmless.

    Models take it at `from_pretrained`, `from_config` or `set_attn_implementation`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, masks.attention_mask)
    _not_flash_attention()
    _refuse_other_models()


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The entry in AttentionInterface: `attention` under the names that transformers gives things.

    Args:
        module: the attention layer; its `is_causal` holds where no argument and no mask says more.
        query, key, value: [B, H, T, D], [B, H_kv, S, D], [B, H_kv, S, Dv].
        attention_mask: None or one of the forms of masks.py, or a mask of the user's own,
            [B or 1, H or 1, T or 1, S], bool (True: seen) or to be added.
        dropout: of the weights, 0 outside training.
        scaling: of the scores; default D ** -0.5.
        is_causal: whether queries are causal where attention_mask is None.
        position_bias: [B or 1, H or 1, T, S], added to the scores, differentiable (T5).
        softcap: c turns scores x into c * tanh(x / c) (Gemma 2).
        s_aux: [H], attention sinks (gpt-oss).
        cu_seq_lens_q: [documents + 1], packed sequences.
        others: what else the model passed. `sliding_window` is not read, as the mask holds it.

    Returns:
        [B, T, H, Dv], and None in place of the weights, which are never in memory.

    Raises:
        ValueError: something that changes the result cannot be computed.
    """
    for name in _REFUSED:
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(
                f"attn_implementation='{NAME}' does not take {name}: use 'eager' for this model"
            )
    if torch.is_autocast_enabled(query.device.type):  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    window = documents = key_mask = bias = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        documents = cu_seq_lens_q
    elif attention_mask.dim() == 3:
        causal = True
        W, L = attention_mask.shape[1:]
        if L > 0:
            key, value = key[:, :, :L], value[:, :, :L]
            row = attention_mask[:, 0]
            key_mask, documents = (row, None) if row.dtype == torch.bool else (None, row)
        window = (W - 1, 0) if key.shape[2] > W else None
    elif attention_mask.dim() == 4:
        causal = False
        key_mask, bias = _complete(attention_mask, query, key)
    else:
        raise ValueError(
            f"attn_implementation='{NAME}' got a mask {list(attention_mask.shape)}: it takes those"
            " of transformers.masking_utils, or 4-D ones"
        )
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else position_bias + bias
    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        causal=causal, scale=scaling, window=window, bias=bias, softcap=softcap, sinks=s_aux,
        documents=documents, key_mask=key_mask, dropout=dropout,
    )  # fmt: skip
    return out, None


def _complete(mask: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A 4-D mask as (key_mask [B, S], bias)."""
    if mask.dtype != torch.bool:
        return None, mask
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(key.shape[0], -1), None
    return None, torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _not_flash_attention() -> None:
    """Keep transformers from taking "flashtrain" for a build of the package flash-attn.

    It takes every name with "flash" in it for one, looks for it among the kernels that can be
    downloaded, and fails. The question is one function; modules hold it by name, so those that are
    loaded already get the new one too.
    """
    asked = generic.is_flash_attention_requested

    @functools.wraps(asked)
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, **options: Any
    ) -> bool:
        if requested_attention_implementation == NAME:
            return False
        if getattr(config, "_attn_implementation", None) == NAME:
            return False
        answer: bool = asked(config, requested_attention_implementation, **options)
        return answer

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "transformers" and (
            vars(module).get("is_flash_attention_requested") is asked
        ):
            vars(module)["is_flash_attention_requested"] = is_flash_attention_requested


def _refuse_other_models() -> None:
    """Refuse models whose layers do not ask AttentionInterface (BLOOM and older ones).

    transformers checks that for its own names only. Such a model would compute attention itself,
    with a mask that is not meant for it, and be wrong in silence.
    """
    checked = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(checked)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        if requested_attention == NAME and not self._can_set_attn_implementation():
            raise ValueError(
                f"{type(self).__name__} of transformers {transformers.__version__} computes"
                f" attention itself, so attn_implementation='{NAME}' cannot reach it: use 'eager'"
            )
        answer: str = checked(self, requested_attention, is_init_check)
        return answer

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
