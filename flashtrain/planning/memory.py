"""Memory of one GPU, part by part, at the fullest moment of a step.

Weights are fp32 masters with fp32 gradients and two fp32 moments. One of four points of a step is
the fullest, and that is what `torch.cuda.max_memory_allocated` shows:

    loss    all blocks' activations, one chunk of logits, the gradients of head and hidden
    last    the last block's backward: the same activations, its temporaries, the head's gradient
    first   the first block's: its activations and temporaries, all gradients
    step    no activations, all gradients

Gradients stand from the start only where they outlive a micro-batch: with several of them, or as
DDP's buckets.
"""

from dataclasses import dataclass

from flashtrain.config import Config, ContextKind, PipelineSchedule, Recompute
from flashtrain.planning.activations import attention_half, is_plain, kept, mlp_half, mlp_matrices
from flashtrain.planning.sizes import Sizes, moment_bytes, sizes_of
from kernels.linear_cross_entropy.tiles import chunk_tokens

# CUDA's context, its libraries' workspaces and NCCL's buffers, none of which PyTorch's allocator
# counts: an assumption, not a measurement
FRAMEWORK = 1.5e9
# share of a GPU, or of a host, that a plan may fill; what is left is for fragmentation. Likewise
USABLE = 0.95


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float  # logits of a chunk, gradients of head and hidden states
    buffers: float  # gathered weights, buckets, temporaries of one block's backward
    framework: float = FRAMEWORK

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator would report as its peak."""
        return self.total - self.framework

    @property
    def total(self) -> float:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.loss
            + self.buffers + self.framework
        )  # fmt: skip


def predict_memory(config: Config, *, compiled: bool = True) -> Memory:
    """Of the fullest rank; `config` is resolved. compiled: as in activations.py. ValueError for
    what is not predicted."""
    sizes = sizes_of(config)
    weights, optimizer = 4 * sizes.held, moment_bytes(config, sizes)
    gradients = 4 * sizes.held
    lasting = _lasting_gradients(config, sizes)
    block = kept(config, sizes, compiled=compiled)
    stream = _stream(sizes)
    # and the last norm's
    activations = in_flight(config, sizes) * sizes.layers * block + stream
    if config.trainer.offload_activations:
        activations = (min(config.trainer.offload_keep + 1, sizes.layers) + 1) * stream
    loss, after = _loss(config, sizes)
    gathered, gathering = _sharded(config, sizes)
    temporary = gathering + max(
        _mlp_backward(config, sizes, compiled), _attention_backward(config, sizes, compiled)
    )
    all_gradients = max(gradients, lasting)
    points = (
        Memory(weights, lasting, optimizer, activations, loss, gathered),
        Memory(weights, lasting, optimizer, activations, after, gathered + temporary),
        Memory(weights, all_gradients, optimizer, block, 0.0, gathered + temporary),
        Memory(weights, all_gradients, optimizer, 0.0, 0.0, 0.0),
    )
    return max(points, key=lambda memory: memory.total)


def host_bytes(config: Config) -> float:
    """Pinned memory of the host that one rank's offloaded activations take: inputs of all blocks
    but the last ones. The last norm's stays on the GPU, where its kernel keeps it as [tokens,
    width]."""
    if not config.trainer.offload_activations:
        return 0.0
    sizes = sizes_of(config)
    return max(sizes.layers - config.trainer.offload_keep, 0) * _stream(sizes)


def _stream(sizes: Sizes) -> float:
    """A block's input."""
    return sizes.tokens / sizes.tensor * sizes.width * sizes.itemsize


def in_flight(config: Config, sizes: Sizes) -> float:
    """Micro-batches whose activations the first pipeline rank holds at a time."""
    if sizes.pipeline == 1:
        return 1
    full = min(sizes.pipeline, sizes.micro_batches)
    if config.parallel.pipeline_schedule is PipelineSchedule["interleaved"]:
        # Narayanan et al. 2021, arXiv:2104.04473, section 2.2, with v runs of layers on a rank
        runs = config.parallel.stages_per_rank or 2
        return min(full * (1 + (sizes.pipeline - 1) / (sizes.pipeline * runs)), sizes.micro_batches)
    return full


def _lasting_gradients(config: Config, sizes: Sizes) -> float:
    """Gradients that already stand when the fullest backward pass begins."""
    if sizes.shard == 1:
        again = sizes.micro_batches > 1 or sizes.replicate > 1  # accumulated, or DDP's buckets
        return 4.0 * sizes.held if again else 0.0
    if sizes.micro_batches == 1:
        return 0.0
    return 4.0 * (sizes.whole if config.parallel.zero == 1 else sizes.held)


def _loss(config: Config, sizes: Sizes) -> tuple[float, float]:
    """While the loss is computed, and what is left of it when the last block's backward runs.

    With a pipeline the rank that computes it holds fewer activations than the first: not counted.
    """
    if sizes.pipeline > 1:
        return 0.0, 0.0
    head = sizes.words * sizes.width
    hidden = sizes.tokens * sizes.width * sizes.itemsize
    whole = hidden if sizes.tensor > 1 else 0  # gathered for the head's product
    cast = sizes.itemsize * head if sizes.itemsize == 2 and sizes.shard == 1 else 0
    if not config.loss.fused:
        logits = sizes.tokens * sizes.words * sizes.itemsize
        return whole + cast + 2.0 * logits, hidden + 4.0 * head
    logits = chunk_tokens(sizes.tokens) * sizes.words * sizes.itemsize
    gradients = hidden + 4.0 * head
    return whole + cast + logits + gradients, gradients


def _sharded(config: Config, sizes: Sizes) -> tuple[float, float]:
    """FSDP's buffers: gathered weights that stay, and what one block's backward adds.

    The group of the head is gathered throughout; of blocks two, the one at work and the next, in
    the buffer of the collective and once more as parameters. Gradients of a block stand in the
    compute dtype and as the fp32 input of a reduce-scatter, of which two may be under way.
    """
    if sizes.shard == 1:
        return 0.0, 0.0
    item, block = sizes.itemsize, sizes.block_matrices
    stays = item * sizes.words * sizes.width
    if config.parallel.zero < 3:
        stays += item * sizes.layers * block
    return stays, 2.0 * block * (item + item) + block * (item + 2 * 4.0)


def _mlp_backward(config: Config, sizes: Sizes, compiled: bool) -> float:
    """Temporaries of the MLP whose backward runs: gradients of the stream, of both sides of the
    activation, and of its largest weight; what recomputation makes again. In chunks all of it but
    the stream is of one part, and the sums of the parts' weight gradients stand beside."""
    item, chunks = sizes.itemsize, config.trainer.mlp_chunks
    plain = is_plain(config, sizes)
    numbers = sizes.tokens * (2 * sizes.width + (sizes.hidden + sizes.up) / chunks)
    weight = sizes.width * sizes.up * (item + 4.0) if sizes.shard == 1 else 0.0
    again = attention_half(config, sizes, compiled=compiled, views=True, plain=plain)
    again += mlp_half(config, sizes, compiled=compiled, plain=plain, chunks=chunks)
    if chunks > 1:
        again += _stream(sizes)
        numbers += sizes.tokens * sizes.width  # parts of the stream's gradient, put together
        weight += (4.0 if sizes.shard == 1 else item) * mlp_matrices(sizes)
    return numbers * item + weight + again - kept(config, sizes, compiled=compiled)


def _attention_backward(config: Config, sizes: Sizes, compiled: bool) -> float:
    """And later, of its attention: gradients of the stream, of attention's result and of q, k and
    v, with dq in fp32 on the way; what context ranks hold of each other beside; what recomputation
    made again of this half. Within 3 % of the peaks that scripts/bench_context.py saw of attention
    alone: 262,144 tokens, 16 heads of 128, one and two H200 (2026-11-27)."""
    item, q, kv = sizes.itemsize, sizes.q, sizes.kv
    bytes_ = (2.0 * sizes.width + 2 * q + 2 * kv) * item + 4 * q
    if sizes.context > 1:
        match config.parallel.context_kind:
            case ContextKind.gather:  # half of the heads at a time
                bytes_ += 4 * kv * sizes.context * item - 2 * q
            case ContextKind.ring:  # the sum of dq, keys and values of two ranks, and fp32 sums
                bytes_ += 4 * q + 4 * kv * item + 4 * kv * 4
            case ContextKind.ulysses:  # the gradient of attention's result, sent over
                bytes_ += q * item
    again = 0.0
    if config.trainer.recompute in (Recompute.selective, Recompute.full):
        plain = is_plain(config, sizes)
        again = attention_half(config, sizes, compiled=compiled, views=True, plain=plain)
        again = max(0.0, again - kept(config, sizes, compiled=compiled))
    return sizes.tokens * bytes_ + again
