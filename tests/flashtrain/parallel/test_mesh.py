from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashtrain.parallel.mesh import SINGLE, build_mesh
from tests.harness import run_ranks


def test_one_process_needs_no_groups() -> None:
    mesh = build_mesh(tensor=1)
    assert (mesh.world_size, mesh.rank, mesh.tensor, mesh.data) == (1, 0, SINGLE, SINGLE)


@pytest.mark.parametrize("tensor", [0, 2])
def test_a_degree_that_does_not_divide_names_both_numbers(tensor: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.tensor={tensor} .* the 1 processes"):
        build_mesh(tensor)


def test_an_axis_of_one_has_no_group_name() -> None:
    with pytest.raises(ValueError, match="no process group"):
        _ = SINGLE.name


def test_tensor_ranks_are_neighbours(tmp_path: Path) -> None:
    run_ranks(check_tensor_ranks_are_neighbours, 4, tmp_path)


def check_tensor_ranks_are_neighbours() -> None:
    rank = dist.get_rank()
    mesh = build_mesh(tensor=2)
    assert (mesh.world_size, mesh.rank) == (4, rank)
    assert (mesh.tensor.size, mesh.tensor.rank) == (2, rank % 2)
    assert (mesh.data.size, mesh.data.rank) == (2, rank // 2)
    for axis, members in (
        (mesh.tensor, {rank // 2 * 2, rank // 2 * 2 + 1}),
        (mesh.data, {rank % 2, rank % 2 + 2}),
    ):
        seen = torch.zeros(4)
        seen[rank] = 1
        dist.all_reduce(seen, group=axis.group)
        assert set(seen.nonzero().flatten().tolist()) == members

    whole = build_mesh(tensor=4)
    assert (whole.tensor.size, whole.tensor.rank, whole.data) == (4, rank, SINGLE)
    assert build_mesh(tensor=1).data.size == 4
    with pytest.raises(ValueError, match=r"parallel.tensor=3 .* the 4 processes"):
        build_mesh(tensor=3)


def test_a_shard_axis_lies_between_tensor_and_replicate(tmp_path: Path) -> None:
    run_ranks(check_a_shard_axis, 8, tmp_path)


def check_a_shard_axis() -> None:
    rank = dist.get_rank()
    mesh = build_mesh(tensor=2, shard=2)
    for axis, place, members in (
        (mesh.tensor, rank % 2, {rank // 2 * 2, rank // 2 * 2 + 1}),
        (mesh.shard, rank // 2 % 2, {rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2}),
        (mesh.replicate, rank // 4, {rank % 4, rank % 4 + 4}),
        (mesh.data, rank // 2, {rank % 2 + 2 * i for i in range(4)}),
    ):
        assert axis.rank == place
        seen = torch.zeros(8)
        seen[rank] = 1
        dist.all_reduce(seen, group=axis.group)
        assert set(seen.nonzero().flatten().tolist()) == members
    whole = build_mesh(tensor=1, shard=8)
    assert whole.shard == whole.data
    assert whole.replicate == SINGLE
    message = r"parallel.tensor=2 x parallel.shard=3 = 6 must .* the 8 processes"
    with pytest.raises(ValueError, match=message):
        build_mesh(tensor=2, shard=3)


def test_context_ranks_lie_between_tensor_and_shard(tmp_path: Path) -> None:
    run_ranks(check_a_context_axis, 8, tmp_path)


def check_a_context_axis() -> None:
    rank = dist.get_rank()
    mesh = build_mesh(tensor=2, context=2)
    pair, place = rank // 4 * 4 + rank % 2, rank % 2
    tokens = {place + 2 * i for i in range(4)}
    for axis, where, members in (
        (mesh.tensor, rank % 2, {rank // 2 * 2, rank // 2 * 2 + 1}),
        (mesh.context, rank // 2 % 2, {pair, pair + 2}),
        (mesh.data, rank // 4, {rank % 4, rank % 4 + 4}),
        (mesh.tokens, rank // 2, tokens),
        (mesh.shard, rank // 2 % 2, {pair, pair + 2}),
        (mesh.replicate, rank // 4, {rank % 4, rank % 4 + 4}),
    ):
        assert axis.rank == where
        assert set(dist.get_process_group_ranks(axis.group)) == members
    copied = build_mesh(tensor=2, context=2, shard_context=False)
    assert copied.shard == SINGLE
    assert copied.replicate == copied.tokens
    both = build_mesh(tensor=1, shard=2, context=2, shard_context=False)
    assert (both.shard.size, both.replicate.size, both.data.size) == (2, 4, 4)
    assert (both.shard.rank, both.replicate.rank) == (rank // 2 % 2, rank // 4 * 2 + rank % 2)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 x parallel.context=3 = 6 must .* 8"):
        build_mesh(tensor=2, context=3)


def test_pipeline_ranks_are_the_furthest_apart(tmp_path: Path) -> None:
    run_ranks(check_a_pipeline_axis, 8, tmp_path)


def check_a_pipeline_axis() -> None:
    rank = dist.get_rank()
    mesh = build_mesh(tensor=2, pipeline=2)
    half = rank // 4 * 4
    for axis, where, members in (
        (mesh.tensor, rank % 2, {rank // 2 * 2, rank // 2 * 2 + 1}),
        (mesh.data, rank // 2 % 2, {half + rank % 2, half + rank % 2 + 2}),
        (mesh.pipeline, rank // 4, {rank % 4, rank % 4 + 4}),
    ):
        assert axis.rank == where
        assert set(dist.get_process_group_ranks(axis.group)) == members
    assert mesh.ends == mesh.pipeline
    assert mesh.replicate == mesh.tokens == mesh.data

    long = build_mesh(tensor=1, shard=2, pipeline=4)
    assert (long.pipeline.size, long.pipeline.rank) == (4, rank // 2)
    if long.pipeline.rank in (0, 3):
        assert (long.ends.size, long.ends.rank) == (2, long.pipeline.rank // 3)
        assert dist.get_process_group_ranks(long.ends.group) == [rank % 2, rank % 2 + 6]
    else:
        assert long.ends == SINGLE
    alone = build_mesh(tensor=1, pipeline=8)
    assert alone.data == SINGLE
    assert (alone.ends.size, alone.pipeline.size) == (2 if rank in (0, 7) else 1, 8)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 x parallel.pipeline=3 = 6 must .* 8"):
        build_mesh(tensor=2, pipeline=3)
