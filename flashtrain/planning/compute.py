"""Seconds of arithmetic and memory traffic on one GPU: of a block, the head, the optimizer."""

from collections.abc import Iterable
from dataclasses import dataclass

from flashtrain.config import (
    Compute,
    Config,
    LinearKind,
    Mlp,
    Moments,
    OptimizerKind,
    Recompute,
)
from flashtrain.planning.activations import fp8_mlps, is_plain, mlp_matrices
from flashtrain.planning.gpus import Gpu
from flashtrain.planning.rates import FP8, FP8_FAST, ROWS, STREAM, attention_rates, product_share
from flashtrain.planning.sizes import Sizes, rotated
from kernels.linear_cross_entropy.tiles import chunk_tokens


@dataclass(frozen=True)
class Work:
    """Seconds by what bounds them."""

    products: float = 0.0  # matrix products
    attention: float = 0.0
    hbm: float = 0.0  # kernels that read and write memory

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.hbm + other.hbm,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.products * times, self.attention * times, self.hbm * times)

    @property
    def total(self) -> float:
        return self.products + self.attention + self.hbm


@dataclass(frozen=True)
class BlockWork:
    """Of one block and micro-batch."""

    forward: Work
    backward: Work
    again: Work  # what recomputation repeats
    weight_gradient: float  # seconds of the products that a reduce-scatter runs beside


def block_work(config: Config, sizes: Sizes, gpu: Gpu) -> BlockWork:
    """ValueError for a precision or a backend whose speed is not known."""
    precision = config.precision
    if precision.compute is not Compute.bf16:
        raise ValueError(f"precision={precision.compute.name}: speed is predicted for bf16 only")
    width, tokens = sizes.width, sizes.tokens
    qkv, out = (sizes.q + 2 * sizes.kv, width), (width, sizes.q)
    up, down = (sizes.up, width), (width, sizes.hidden)
    chunks = config.trainer.mlp_chunks
    products = _products(tokens, (qkv, out), gpu)
    products += _products(tokens, (up, down), gpu, rows=tokens // chunks)
    # by fp8, of each of the three kinds of products
    saved = sizes.fp8 * products * (1 - 1 / FP8)
    saved_back = sizes.fp8 * products * (1 - 1 / (FP8_FAST if precision.fast_backward else FP8))
    attention = _attention(config, sizes, gpu)
    forward_bytes, backward_bytes = (
        sum(both)
        for both in zip(_block_bytes(config, sizes), _cast_bytes(config, sizes), strict=True)
    )
    # of fp32 weights for the forward pass
    casts, grads = 6 * sizes.block_matrices, _gradient_bytes(config, sizes)
    bandwidth = STREAM * gpu.bandwidth
    both = 2 if precision.linear is LinearKind.fp8_tensorwise else 1  # rowwise: not dW
    forward = Work(products - saved, attention[0], (forward_bytes + casts) / bandwidth)
    backward = Work(
        2 * products - both * saved_back,
        attention[1],
        (backward_bytes + grads) / bandwidth,
    )
    again = _again(config, sizes, gpu, forward)
    return BlockWork(forward, backward, again, _products(tokens, (qkv, up), gpu))


def _again(config: Config, sizes: Sizes, gpu: Gpu, forward: Work) -> Work:
    """What recomputation repeats of one block and micro-batch.

    Not the MLP's second product, whose result no gradient needs: a compiler leaves it out. MLPs in
    chunks repeat their half, unless all of the block is repeated anyhow, and cast its weights for
    each part.
    """
    width, tokens, chunks = sizes.width, sizes.tokens, config.trainer.mlp_chunks
    bandwidth = STREAM * gpu.bandwidth
    recompute = config.trainer.recompute
    casts = 6 * mlp_matrices(sizes) if sizes.shard == 1 else 0
    if recompute is Recompute.full:
        down = _products(tokens, ((width, sizes.hidden),), gpu)
        down -= sizes.fp8 * down * (1 - 1 / FP8)
        more = (chunks - 1) * casts
        return Work(forward.products - down, forward.attention, forward.hbm + more / bandwidth)
    if recompute is Recompute.selective:
        # attention and every second product are kept: that after attention is made again
        return Work(_products(tokens, ((width, sizes.q),), gpu), 0.0, forward.hbm)
    light = recompute is Recompute.light and is_plain(config, sizes)
    traffic = 6.0 * sizes.block_matrices if light else 0.0
    products = 0.0
    if chunks > 1:
        products = _products(tokens, ((sizes.up, width),), gpu, rows=tokens // chunks)
        products -= sizes.fp8 * products * (1 - 1 / FP8)
        inside = 2 * width / sizes.tensor + sizes.up + sizes.hidden
        traffic += tokens * inside * sizes.itemsize + (chunks - 1 if light else chunks) * casts
    elif light and config.model.mlp is not Mlp.relu2:
        traffic += tokens * sizes.hidden * sizes.itemsize
    elif recompute is Recompute.light and sizes.tensor == 1:
        traffic += fp8_mlps(config, sizes) * tokens * (2 * sizes.up + sizes.hidden)
    return Work(products, 0.0, traffic / bandwidth)


def ends_work(config: Config, sizes: Sizes, gpu: Gpu) -> Work:
    """Embedding, last norm, head and loss of one micro-batch, forward and backward."""
    item, head = sizes.itemsize, sizes.words * sizes.width
    chunk = chunk_tokens(sizes.tokens) if config.loss.fused else sizes.tokens
    chunks = -(-sizes.tokens // chunk)
    products = 3 * _products(sizes.tokens, ((sizes.words, sizes.width),), gpu, rows=chunk)
    logits = 2.0 * sizes.tokens * sizes.words * item  # read and written
    stream = sizes.tokens / sizes.tensor * sizes.width
    traffic = (
        2 * chunks * 4.0 * head  # the fp32 gradient, once read and once written a chunk
        + 6.0 * head  # the weight cast
        + 12.0 * head  # the embedding's gradient: zeros, and a sum
        + stream * (4 + 9 * item)
    )
    bandwidth = gpu.bandwidth
    return Work(products, 0.0, logits / (ROWS * bandwidth) + traffic / (STREAM * bandwidth))


def optimizer_work(config: Config, sizes: Sizes, gpu: Gpu) -> Work:
    """Norm, clip and step over what this rank holds."""
    # AdamW reads weight, gradient and moments and writes all but the gradient, which it clips on
    # the way; the norm reads gradients once more
    update = 28 if config.optimizer.moments is Moments.fp32 else 20
    traffic = (update + 4) * sizes.held
    products = 0.0
    if config.optimizer.name is OptimizerKind.muon:
        # flashtrain/optim/muon.py: 5 (4 r^2 c + 2 r^3) a matrix, shared by all its ranks
        shapes = (
            (sizes.q * sizes.tensor, sizes.width),
            (sizes.kv * sizes.tensor, sizes.width),
            (sizes.kv * sizes.tensor, sizes.width),
            (sizes.width, sizes.q * sizes.tensor),
            *(((sizes.hidden * sizes.tensor, sizes.width),) * (sizes.up // sizes.hidden)),
            (sizes.width, sizes.hidden * sizes.tensor),
        )
        for shape in shapes:
            r, c = min(shape), max(shape)
            flops = 5 * (4 * r * r * c + 2 * r**3) * sizes.layers
            products += flops / (product_share(r) * gpu.peak)
        products /= sizes.tensor * sizes.replicate
    return Work(products, 0.0, traffic / (STREAM * gpu.bandwidth))


def _products(
    tokens: int, shapes: Iterable[tuple[int, int]], gpu: Gpu, rows: int | None = None
) -> float:
    """Each of [tokens, in] x [out, in]^T, `rows` of the tokens at a time."""
    return sum(
        2.0 * tokens * out * into / (product_share(rows or tokens, out, into) * gpu.peak)
        for out, into in shapes
    )


def _attention(config: Config, sizes: Sizes, gpu: Gpu) -> tuple[float, float]:
    """Forward and backward: this rank's tokens of each sequence see half of it on average."""
    assert config.model.head_size is not None
    forward, backward = attention_rates(
        config.model.head_size, sizes.length, config.attention.backend, gpu
    )
    flops = 2.0 * sizes.tokens * sizes.length * sizes.q
    return flops / forward, 2.5 * flops / backward


def _gradient_bytes(config: Config, sizes: Sizes) -> float:
    """Of one block's weights, in fp32 as their products give them; FSDP's come in bf16, with one
    scale a row too, and are cast. Those of a further micro-batch, or part of an MLP's tokens, are
    added up."""
    small = sizes.shard > 1 or config.precision.linear is LinearKind.fp8_rowwise
    each = (6 if small else 0) + (12 if sizes.micro_batches > 1 else 0)
    parts = (6 if small else 12) * (config.trainer.mlp_chunks - 1)
    return float(each * sizes.block_matrices + parts * mlp_matrices(sizes))


def _cast_bytes(config: Config, sizes: Sizes) -> tuple[float, float]:
    """Of the casts to fp8 of what is multiplied, forward and backward.

    Read for the scale, read to be cast, written as it lies and transposed: 6 bytes a number. What
    an MLP has between its products is made of z, and of z and d, on the way (kernels/fp8_cast).
    """
    hidden, up, one = sizes.hidden, sizes.up, fp8_mlps(config, sizes)
    apart = sizes.fp8 - one
    forward = sizes.fp8 * 6 * (2 * sizes.width + sizes.q)
    forward += apart * 6 * hidden + one * (4 * up + 2 * hidden)
    backward = sizes.fp8 * 6 * (sizes.q + 2 * sizes.kv + 2 * sizes.width)
    backward += apart * 6 * up + one * (4 * up + 2 * hidden)
    return forward * sizes.tokens, backward * sizes.tokens


def _block_bytes(config: Config, sizes: Sizes) -> tuple[float, float]:
    """Read and written by the kernels between products, forward and backward, compiled.

    Plain layers, whose products also add to the stream and apply GELU (kernels/linear):
        forward   norms 2 d each, rotation 2 each, other activations up + hidden
        backward  activation hidden + 2 up, norms 5 d each (made once more), rotation 2 each
    Others:
        forward   norm 2 d, rotation 2 each, sum and norm 4 d, activation up + hidden, sum 3 d
        backward  activation hidden + 2 up, norms 4 d each, rotation 2 each
    and where context ranks exchange them q, k and v are put together from their gradients.
    Activations that fp8 casts make: _cast_bytes.
    """
    mlp, plain = config.model.mlp, is_plain(config, sizes)
    stream, turned = sizes.width / sizes.tensor, 2 * sum(rotated(config, sizes).values())
    fused = sizes.q + 2 * sizes.kv if sizes.context > 1 else 0
    square = sizes.hidden if mlp is Mlp.relu2 else 0
    apart = 1 - fp8_mlps(config, sizes)
    active = 0.0 if plain and mlp is Mlp.gelu else apart * (sizes.up + sizes.hidden + square)
    forward = (4 if plain else 9) * stream + turned + active
    backward = (10 if plain else 8) * stream + turned + 2 * fused
    backward += apart * (sizes.hidden + 2 * sizes.up)
    both = sizes.tokens * sizes.itemsize
    return forward * both, backward * both
