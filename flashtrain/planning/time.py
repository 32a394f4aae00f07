"""How long one step takes, and what it waits for.

A step is a sum of what runs on the GPU and of the communication that nothing hides:

    tensor     a gather before and a scatter after each half of a block, backward the other way
               round and the input once more. With `parallel.overlap` each is partly hidden by its
               product; without, only the backward's scatters, by products of weight gradients
    context    ulysses in the open; gather but for its first group of heads, and the ring's shifts,
               beside attention
    shard      FSDP's gathers and scatters beside the blocks; in the open: the first and the last,
               and what is longer than a block's computation
    replicate  sums of gradients beside the last backward; in the open: the embedding's, which is
               ready last, and what is longer than that backward
    pipeline   (p - 1) / (m + p - 1) of the steps of a pipeline with m micro-batches are waits
    offload    blocks' inputs to the host beside a block's forward pass and back beside its backward
               pass; in the open what is longer
    host       where a step is no CUDA graph: what launching all that takes longer than running it

What is hidden still costs INTERFERENCE of its time (rates.py).
"""

import dataclasses
from dataclasses import dataclass

from flashtrain.config import (
    Config,
    ContextKind,
    LinearKind,
    Packing,
    PipelineSchedule,
    PositionKind,
    Recompute,
)
from flashtrain.layout import head_groups, records
from flashtrain.planning.collectives import Group
from flashtrain.planning.compute import BlockWork, block_work, ends_work, optimizer_work
from flashtrain.planning.gpus import Cluster, Gpu
from flashtrain.planning.rates import (
    HIDDEN,
    HOST,
    INTERFERENCE,
    LAUNCH,
    LAUNCH_DDP,
    LAUNCH_FP8,
    LAUNCH_FSDP,
    LAUNCH_PIECE,
)
from flashtrain.planning.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by what they are spent on; the sum is the step."""

    products: float
    attention: float
    hbm: float  # norms, activations, casts, rows of the loss: bound by memory bandwidth
    recomputation: float
    optimizer: float
    tensor: float
    context: float
    shard: float
    replicate: float
    pipeline: float
    offload: float
    host: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))

    @property
    def bound(self) -> str:
        """What costs most beside the arithmetic that the model itself asks for."""
        extra = {name: part for name, part in vars(self).items() if name not in ARITHMETIC}
        name = max(extra, key=lambda part: extra[part])
        return name if extra[name] > 0.05 * self.total else "products"


ARITHMETIC = ("products", "attention")


@dataclass(frozen=True)
class _Axes:
    tensor: Group
    context: Group
    shard: Group
    replicate: Group
    pipeline: Group


def predict_step(config: Config, cluster: Cluster) -> Step:
    """`config` is resolved; ValueError for what is not predicted."""
    sizes = sizes_of(config)
    if sizes.tensor > cluster.node:  # other hosts' memory is out of reach (parallel/overlap.py)
        sizes = dataclasses.replace(sizes, overlap=False)
    axes = _axes(config, sizes, cluster)
    block, ends = block_work(config, sizes, cluster.gpu), ends_work(config, sizes, cluster.gpu)
    tensor = sizes.layers * _tensor(config, sizes, axes.tensor, block)
    tensor += _tensor_ends(sizes, axes.tensor)
    context = sizes.layers * _context(config, sizes, axes.context, block)
    m, layers = sizes.micro_batches, sizes.layers
    work = (block.forward + block.backward) * layers + ends
    again = block.again.total * layers
    offload = layers * _offload(config, sizes, cluster.gpu, block)
    passes = work.total + again + tensor + context + offload
    shard = _shard(config, sizes, axes.shard, block, passes)
    replicate = _replicate(config, sizes, axes.replicate, passes)
    optimizer = optimizer_work(config, sizes, cluster.gpu).total
    optimizer += _small_sums(axes)
    host = max(0.0, _launches(config, sizes) - (m * passes + shard + replicate + optimizer))
    pipeline = _pipeline(config, sizes, axes.pipeline, passes + host / m)
    return Step(
        products=m * work.products,
        attention=m * work.attention,
        hbm=m * work.hbm,
        recomputation=m * again,
        optimizer=optimizer,
        tensor=m * tensor,
        context=m * context,
        shard=shard,
        replicate=replicate,
        pipeline=pipeline,
        offload=m * offload,
        host=host,
    )


def tokens_per_second(config: Config, step: Step) -> float:
    """Over all GPUs together."""
    return config.data.batch_size * config.data.sequence_length / step.total


def _axes(config: Config, sizes: Sizes, cluster: Cluster) -> _Axes:
    """Who talks with whom, how far apart: tensor, context, shard, replicate, pipeline outwards."""
    parallel = config.parallel
    assert parallel.tensor is not None and parallel.shard is not None
    inner = parallel.tensor
    context = inner * parallel.context
    shard = context * parallel.shard
    # one of the two counts the context ranks (mesh.py), whose stride is the smaller then
    cuts = parallel.shard_context and parallel.context > 1
    copies = not parallel.shard_context and parallel.context > 1 and parallel.shard == 1
    return _Axes(
        tensor=Group(parallel.tensor, 1, cluster),
        context=Group(parallel.context, inner, cluster),
        shard=Group(sizes.shard, inner if cuts else context, cluster),
        replicate=Group(sizes.replicate, inner if copies else shard, cluster),
        pipeline=Group(parallel.pipeline, shard * (parallel.replicate or 1), cluster),
    )


def _tensor(config: Config, sizes: Sizes, group: Group, block: BlockWork) -> float:
    """Of one block and micro-batch, in the open."""
    if group.size == 1:
        return 0.0
    once = group.gather(sizes.tokens * sizes.width * sizes.itemsize)
    again = {Recompute.selective: 3, Recompute.full: 4}
    forward = (4 + again.get(config.trainer.recompute, 0)) * once
    if sizes.overlap:
        return (1 - HIDDEN) * (forward + 6 * once)
    # the compiler keeps the gathered input
    return forward + 2 * once + _hide(2 * once, block.weight_gradient)


def _tensor_ends(sizes: Sizes, group: Group) -> float:
    """The embedding's scatter and the head's gather, and both again in the backward pass."""
    return 4 * group.gather(sizes.tokens * sizes.width * sizes.itemsize)


def _context(config: Config, sizes: Sizes, group: Group, block: BlockWork) -> float:
    """Of one block and micro-batch, in the open."""
    if group.size == 1:
        return 0.0
    item, kv = sizes.itemsize, 2.0 * sizes.kv * sizes.tokens
    passes = 2 if config.trainer.recompute is Recompute.full else 1  # of the forward kind
    steps, part = group.size - 1, 1 / group.size
    around = steps * _hide(group.send(kv * item), block.forward.attention * part)
    match config.parallel.context_kind:
        case ContextKind.gather:
            whole = kv * item * group.size
            gather, scatter = group.gather(whole), group.scatter(whole)
            first = _first_group(config, sizes)

            def beside(transfer: float, attention: float) -> float:
                return first * transfer + (1 - first) * _hide(transfer, attention)

            # parallel/gathered.py: forward is the ring's where causality is the only mask
            apart = config.data.packing is not Packing.none
            plain = config.position.kind is not PositionKind.alibi and not apart
            forward = around if plain else beside(gather, block.forward.attention)
            return passes * forward + beside(gather + scatter, block.backward.attention)
        case ContextKind.ulysses:
            there, back = (kv + sizes.q * sizes.tokens) * item, sizes.q * sizes.tokens * item
            return (passes + 1) * (group.exchange(there) + group.exchange(back))
        case _:
            # fp32 sums of their gradients travel along
            backward = _hide(group.send(kv * (item + 4)), block.backward.attention * part)
            return passes * around + steps * backward


def _offload(config: Config, sizes: Sizes, gpu: Gpu, block: BlockWork) -> float:
    """Of one block and micro-batch, in the open; copy engines take nothing from the rest."""
    if not config.trainer.offload_activations:
        return 0.0
    copy = sizes.tokens / sizes.tensor * sizes.width * sizes.itemsize / (HOST * gpu.host)
    back = block.again.total + block.backward.total
    return max(0.0, copy - block.forward.total) + max(0.0, copy - back)


def _first_group(config: Config, sizes: Sizes) -> float:
    """The share of the heads whose keys and values travel in the open (parallel/gathered.py)."""
    size = config.model.head_size
    assert size is not None
    groups = head_groups(1, sizes.tokens // 2, sizes.q // size, sizes.kv // size)
    kv_heads: int = groups[0][1].stop
    return kv_heads * size / sizes.kv


def _shard(config: Config, sizes: Sizes, group: Group, block: BlockWork, passes: float) -> float:
    """Of a whole step, in the open."""
    if group.size == 1:
        return 0.0
    zero, m = config.parallel.zero, sizes.micro_batches
    gather = group.gather(sizes.itemsize * sizes.block_matrices)
    scatter = group.scatter(4.0 * sizes.block_matrices)
    gathers = 2 * m if zero == 3 else 1  # a block and step
    scatters = 1 if zero == 1 else m
    # per micro-batch on average, held against the block's share of a pass
    talk = (gathers * gather + scatters * scatter) / m
    beside = sizes.layers * m * _hide(talk, passes / sizes.layers)
    first = (m if zero == 3 else 1) * group.gather(sizes.itemsize * sizes.ends)
    return beside + first + scatters * group.scatter(4.0 * sizes.ends) + gather + scatter


def _replicate(config: Config, sizes: Sizes, group: Group, passes: float) -> float:
    """Of a whole step, in the open: DDP's buckets, or the sums of FSDP's parts."""
    if group.size == 1:
        return 0.0
    held = 4.0 * sizes.held
    last = 4.0 * sizes.words * sizes.width / sizes.shard
    bucket = config.engine.bucket_mb * 2**20 if sizes.shard == 1 else held / sizes.layers
    pieces = max(1.0, (held - last) / bucket)
    beside = pieces * group.sum(min(bucket, held - last))
    backward = 2 / 3 * passes
    return _hide(beside, backward) + group.sum(last)


def _pipeline(config: Config, sizes: Sizes, group: Group, passes: float) -> float:
    """Waits of a step, and what the stages send each other."""
    if group.size == 1:
        return 0.0
    p, m = sizes.pipeline, sizes.micro_batches
    interleaved = config.parallel.pipeline_schedule is PipelineSchedule["interleaved"]
    runs = (config.parallel.stages_per_rank or 2) if interleaved else 1
    waits = (p - 1) * passes / runs  # Narayanan et al. 2021, arXiv:2104.04473, section 2.2
    each = sizes.tokens / sizes.tensor * sizes.width * sizes.itemsize
    return waits + 2 * m * runs * group.send(each)


def _launches(config: Config, sizes: Sizes) -> float:
    """Of a whole step, launched kernel by kernel."""
    if records(config):
        return 0.0
    block = LAUNCH
    if sizes.shard > 1:
        block += LAUNCH_FSDP
    elif sizes.replicate > 1:
        block += LAUNCH_DDP
    if sizes.tensor > 1 and config.precision.linear is not LinearKind.compute:
        block += LAUNCH_FP8
    if sizes.overlap:
        block += LAUNCH_PIECE * sizes.tensor
    return sizes.micro_batches * sizes.layers * block


def _small_sums(axes: _Axes) -> float:
    """The gradient norm over each axis, partial gradients over tensor ranks, valid tokens, loss."""
    groups = (axes.tensor, axes.shard, axes.pipeline)
    return sum(group.sum(4) for group in groups) + axes.tensor.sum(4) + 2 * axes.replicate.sum(8)


def _hide(communication: float, computation: float) -> float:
    """What of a communication beside a computation is still seen."""
    hidden = min(communication, computation)
    return communication - hidden + INTERFERENCE * hidden
