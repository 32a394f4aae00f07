"""Memory of one GPU, part by part, at the fullest moment of a step.

Weights are fp32 masters with fp32 gradients and two fp32 moments. Three moments may be the fullest,
and the largest is what `torch.cuda.max_memory_allocated` shows:

    loss       all blocks' activations, one chunk of logits, the gradients of head and hidden
    backward   the same activations, one block's temporaries, the head's gradient
    step       no activations, all gradients

Gradients stand from the start only where they outlive a micro-batch: with several of them, or as
DDP's buckets.
"""

from dataclasses import dataclass

from flashtrain.config import Config, ContextKind, PipelineSchedule, Recompute
from flashtrain.planning.activations import everything, kept
from flashtrain.planning.sizes import Sizes, moment_bytes, sizes_of
from kernels.linear_cross_entropy.tiles import chunk_tokens

# CUDA's context, its libraries' workspaces and NCCL's buffers, none of which PyTorch's allocator
# counts: an assumption, not a measurement
FRAMEWORK = 1.5e9
USABLE = 0.95  # share of the GPU that a plan may fill; what is left is for fragmentation. Likewise


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


def predict_memory(config: Config, *, compiled: bool = True, plain: bool | None = None) -> Memory:
    """Of the fullest rank; `config` is resolved. compiled, plain: as in activations.py. ValueError
    for what is not predicted."""
    sizes = sizes_of(config)
    weights, optimizer = 4 * sizes.held, moment_bytes(config, sizes)
    gradients = 4 * sizes.held
    lasting = _lasting_gradients(config, sizes)
    block = kept(config, sizes, compiled=compiled, plain=plain)
    activations = in_flight(config, sizes) * sizes.layers * block
    activations += sizes.tokens / sizes.tensor * sizes.width * sizes.itemsize  # the last norm's
    loss, after = _loss(config, sizes)
    gathered, gathering = _sharded(config, sizes)
    temporary = _backward(config, sizes, compiled) + gathering
    moments = (
        Memory(weights, lasting, optimizer, activations, loss, gathered),
        Memory(weights, lasting, optimizer, activations, after, gathered + temporary),
        Memory(weights, max(gradients, lasting), optimizer, 0.0, 0.0, 0.0),
    )
    return max(moments, key=lambda memory: memory.total)


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


def _backward(config: Config, sizes: Sizes, compiled: bool) -> float:
    """Temporaries of the block whose backward runs: gradients of the stream, of both sides of the
    activation, and of its largest weight; what recomputation makes again. Or, later in the block,
    keys and values of all context ranks and their gradients instead of the activation's."""
    item = sizes.itemsize
    wide = sizes.hidden + sizes.up
    if sizes.context > 1 and config.parallel.context_kind is ContextKind.gather:
        wide = max(wide, 4 * sizes.kv * sizes.context)
    numbers = sizes.tokens * (2 * sizes.width + wide)
    weight = sizes.width * sizes.up * (item + 4.0) if sizes.shard == 1 else 0.0
    again = 0.0
    if config.trainer.recompute is not Recompute.none:
        again = everything(config, sizes, compiled=compiled) - kept(config, sizes)
    return numbers * item + weight + again
