"""What one block keeps of a micro-batch between its forward and its backward pass, in bytes.

Compiled, as on GPUs: PyTorch's partitioner keeps what a matrix product of the backward pass reads
(inputs of products, weights in bf16), because making it again would write it to memory all the
same, and fuses the rest (the activation's derivative, a norm's normalised input) into the backward
kernels. So a GELU block without rotations keeps 16 d numbers a token:

    x d | norm d | q, k, v 3 d | attention d | x d | norm d | up 4 d | gelu 4 d

Where layers are plain ones (flashtrain/model/linear.py) the norms are written again in backward and
not kept, with trainer.recompute=light neither GELU's or SwiGLU's result nor the weights in bf16; of
MLPs in fp8 that result is forgotten, too.

A rotation of q and k adds 2 d: attention keeps the rotated ones, and the fused projection lives on
because v is a view of it; not where attention takes one tensor of all heads, rotated. Eager, the
norms keep fp32 copies of their input instead of x, and SwiGLU one product more. Under tensor
parallelism q, k, v, attention and MLP are 1/n wide and x has 1/n of the tokens; so have the norms
where transfers run beside products (`parallel.overlap`), else the compiler keeps them *gathered*,
whole. fp8 products with one scale a tensor keep their inputs in one byte: those of norms and
activation instead of two, that of attention besides.

An MLP in chunks (`trainer.mlp_chunks`) keeps its input alone: what is inside is made again, a part
at a time, and its casts with it. With `trainer.offload_activations` the inputs of the blocks are
kept on the host (memory.py).
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
    chunked = config.trainer.mlp_chunks > 1
    whole = attention_half(config, sizes, compiled=compiled, views=views, plain=plain)
    whole += stream if chunked else mlp_half(config, sizes, compiled=compiled, plain=plain)
    if recompute is Recompute.light and plain:
        whole -= _casts(sizes, _attention_matrices(sizes))
        if not chunked:
            whole -= _casts(sizes, mlp_matrices(sizes))
            if config.model.mlp is not Mlp.relu2:
                whole -= sizes.tokens * sizes.hidden * sizes.itemsize
    if recompute is Recompute.light and sizes.tensor == 1 and not chunked:
        whole -= fp8_mlps(config, sizes) * sizes.tokens * sizes.hidden
    return whole


def fp8_mlps(config: Config, sizes: Sizes) -> float:
    """The share of the MLPs that are one operation in fp8 (flashtrain/model/float8_mlp.py)."""
    one = (
        config.precision.linear is LinearKind.fp8_tensorwise
        and config.model.mlp is not Mlp.relu2
        and config.trainer.recompute is not Recompute.selective
    )
    return sizes.fp8 if one else 0.0


def is_plain(config: Config, sizes: Sizes) -> bool:
    """Whether a GPU's linear layers are computed with norm and stream (kernels/linear)."""
    small = sizes.itemsize == 2 and config.precision.linear is LinearKind.compute
    return small and sizes.tensor == 1 and config.trainer.recompute is not Recompute.selective


def everything(
    config: Config, sizes: Sizes, *, compiled: bool = True, views: bool = True,
    plain: bool | None = None,
) -> float:  # fmt: skip
    """What `trainer.recompute=none` keeps of a block whose MLP runs as a whole.

    views: attention reads q, k and v where the fused projection left them; PyTorch's kernel for
    CPUs copies each.
    """
    plain = is_plain(config, sizes) if plain is None else plain
    half = attention_half(config, sizes, compiled=compiled, views=views, plain=plain)
    return half + mlp_half(config, sizes, compiled=compiled, plain=plain)


def attention_half(
    config: Config, sizes: Sizes, *, compiled: bool, views: bool, plain: bool
) -> float:
    """From the block's input to the stream that the MLP gets."""
    numbers = float(_heads(config, sizes, views)) + _mixed(config, sizes)
    if config.precision.linear is LinearKind.fp8_tensorwise:
        numbers += sizes.fp8 * sizes.q / sizes.itemsize
    more, exact = _normed(config, sizes, compiled, plain)
    bytes_ = sizes.tokens * ((numbers + more) * sizes.itemsize + exact + _lse(config, sizes))
    return bytes_ + _casts(sizes, _attention_matrices(sizes))


def mlp_half(
    config: Config, sizes: Sizes, *, compiled: bool, plain: bool, chunks: int = 1
) -> float:
    """The rest; chunks: of one of so many parts of the tokens."""
    numbers = sizes.up + _input(config, sizes, sizes.hidden)
    if not compiled and config.model.mlp is Mlp.swiglu and not plain:
        numbers += sizes.hidden  # silu(gate)
    more, exact = _normed(config, sizes, compiled, plain)
    bytes_ = sizes.tokens / chunks * ((numbers + more) * sizes.itemsize + exact)
    return bytes_ + _casts(sizes, mlp_matrices(sizes))


def _normed(config: Config, sizes: Sizes, compiled: bool, plain: bool) -> tuple[float, float]:
    """Of a norm and its input: numbers in the compute dtype, and bytes of what is fp32."""
    stream = sizes.width / sizes.tensor  # numbers a token
    gathered = compiled and not sizes.overlap
    exact = norms_per_block(config.model) / 2 / sizes.tensor * 4.0
    numbers = 0.0 if plain else _input(config, sizes, sizes.width if gathered else stream)
    if compiled or plain or sizes.itemsize == 4:
        numbers += stream  # before the norm
    else:
        exact += stream * 4  # its fp32 copy
    if not compiled and config.model.norm is Norm.rmsnorm and not plain:
        exact += stream * 4  # and normalised
    return numbers, exact


def _input(config: Config, sizes: Sizes, columns: float) -> float:
    """Of a product, in numbers of the compute dtype."""
    if config.precision.linear is not LinearKind.fp8_tensorwise:
        return columns
    return columns * (1 - sizes.fp8 / sizes.itemsize)


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


def _casts(sizes: Sizes, matrices: int) -> float:
    """Weights in bf16 that the products of the backward pass read. FSDP's are counted there."""
    return 2.0 * matrices if sizes.itemsize == 2 and sizes.shard == 1 else 0.0


def _attention_matrices(sizes: Sizes) -> int:
    return sizes.block_matrices - mlp_matrices(sizes)


def mlp_matrices(sizes: Sizes) -> int:
    return sizes.width * (sizes.up + sizes.hidden)
