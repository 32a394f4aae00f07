"""The search: what it offers runs, what the user named stays, the best comes first."""

import pytest

from flashtrain.compose import load, read
from flashtrain.config import Config, Recompute
from flashtrain.planning.gpus import build_cluster
from flashtrain.planning.layouts import Degrees, best, layout_overrides, longest, search
from flashtrain.planning.memory import USABLE, host_bytes
from flashtrain.planning.scaling import scaling

CLUSTER = build_cluster("h100")
BASE = ["experiment=gpt_1.3b", "data=random", "data.batch_size=64"]


def base(*overrides: str) -> Config:
    return read([*BASE, *overrides])


def test_every_layout_that_is_offered_is_one_that_a_run_takes() -> None:
    plans, smallest = search(base(), 8, CLUSTER)
    assert smallest is None
    assert len(plans) > 20
    for plan in plans[:: len(plans) // 6]:
        config = load([*BASE, *layout_overrides(plan.config)], 8)
        assert config.parallel == plan.config.parallel
        assert config.data == plan.config.data
        assert config.trainer == plan.config.trainer


def test_the_fastest_comes_first_and_all_fit() -> None:
    plans, _ = search(base(), 8, CLUSTER)
    times = [plan.step.total for plan in plans]
    assert times == sorted(times)
    assert all(plan.memory.total <= USABLE * CLUSTER.gpu.memory for plan in plans)
    first = best(base(), 8, CLUSTER)
    assert first is not None and first.step == plans[0].step


def test_what_is_named_stays() -> None:
    named = Degrees(tensor=2, recompute=Recompute.full, micro_batch_size=4)
    plans, _ = search(base(), 8, CLUSTER, named)
    for plan in plans:
        assert plan.config.parallel.tensor == 2
        assert plan.config.trainer.recompute is Recompute.full
        assert plan.config.data.micro_batch_size == 4
    assert {plan.config.parallel.shard for plan in plans} == {1, 2, 4}


def test_light_recomputation_is_no_layout_of_its_own_where_it_saves_nothing() -> None:
    """Linear layers of tensor ranks keep what it would make again."""
    light = {
        plan.config.parallel.tensor
        for plan in search(base(), 8, CLUSTER)[0]
        if plan.config.trainer.recompute is Recompute.light
    }
    assert light == {1}
    named, _ = search(base(), 8, CLUSTER, Degrees(tensor=2, recompute=Recompute.light))
    assert named  # by name it stays


def test_where_nothing_fits_the_smallest_is_shown() -> None:
    plans, smallest = search(read(["experiment=llama_70b", "data=random"]), 8, CLUSTER)
    assert not plans
    assert smallest is not None
    assert smallest.memory.total > CLUSTER.gpu.memory
    assert best(read(["experiment=llama_70b", "data=random"]), 8, CLUSTER) is None


def test_no_layout_at_all_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=64.*leave no layout for 7 GPUs"):
        search(base(), 7, CLUSTER)


def test_what_is_not_predicted_is_refused_and_not_skipped() -> None:
    with pytest.raises(ValueError, match="bf16 only"):
        search(base("precision=fp32"), 8, CLUSTER)


def test_long_sequences_are_cut_over_context_ranks() -> None:
    config = base("data.sequence_length=131072", "data.batch_size=1")
    plans, _ = search(config, 8, CLUSTER)
    assert max(plan.config.parallel.context for plan in plans) == 8
    assert plans[0].config.parallel.context * (plans[0].config.parallel.tensor or 1) > 1


def test_weak_scaling_keeps_what_strong_scaling_loses() -> None:
    weak, strong = scaling(base(), CLUSTER, most=64)
    assert [plan.gpus for plan in weak.plans] == [2**i for i in range(7)]
    assert weak.per_gpu()[-1] > 0.8 * max(weak.per_gpu())
    assert strong.per_gpu()[-1] < 0.6 * max(strong.per_gpu())
    # more GPUs never lose time
    times = [plan.step.total for plan in strong.plans]
    assert times == sorted(times, reverse=True)


def test_the_longest_sequence_is_bounded_by_the_gpu_or_by_the_host() -> None:
    words = ("experiment=llama_8b data=random data.batch_size=1 optimizer=adamw_bf16 "
             "trainer.recompute=full trainer.mlp_chunks=16")  # fmt: skip
    alone = Degrees(tensor=1, context=1, recompute=Recompute.full)

    def of(more: str, ram: float) -> int:
        cluster = build_cluster("h200", ram=ram)
        plan = longest(read([*words.split(), *more.split()]), 1, cluster, alone)
        assert plan is not None
        assert plan.memory.total <= USABLE * cluster.gpu.memory
        assert host_bytes(plan.config) <= USABLE * ram
        return plan.config.data.sequence_length

    offload = "trainer.offload_activations=true"
    assert of(offload, 48e9) < of("", 1e9) < of(offload, 1e12)
    assert of("", 1e9) == of("", 1e12)
    # nothing fits where a single step does not
    small = build_cluster("rtx4090")
    assert longest(read(words.split()), 1, small, alone) is None
