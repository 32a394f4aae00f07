"""Initial weights as a pure function of (seed, parameter name, flat index in the whole tensor).

A stateful generator would tie the weights to the order of calls and to the layout of GPUs. Here
every number is made on its own from a counter, so that a shard makes exactly its part of the whole,
on any rank, device and layout, and a 70B model never exists in one place.

Value pair (2i, 2i + 1) of a tensor: splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) of
key + i, its two 32-bit halves as uniform numbers, Box-Muller. Integers are exact everywhere; log,
cos and sin differ by a rounding between CPU and GPU.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from flashtrain.config import ModelConfig
from flashtrain.model.gpt import GPT
from flashtrain.model.parametrization import initial_std
from flashtrain.model.shard import held, shard_of

STEP = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment, as a signed number
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64
# Pairs made at a time. CPU: temporaries stay in the cache, 95 M values/s on one core. GPU: about 30
# launches serve 16 M values, 12 G values/s on an H100.
BLOCK = {"cpu": 2**14, "cuda": 2**23}
LANES = 1024  # blocks are a multiple of it, so of every vector width: no scalar tail rounds apart


def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter in place; see `init_parameters`."""
    init_parameters(dict(model.named_parameters()), model.config, seed)


@torch.no_grad()
def init_parameters(parameters: Mapping[str, nn.Parameter], model: ModelConfig, seed: int) -> None:
    """Fill parameters in place by name, GPT-2's way (Radford et al. 2019, section 2.3).

    Matrices and tables normal(0, `initial_std`); norms one, biases zero.
    """
    for name, parameter in parameters.items():
        module = name.rpartition(".")[0]
        if name.endswith("bias"):
            held(parameter).zero_()
        elif "norm" in module.rpartition(".")[2]:
            held(parameter).fill_(1.0)
        else:
            fill_normal(parameter, seed, name, initial_std(name, model))


@torch.no_grad()
def fill_normal(parameter: nn.Parameter, seed: int, name: str, std: float) -> None:
    """Write this shard's part of the whole tensor `name`, normal(0, std)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    shard, memory = shard_of(parameter), held(parameter)
    with _one_thread():
        for box in shard.boxes:
            target = box.view(memory)
            values = target.contiguous()
            _fill(values.view(-1), key, std, *_runs(shard.shape, box.start, box.shape))
            if values.data_ptr() != target.data_ptr():
                target.copy_(values)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch would share log, cos and sin of every small block between threads.

    That costs a barrier per operation (20 x slower on two busy cores), and cuts blocks at places
    that depend on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _runs(
    shape: tuple[int, ...], start: tuple[int, ...], part: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """A box as runs of consecutive values of the whole: (outer, run, stride, offset).

    `outer` runs of `run` values whose beginnings are `stride` apart, the first at `offset`. One dim
    at most may be cut behind another one of more than one row, which matrices cannot break.
    """
    inner = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    offset = sum(at * step for at, step in zip(start, inner, strict=True))
    cut = [dim for dim, (size, own) in enumerate(zip(shape, part, strict=True)) if own != size]
    if not cut:
        return 1, math.prod(shape), 0, offset
    last = cut[-1]
    outer = math.prod(part[:last])
    if outer > 1 and any(part[dim] != shape[dim] for dim in range(1, last)):
        raise ValueError(f"the box {part} of {shape} is not runs of one distance")
    return outer, part[last] * inner[last], shape[last] * inner[last], offset


def _fill(
    target: Tensor, key: int, std: float, outer: int, run: int, stride: int, offset: int
) -> None:
    """`target` [outer x run]: the runs of `_runs`, one after the other."""
    # where runs begin and end on whole pairs, one hash serves two values
    paired = offset % 2 == 0 and (outer == 1 or (run % 2 == 0 and stride % 2 == 0))
    step = 2 if paired else 1
    block = BLOCK.get(target.device.type, BLOCK["cpu"]) * step
    for first in range(0, target.numel(), block):
        count = min(block, target.numel() - first)
        rounded = -(-count // (LANES * step)) * LANES * step
        index = torch.arange(first, first + rounded, step, device=target.device)
        if outer > 1:
            index = (index // run).mul_(stride - run).add_(index)
        index += offset
        pairs = normal_pairs(index >> 1, key)
        values = pairs.flatten() if paired else pairs.gather(1, (index & 1)[:, None]).flatten()
        torch.mul(values[:count], std, out=target[first : first + count])


def normal_pairs(index: Tensor, key: int) -> Tensor:
    """`index [n] int64 -> [n, 2]` fp32, two independent standard normal numbers for each."""
    state = index.mul(STEP).add_(key)
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        state = _xor_shifted(state, shift).mul_(factor)
    state = _xor_shifted(state, 31)
    halves = state.view(torch.int32).view(-1, 2)  # signed, uniform
    # |half| / 2^31 is uniform on (0, 1]; below 2^-32 would be log(0). Largest normal: 6.7
    share = halves[:, 0].float().abs_().clamp_(min=0.5).mul_(2.0**-31)
    radius = share.log_().mul_(-2.0).sqrt_()
    angle = halves[:, 1].float().mul_(math.pi * 2.0**-31)
    return torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), dim=1)


def _xor_shifted(state: Tensor, shift: int) -> Tensor:
    """`state ^ (state >> shift)` in place, the shift filling with zeros as unsigned ones do."""
    return state.bitwise_xor_((state >> shift).bitwise_and_((1 << (64 - shift)) - 1))
