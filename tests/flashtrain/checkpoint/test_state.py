"""Round trips: every value back where it was, bit for bit, on the same layout and on others."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from flashtrain.checkpoint import (
    CheckpointError,
    Peers,
    collect,
    find_latest,
    load,
    read_meta,
    read_rng,
    restore,
    rng_state,
    save,
    set_rng_state,
)
from tests.flashtrain.checkpoint.emulate import Tiny, cut, on_threads, shard, train_step, trained
from tests.harness import run_ranks


def fresh(model: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **kwargs)


def assert_holds_parts_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, whole: tuple[Tiny, torch.optim.AdamW]
) -> None:
    expected = dict(whole[0].named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, cut(parameter, expected[name])), name
        state, other = optimizer.state[parameter], whole[1].state[expected[name]]
        assert state.keys() == other.keys()
        assert torch.equal(state["step"], other["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], cut(parameter, other[key])), (name, key)


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"amsgrad": True}, {"foreach": True}])
def test_training_goes_on_bit_for_bit_after_a_restore(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    model, optimizer = trained(**kwargs)
    path = save(tmp_path, 2, collect(model, optimizer), {})
    torch.manual_seed(99)
    other = Tiny()
    other_optimizer = fresh(other, **kwargs)
    restore(path, other, other_optimizer)
    assert_holds_parts_of(other, other_optimizer, (model, optimizer))
    for _ in range(3):
        train_step(model, optimizer)
        train_step(other, other_optimizer)
    assert_holds_parts_of(other, other_optimizer, (model, optimizer))


def test_restore_writes_in_place_into_a_used_optimizer_too(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0)
    path = save(tmp_path, 2, collect(model, optimizer), {})
    other, other_optimizer = trained(seed=1, steps=5)
    address = other.qkv.weight.data_ptr()
    restore(path, other, other_optimizer)
    assert other.qkv.weight.data_ptr() == address
    assert other.head.weight is other.embedding.weight
    assert_holds_parts_of(other, other_optimizer, (model, optimizer))


def test_a_checkpoint_before_the_first_step_has_no_optimizer_state(tmp_path: Path) -> None:
    model, optimizer = trained(steps=0)
    path = save(tmp_path, 0, collect(model, optimizer), {})
    other = Tiny()
    other_optimizer = fresh(other)
    restore(path, other, other_optimizer)
    assert not other_optimizer.state
    assert torch.equal(other.qkv.weight, model.qkv.weight)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1), (4, 2), (2, 2)])
def test_any_layout_loads_any_layout(tmp_path: Path, before: int, after: int) -> None:
    whole = trained()
    first = save(tmp_path / "whole", 2, collect(*whole), {})

    def parts(peers: Peers) -> tuple[Tiny, torch.optim.AdamW]:
        model = shard(before, peers.rank)
        optimizer = fresh(model)
        restore(first, model, optimizer)
        save(tmp_path / "cut", 2, collect(model, optimizer), {}, peers=peers)
        return model, optimizer

    for model, optimizer in on_threads(before, parts):
        assert_holds_parts_of(model, optimizer, whole)
    path = tmp_path / "cut" / "step-00000002"
    assert len(list(path.glob("rank-*.safetensors"))) == before
    for rank in range(after):
        model = shard(after, rank)
        optimizer = fresh(model)
        restore(path, model, optimizer)
        assert_holds_parts_of(model, optimizer, whole)


def test_only_ranks_that_write_own_tensors_but_every_rank_keeps_its_rng(tmp_path: Path) -> None:
    model, optimizer = trained()
    saved = on_threads(
        2,
        lambda peers: save(
            tmp_path, 1, collect(model, optimizer), {}, peers=peers, writes=peers.rank == 0
        ),
    )
    assert saved[0] == saved[1] == tmp_path / "step-00000001"
    assert sorted(file.name for file in saved[0].iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rng.json",
        "state.json",
    ]
    assert read_rng(saved[0], 1, world_size=2) is not None
    assert read_rng(saved[0], 0, world_size=4) is None


def test_two_writers_of_the_same_values_are_refused_on_every_rank(tmp_path: Path) -> None:
    model, optimizer = trained()
    results = on_threads(
        2, lambda peers: save(tmp_path, 1, collect(model, optimizer), {}, peers=peers)
    )
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "two ranks did" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_writer_is_refused(tmp_path: Path) -> None:
    model = shard(2, 0)
    with pytest.raises(CheckpointError, match="48 of the 96 values"):
        save(tmp_path, 1, collect(model), {})


def test_plain_safetensors_readers_find_whole_tensors_under_their_name(tmp_path: Path) -> None:
    model, optimizer = trained()
    model.register_parameter("narrow", nn.Parameter(torch.randn(3, dtype=torch.bfloat16)))
    path = save(tmp_path, 1, collect(model, optimizer), {})
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model/qkv.weight"), model.qkv.weight)
        assert torch.equal(file.get_tensor("model/narrow"), model.narrow)
        assert "model/head.weight" not in file.keys()  # tied: once, as the embedding  # noqa: SIM118


def test_rng_of_python_numpy_and_torch_continues(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal(1), torch.randn(3)  # leaves a cached half pair
    path = save(tmp_path, 1, collect(Tiny()), {})

    def draw() -> tuple[Any, ...]:
        return random.gauss(0, 1), *np.random.standard_normal(3), *torch.randn(3).tolist()

    expected = draw()
    draw()
    state = read_rng(path, 0, world_size=1)
    assert state is not None
    set_rng_state(state)
    assert draw() == expected
    assert json.loads(json.dumps(rng_state())) == rng_state()


def test_meta_comes_back_with_step_and_versions(tmp_path: Path) -> None:
    meta = {"tokens": 12, "config": {"model": {"d_model": 6}}, "wandb": None, "loss": 0.1 + 0.2}
    path = save(tmp_path, 7, collect(Tiny()), copy.deepcopy(meta))
    found = read_meta(path)
    assert found["versions"]["torch"] == torch.__version__
    assert found["step"] == 7
    assert {key: found[key] for key in meta} == meta


def test_meta_that_is_not_json_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path, 1, collect(Tiny()), {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


class Wider(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 6)
        self.head.weight = self.embedding.weight


def test_another_shape_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 1, collect(model, optimizer), {})
    other = Wider()
    before = other.qkv.weight.clone()
    with pytest.raises(
        CheckpointError,
        match=r"model/embedding.weight is float32 \[16, 6\] there and float32 \[32, 6\] here "
        r"\(and 2 more\); set model",
    ):
        restore(path, other, fresh(other))
    assert torch.equal(other.qkv.weight, before)


def test_missing_and_surplus_tensors_and_other_dtypes_are_named(tmp_path: Path) -> None:
    model = Tiny()
    path = save(tmp_path, 1, collect(model), {})
    model.extra = nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model/extra \[2\] is in this run but not"):
        load(path, collect(model))
    del model.extra, model.temperature
    with pytest.raises(CheckpointError, match=r"model/temperature \[\] is in the checkpoint"):
        load(path, collect(model))
    with pytest.raises(CheckpointError, match=r"float32 \[16, 6\] there and bfloat16"):
        load(path, collect(Tiny().bfloat16()))


def test_state_without_a_logical_name_is_refused() -> None:
    model, optimizer = trained()
    model.register_buffer("table", torch.zeros(3))
    with pytest.raises(CheckpointError, match="table is a persistent buffer"):
        collect(model, optimizer)
    del model.table
    optimizer.state[model.qkv.weight]["row_mean"] = torch.zeros(24)
    with pytest.raises(CheckpointError, match=r"optimizer/row_mean/qkv.weight is \[24\]"):
        collect(model, optimizer)
    stranger = nn.Parameter(torch.zeros(5))
    foreign = torch.optim.SGD([stranger], lr=1.0, momentum=0.9)
    stranger.grad = torch.ones(5)
    foreign.step()
    with pytest.raises(CheckpointError, match=r"a parameter of shape \[5\]"):
        collect(Tiny(), foreign)


def test_real_ranks_save_and_agree_on_what_to_load(tmp_path: Path) -> None:
    run_ranks(check_real_ranks, 2, tmp_path, tmp_path / "checkpoints")


def check_real_ranks(folder: Path) -> None:
    peers = Peers(torch.distributed.group.WORLD)
    torch.manual_seed(peers.rank)
    assert peers.gather({"rank": peers.rank, "pad": "x" * peers.rank}) == (
        [{"rank": 0, "pad": ""}, {"rank": 1, "pad": "x"}] if peers.rank == 0 else None
    )
    model = shard(2, peers.rank)
    optimizer = fresh(model)
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        save(folder, step, collect(model, optimizer), {}, peers=peers)
    expected = model.qkv.weight.clone()
    if peers.rank == 0:
        damaged = folder / "step-00000002" / "rank-00001.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    torch.distributed.barrier()
    assert find_latest(folder, peers) == folder / "step-00000001"
    assert (folder / "step-00000002.broken").is_dir()
    restore(folder / "step-00000001", model, optimizer)
    assert not torch.equal(model.qkv.weight, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{"fused": True}, {"capturable": True}, {}])
def test_restore_on_a_gpu_puts_counters_where_torch_wants_them(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 2, collect(model, optimizer), {})  # written on the CPU
    other = Tiny().cuda()
    other_optimizer = fresh(other, **kwargs)
    restore(path, other, other_optimizer)
    step = other_optimizer.state[other.qkv.weight]["step"]
    assert step.is_cuda == bool(kwargs)
    save(tmp_path, 3, collect(other, other_optimizer), {})
    back = Tiny()
    back_optimizer = fresh(back)
    restore(tmp_path / "step-00000003", back, back_optimizer)
    assert_holds_parts_of(back, back_optimizer, (model, optimizer))
    torch.randn(5, device="cuda")
    state = json.loads(json.dumps(rng_state()))
    drawn = torch.randn(5, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.randn(5, device="cuda"), drawn)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    other_optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_talk_over_nccl_too(tmp_path: Path) -> None:
    run_ranks(check_real_ranks, 2, tmp_path, tmp_path / "checkpoints", backend="nccl")
