"""What one block keeps of a micro-batch between its forward and its backward pass, in bytes.

Compiled, as on GPUs: PyTorch's partitioner keeps what a matrix product of the backward pass reads
(inputs of products, weights in bf16), because making it again would write it to memory all the
same, and fuses the rest (the activation's derivative, a norm's normalised input) into the backward
kernels. So a GELU block without rotations keeps 16 d numbers a token:

    x d | norm d | q, k, v 3 d | attention d | x d | norm d | up 4 d | gelu 4 d

Where layers are plain ones (flashtrain/model/linear.py) the norms are written again in backward and
not kept, with trainer.recompute=light neither GELU's or SwiGLU's result nor the weights in bf16.

A rotation of q and k adds 2 d: attention keeps the rotated ones, and the fused projection lives on
because v is a view of it; not where attention takes one tensor of all heads, rotated. Eager, the
norms keep fp32 copies of their input instead of x, and SwiGLU one product more. Under tensor
parallelism q, k, v, attention and MLP are 1/n wide and x has 1/n of the tokens; so have the norms
where transfers run beside products (`parallel.overlap`), else the compiler keeps them *gathered*,
whole. fp8 products with one scale a tensor keep their inputs in one byte: those of norms and
activation instead of two, that of attention besides.
"""

from flashtrain.config import (
    Config,
    ContextKind,
    LinearKind,
    Mlp,
    Norm,
    PositionKind,
    Recompute,
    Target,
)
from flashtrain.planning.sizes import Sizes, norms_per_block, rotated


def kept(
    config: Config, sizes: Sizes, *, compiled: bool = True, views: bool = True,
    plain: bool | None = None,
) -> float:  # fmt: skip
    """Of one block and micro-batch under `trainer.recompute`, bytes. plain: None is `is_plain`."""
    recompute = config.trainer.recompute
    stream = sizes.tokens / sizes.tensor * sizes.width * sizes.itemsize
    if recompute is Recompute.full:
        return stream
    if recompute is Recompute.selective:
        # of the four products every second one, and attention's result with its lse
        columns = sizes.q + 2 * sizes.kv + sizes.up + sizes.q
        return stream + sizes.tokens * (columns * sizes.itemsize + _lse(config, sizes))
    plain = is_plain(config, sizes) if plain is None else plain
    whole = everything(config, sizes, compiled=compiled, views=views, plain=plain)
    if recompute is Recompute.light and plain:
        whole -= _cast_weights(sizes)
        if config.model.mlp is not Mlp.relu2:
            whole -= sizes.tokens * sizes.hidden * sizes.itemsize
    return whole


def is_plain(config: Config, sizes: Sizes) -> bool:
    """Whether a GPU's linear layers are computed with norm and stream (kernels/linear)."""
    small = sizes.itemsize == 2 and config.precision.linear is LinearKind.compute
    return small and sizes.tensor == 1 and config.trainer.recompute is not Recompute.selective


def everything(
    config: Config, sizes: Sizes, *, compiled: bool = True, views: bool = True,
    plain: bool | None = None,
) -> float:  # fmt: skip
    """What `trainer.recompute=none` keeps, and what a recomputed block holds while its backward
    runs.

    views: attention reads q, k and v where the fused projection left them; PyTorch's kernel for
    CPUs copies each.
    """
    plain = is_plain(config, sizes) if plain is None else plain
    n, width, item = sizes.tensor, sizes.width, sizes.itemsize
    model = config.model
    stream = width / n  # numbers a token
    numbers = float(_heads(config, sizes, views)) + _mixed(config, sizes)
    numbers += sizes.up  # into the activation
    gathered = compiled and not sizes.overlap
    normed = 2 * (width if gathered else stream)
    inputs = normed + sizes.hidden  # of products, but for attention's
    numbers += inputs - (normed if plain else 0)
    if config.precision.linear is LinearKind.fp8_tensorwise:
        numbers += sizes.fp8 * (sizes.q - inputs) / item
    exact = norms_per_block(model) / n * 4.0 + _lse(config, sizes)  # fp32 bytes a token
    if compiled or plain or item == 4:
        numbers += 2 * stream  # x before each norm
    else:
        exact += 2 * stream * 4  # the norms' fp32 copies of it
    if not compiled:
        if model.norm is Norm.rmsnorm and not plain:
            exact += 2 * stream * 4  # and normalised
        if model.mlp is Mlp.swiglu and not plain:
            numbers += sizes.hidden  # silu(gate)
    return sizes.tokens * (numbers * item + exact) + _cast_weights(sizes)


def _heads(config: Config, sizes: Sizes, views: bool) -> int:
    """Numbers a token that attention keeps of q, k and v."""
    touched = rotated(config, sizes)
    fused = sizes.q + 2 * sizes.kv
    turned = config.position.kind is PositionKind.rope and set(touched) == {Target.q, Target.k}
    if views and sizes.context == 1 and turned and not config.model.qk_norm:
        return fused  # attention_packed (flashtrain/model/attention.py)
    if sizes.context > 1 and config.parallel.context_kind is ContextKind.ulysses:
        return fused  # as they arrived from the other ranks
    if not views:
        return fused
    return sum(touched.values()) + (fused if len(touched) < 3 or config.model.qk_norm else 0)


def _mixed(config: Config, sizes: Sizes) -> int:
    """Numbers a token of attention's result; sent back it is there twice."""
    twice = sizes.context > 1 and config.parallel.context_kind is ContextKind.ulysses
    return sizes.q * (2 if twice else 1)


def _lse(config: Config, sizes: Sizes) -> float:
    assert config.model.head_size is not None
    return 4.0 * sizes.q / config.model.head_size


def _cast_weights(sizes: Sizes) -> float:
    """Weights in bf16 that the products of the backward pass read. FSDP's are counted there."""
    return 2.0 * sizes.block_matrices if sizes.itemsize == 2 and sizes.shard == 1 else 0.0
