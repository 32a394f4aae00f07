import math
import time

import pytest
import torch
from torch import Tensor, nn

from flashtrain.config import PositionConfig, PositionKind
from flashtrain.model.gpt import GPT
from flashtrain.model.init import fill_normal, init_weights, normal_pairs
from flashtrain.model.shard import Piece, Shard, Span
from tests.flashtrain.model.test_gpt import tiny

N = 1_000_000


def numbers(seed: int = 0, name: str = "a", shape: tuple[int, ...] = (N,)) -> Tensor:
    parameter = nn.Parameter(torch.full(shape, math.nan))
    fill_normal(parameter, seed, name, 1.0)
    return parameter.detach()


def shard(shape: tuple[int, ...], local: tuple[int, ...], *pieces: Piece) -> Tensor:
    parameter = nn.Parameter(torch.full(local, math.nan))
    parameter.shard = Shard(shape, pieces)  # type: ignore[attr-defined]
    fill_normal(parameter, 0, "a", 1.0)
    return parameter.detach()


@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_numbers_have_the_moments_and_tails_of_a_normal_distribution(seed: int) -> None:
    x = numbers(seed).double()
    noise = 1 / math.sqrt(N)  # bounds: 5 standard errors of each moment
    assert abs(x.mean()) < 5 * noise
    assert abs(x.var() - 1) < 5 * math.sqrt(2) * noise
    assert abs(x.pow(3).mean()) < 5 * math.sqrt(15) * noise
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96) * noise
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        beyond = math.erfc(bound / math.sqrt(2))
        spread = math.sqrt(beyond * (1 - beyond) / N)
        assert abs((x.abs() > bound).double().mean() - beyond) < 5 * spread
    assert x.abs().max() < 6.7


def test_neighbouring_numbers_names_and_seeds_are_independent() -> None:
    x = numbers().double()
    others = {f"{lag} places on": x.roll(lag) for lag in (1, 2, 3, 64, 1024)}
    others |= {f"seed {seed}": numbers(seed).double() for seed in (1, 2, 256)}
    others |= {name: numbers(name=name).double() for name in ("b", "a.weight", "0/a")}
    for what, y in others.items():
        for left, right in ((x, y), (x.square() - 1, y.square() - 1)):
            correlation = (left * right).mean() / (left.std() * right.std())
            assert abs(correlation) < 5 / math.sqrt(N), what


def test_numbers_repeat_and_no_two_names_share_one() -> None:
    assert torch.equal(numbers(), numbers())
    assert numbers().unique().numel() > 0.9 * N  # fp32 has few enough values to collide a little
    assert (numbers() == numbers(name="b")).double().mean() < 1e-4


@pytest.mark.parametrize("shape", [(64, 48), (63, 47), (64, 47), (7, 4097)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_holds_its_slice_of_the_whole_bit_for_bit(shape: tuple[int, ...], dim: int) -> None:
    whole = numbers(shape=shape)
    rows = shape[dim]
    for start, length in ((0, rows // 2), (rows // 2, rows - rows // 2), (3, 1), (1, rows - 1)):
        local = tuple(length if d == dim else size for d, size in enumerate(shape))
        part = shard(shape, local, Piece(dim, 0, start, length, True))
        assert torch.equal(part, whole.narrow(dim, start, length))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_of_several_pieces_holds_each_of_them(dim: int) -> None:
    """As a fused q, k, v projection split by heads: rows of three places of the whole."""
    whole = numbers(shape=(60, 60))
    pieces = [Piece(dim, 0, 10, 10, True), Piece(dim, 10, 35, 5, True), Piece(dim, 15, 50, 5, True)]
    part = shard((60, 60), (20, 60) if dim == 0 else (60, 20), *pieces)
    expected = [whole.narrow(dim, piece.start, piece.length) for piece in pieces]
    assert torch.equal(part, torch.cat(expected, dim))


@pytest.mark.parametrize(("first", "last"), [(0, 13), (13, 14), (13, 700), (701, 1891), (470, 517)])
def test_a_span_holds_its_values_of_the_shard(first: int, last: int) -> None:
    """As FSDP and ZeRO cut what tensor parallelism left: here rows 20 to 62, or columns 5 to 35."""
    whole = numbers(shape=(63, 47))
    for local, piece in (
        (whole[20:63], Piece(0, 0, 20, 43, True)),
        (whole[:, 5:35], Piece(1, 0, 5, 30, True)),
    ):
        parameter = nn.Parameter(torch.full((last - first,), math.nan))
        span = Span(tuple(local.shape), first, last - first)
        parameter.shard = Shard((63, 47), (piece,), span)  # type: ignore[attr-defined]
        if last <= local.numel():
            fill_normal(parameter, 0, "a", 1.0)
            assert torch.equal(parameter.detach(), local.flatten()[first:last])


def test_three_dims_and_tensors_above_one_block_shard_alike() -> None:
    whole = numbers(shape=(6, 50, 301))
    assert torch.equal(shard((6, 50, 301), (6, 20, 301), Piece(1, 0, 30, 20, True)), whole[:, 30:])
    large = numbers(shape=(300, 301))  # 90,300 values; a block holds 32,768
    assert torch.equal(shard((300, 301), (100, 301), Piece(0, 0, 199, 100, True)), large[199:299])
    assert torch.equal(shard((300, 301), (300, 50), Piece(1, 0, 51, 50, True)), large[:, 51:101])


def test_values_do_not_depend_on_the_number_of_threads() -> None:
    threads, made = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made.append(numbers(shape=(50, 1001)))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_values_do_not_depend_on_their_place_in_a_block() -> None:
    index = torch.arange(4096)
    together = normal_pairs(index, key=5)
    shuffled = torch.randperm(4096)
    assert torch.equal(normal_pairs(index[shuffled], key=5), together[shuffled])


def test_the_generator_is_splitmix64() -> None:
    """First output for state 0 is 0xE220A8397B1DCDAF (any published splitmix64 test vector)."""
    step = 0x9E3779B97F4A7C15 - 2**64
    low, high = 0x7B1DCDAF, 0xE220A839 - 2**32  # signed halves
    radius = math.sqrt(-2 * math.log(abs(low) / 2**31))
    angle = math.pi * high / 2**31
    pair = normal_pairs(torch.zeros(1, dtype=torch.int64), key=step)[0].tolist()
    assert pair == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-5)


def test_weights_start_as_in_gpt2() -> None:
    model = tiny(n_layers=8, d_model=64, vocabulary=512, bias=True, qk_norm=True, tied_head=False)
    gpt = GPT(model, PositionConfig(PositionKind.learned), max_length=64)
    init_weights(gpt, seed=0)
    seen = set()
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.2
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                expected /= 4  # sqrt(2 x 8)
            spread = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.detach().std()) / expected == pytest.approx(1, abs=spread), name
            seen.add(name.split(".")[-2])
    assert seen == {"embedding", "position", "qkv", "out", "up", "down", "head"}


def test_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        gpt = GPT(tiny(), PositionConfig(), max_length=16)
        init_weights(gpt, seed)
        return torch.cat([p.detach().flatten() for p in gpt.parameters() if p.dim() > 1])

    assert torch.equal(weights(7), weights(7))
    assert (weights(7) == weights(8)).double().mean() < 1e-3


def test_thirty_million_values_take_at_most_a_few_seconds() -> None:
    """0.35 s on one idle core of a 2024 server; the bound leaves room for busy machines."""
    numbers()
    began = time.process_time()
    numbers(shape=(3000, 10_000))
    assert time.process_time() - began < 2.0
