"""Every layout of a config on a number of GPUs, those that fit first the fastest.

What may be combined is not decided here: each candidate goes through `compose.resolve`, the same
door as a run.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashtrain.compose import resolve
from flashtrain.config import Config, ConfigError, Recompute, TrainerConfig
from flashtrain.planning.activations import is_plain
from flashtrain.planning.gpus import Cluster
from flashtrain.planning.memory import USABLE, Memory, host_bytes, predict_memory
from flashtrain.planning.sizes import sizes_of
from flashtrain.planning.time import Step, predict_step, tokens_per_second

LONG = 32768  # tokens of a sequence from which on it is worth cutting over context ranks
DEEPEST = 16  # pipeline ranks that are tried
LARGEST = 64  # sequences of a micro-batch that are tried
STEP = 8192  # tokens by which `longest` grows a sequence
LEAST = 4096  # tokens of a sequence that a context rank holds at least


@dataclass(frozen=True)
class Plan:
    """One layout with what is expected of it; `config` is resolved."""

    config: Config
    gpus: int
    memory: Memory
    step: Step

    @property
    def tokens_per_second(self) -> float:
        return tokens_per_second(self.config, self.step)


@dataclass(frozen=True)
class Degrees:
    """What a layout decides; None is free, a number is what the user named."""

    pipeline: int | None = None
    tensor: int | None = None
    context: int | None = None
    shard: int | None = None
    replicate: int | None = None
    zero: int | None = None
    recompute: Recompute | None = None
    micro_batch_size: int | None = None


def predict(config: Config, gpus: int, cluster: Cluster) -> Plan:
    """Of a config that is resolved for `gpus` ranks; ValueError for what is not predicted."""
    return Plan(config, gpus, predict_memory(config), predict_step(config, cluster))


def search(
    config: Config, gpus: int, cluster: Cluster, named: Degrees | None = None
) -> tuple[list[Plan], Plan | None]:
    """All layouts that fit, the fastest first; and of those that do not the smallest, if none does.

    config: of any number of ranks; what `named` leaves None is searched.
    ValueError for a config that is not predicted, and when no layout can run at all.
    """
    fitting, others = _all(config, gpus, cluster, named or Degrees())
    allowed = [plan for plan in fitting if _refusal(plan.config, gpus) is None]
    if allowed:
        return allowed, None
    for candidate in others:
        if _refusal(candidate, gpus) is None:
            return [], predict(candidate, gpus, cluster)
    tried = [*(plan.config for plan in fitting), *others]
    example = f": for example, {_refusal(tried[0], gpus)}" if tried else ""
    raise ConfigError(
        f"data.batch_size={config.data.batch_size}, model.n_heads={config.model.n_heads} and "
        f"model.n_layers={config.model.n_layers} leave no layout for {gpus} GPUs{example}"
    )


def best(config: Config, gpus: int, cluster: Cluster, named: Degrees | None = None) -> Plan | None:
    """The fastest that fits."""
    fitting, _ = _all(config, gpus, cluster, named or Degrees())
    return next((plan for plan in fitting if _refusal(plan.config, gpus) is None), None)


def longest(
    config: Config, gpus: int, cluster: Cluster, named: Degrees | None = None
) -> Plan | None:
    """The longest sequence of which a layout fits, in steps of STEP tokens, in its fastest one.

    None: not even one step fits.
    """

    def at(steps: int) -> Plan | None:
        data = dataclasses.replace(config.data, sequence_length=steps * STEP)
        return best(dataclasses.replace(config, data=data), gpus, cluster, named)

    low, high, found = 0, 1, None
    while (plan := at(high)) is not None:
        low, high, found = high, 2 * high, plan
    while high - low > 1:
        middle = (low + high) // 2
        if (plan := at(middle)) is None:
            high = middle
        else:
            low, found = middle, plan
    return found


def _all(
    config: Config, gpus: int, cluster: Cluster, named: Degrees
) -> tuple[list[Plan], list[Config]]:
    """Those that fit by their time, and the others by their memory; the door not asked yet."""
    alone = dataclasses.replace(
        config.parallel, pipeline=1, tensor=1, context=1, shard=1, replicate=1
    )
    one = dataclasses.replace(config.data, micro_batch_size=1)
    config = resolve(dataclasses.replace(config, parallel=alone, data=one), 1)
    fitting: list[Plan] = []
    others: list[tuple[float, Config]] = []
    for candidate in _candidates(config, gpus, cluster, named):
        memory = predict_memory(candidate)
        host = min(gpus, cluster.node) * host_bytes(candidate)
        if memory.total <= USABLE * cluster.gpu.memory and host <= USABLE * cluster.ram:
            fitting.append(Plan(candidate, gpus, memory, predict_step(candidate, cluster)))
        else:
            others.append((memory.total, candidate))
    fitting.sort(key=lambda plan: plan.step.total)
    return fitting, [candidate for _, candidate in sorted(others, key=lambda pair: pair[0])]


def _refusal(config: Config, gpus: int) -> ConfigError | None:
    """Why a run would not start."""
    try:
        resolve(config, gpus)
    except ConfigError as error:
        return error
    return None


def _candidates(config: Config, gpus: int, cluster: Cluster, named: Degrees) -> Iterator[Config]:
    model, length = config.model, config.data.sequence_length
    widest = _divisors(gpus, min(cluster.node, model.n_heads))
    tensors = _choices(named.tensor, [t for t in widest if model.n_heads % t == 0])
    deepest = min(DEEPEST, model.n_layers)
    pipelines = _choices(
        named.pipeline, [p for p in _divisors(gpus, deepest) if model.n_layers % p == 0]
    )
    scarce = 4 * gpus > config.data.batch_size  # few sequences for so many GPUs
    longest = length // LEAST if length >= LONG or scarce else 1
    contexts = _choices(named.context, _divisors(gpus, longest))
    for pipeline, tensor, context in itertools.product(pipelines, tensors, contexts):
        if gpus % (pipeline * tensor * context):
            continue
        ranks = gpus // (pipeline * tensor * context)
        if ranks > config.data.batch_size:
            continue
        for shard in _choices(named.shard, _divisors(ranks, ranks)):
            replicate = ranks // shard
            if ranks % shard or (named.replicate is not None and named.replicate != replicate):
                continue
            cuts = shard > 1 or (context > 1 and config.parallel.shard_context)
            for zero in _choices(named.zero, (1, 2, 3) if cuts else (3,)):
                parallel = dataclasses.replace(
                    config.parallel,
                    pipeline=pipeline, tensor=tensor, context=context, shard=shard,
                    replicate=replicate, zero=zero,
                )  # fmt: skip
                # as many held-out sequences as the ranks divide
                held_out = -(-config.trainer.evaluate_sequences // ranks) * ranks
                trainer = dataclasses.replace(config.trainer, evaluate_sequences=held_out)
                laid_out = dataclasses.replace(config, parallel=parallel, trainer=trainer)
                yield from _passes(laid_out, ranks, named)


def _passes(config: Config, ranks: int, named: Degrees) -> Iterator[Config]:
    """How a step's samples are cut into micro-batches, and what of them is made again."""
    each, rest = divmod(config.data.batch_size, ranks)
    if rest:
        return
    for recompute in _choices(named.recompute, tuple(Recompute)):
        trainer = dataclasses.replace(config.trainer, recompute=recompute)
        laid_out = dataclasses.replace(config, trainer=trainer)
        saves = recompute is not Recompute.light or is_plain(laid_out, sizes_of(laid_out))
        if named.recompute is None and not saves:
            continue  # the same as none
        for size in _choices(named.micro_batch_size, _divisors(each, LARGEST)):
            data = dataclasses.replace(config.data, micro_batch_size=size)
            yield dataclasses.replace(laid_out, data=data)


def _choices(named: Any, free: Any) -> Any:
    return free if named is None else (named,)


def _divisors(of: int, limit: int) -> list[int]:
    return [n for n in range(1, max(1, min(of, limit)) + 1) if of % n == 0]


def layout_overrides(config: Config) -> list[str]:
    """The layout of a resolved config as key=value, for the command line of a run."""
    parallel, plain = config.parallel, "parallel=data"
    words: list[str] = [plain if parallel.shard == 1 else "parallel=fsdp"]
    conditions: tuple[tuple[str, Any, Callable[[], bool]], ...] = (
        ("parallel.pipeline", parallel.pipeline, lambda: parallel.pipeline > 1),
        ("parallel.tensor", parallel.tensor, lambda: parallel.tensor != 1),
        ("parallel.context", parallel.context, lambda: parallel.context > 1),
        ("parallel.shard", parallel.shard, lambda: parallel.shard != 1),
        ("parallel.replicate", parallel.replicate, lambda: parallel.shard != 1),
        ("parallel.zero", parallel.zero, lambda: parallel.shard != 1 or parallel.context > 1),
    )
    words += [f"{key}={value}" for key, value, shown in conditions if shown()]
    words.append(f"data.micro_batch_size={config.data.micro_batch_size}")
    if config.trainer.evaluate_sequences != TrainerConfig.evaluate_sequences:
        words.append(f"trainer.evaluate_sequences={config.trainer.evaluate_sequences}")
    if config.trainer.recompute is not Recompute.none:
        words.append(f"trainer.recompute={config.trainer.recompute.name}")
    return words
