"""Steps as CUDA graphs give what steps one by one give, to the last bit; on the CPU the same
bookkeeping with a stand-in for the graph."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import ConfigError, Overlap
from flashtrain.data.loader import Batch
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.engine.graph import WARMUP, Graph, Graphs, Recorded, uses_graphs
from flashtrain.engine.native import NativeEngine
from flashtrain.layout import no_graphs, overlap_of
from flashtrain.optim import build_optimizer
from flashtrain.parallel.mesh import mesh_of


class Tiny:
    """A model of one vector whose loss is its product with the tokens."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.rate = torch.tensor(0.1)
        self.passed = self.updated = 0  # times that Python ran

    def passes(self, batches: list[Batch]) -> tuple[Tensor, ...]:
        self.passed += 1
        total = torch.zeros(())
        for batch in batches:
            loss = (self.weight * batch.tokens).sum() + batch.labels.sum()
            loss.backward()
            total += loss.detach()
        return total, 2 * total

    def update(self) -> Tensor:
        self.updated += 1
        grad = self.weight.grad
        assert grad is not None
        with torch.no_grad():
            self.weight -= self.rate * grad
        self.weight.grad = None
        return grad.norm()

    def record(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        """Runs nothing, as a recording; a replay fills the tensors that the recording made and
        touches no Python attribute."""
        weight, before, held = self.weight, self.weight.detach().clone(), self.weight.grad
        result = function()
        made = weight.grad
        weight.data.copy_(before)

        class Again:
            def replay(_) -> None:
                there = weight.grad
                weight.grad = held
                again = function()
                for to, new in zip(_flat(result), _flat(again), strict=True):
                    to.copy_(new)
                if made is not None:
                    assert weight.grad is not None
                    made.copy_(weight.grad)
                weight.grad = there

        return Again(), result


def _flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def batch(*tokens: float, labels: int = 0) -> Batch:
    return Batch(torch.tensor(tokens), torch.tensor([labels]))


def test_recorded_steps_are_the_steps() -> None:
    plain, tiny = Tiny(), Tiny()
    graphs = Graphs(tiny.passes, tiny.update, [tiny.weight], tiny.record)
    results = []
    for number in range(6):
        batches = [batch(number, 1.0, labels=number), batch(2.0, -number)]
        plain.rate.fill_(0.1 / (1 + number))
        tiny.rate.fill_(0.1 / (1 + number))
        expected = plain.passes(batches), plain.update()
        results.append((graphs.passes(batches), graphs.update()))
        for ours, theirs in zip(results[-1][0], expected[0], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(results[-1][1], expected[1])
        assert torch.equal(tiny.weight, plain.weight)
        assert tiny.weight.grad is None
    assert len({float(losses[0]) for losses, _ in results}) == 6  # no replay wrote over them
    assert len(graphs.recorded) == 1


def test_each_shape_is_recorded_for_itself_after_its_first_steps() -> None:
    tiny = Tiny()
    graphs = Graphs(tiny.passes, tiny.update, [tiny.weight], tiny.record)
    for count in (1, 2, 1):
        for _ in range(WARMUP + 1):
            graphs.passes([batch(1.0, 1.0)] * count)
            graphs.update()
    assert len(graphs.recorded) == 1


def test_what_a_shape_that_is_over_held_is_given_back() -> None:
    tiny, plain = Tiny(), Tiny()
    graphs = Graphs(tiny.passes, tiny.update, [tiny.weight], tiny.record)
    held: list[weakref.ref[Recorded]] = []
    for count in (1, 2, 3, 1):
        for number in range(WARMUP + 2):
            batches = [batch(number, 1.0)] * count
            if len(held) == count - 1 and number == 1:
                assert not graphs.recorded  # in time for what steps that are not recorded need
            expected = plain.passes(batches), plain.update()
            assert torch.equal(graphs.passes(batches)[0], expected[0][0])
            assert torch.equal(graphs.update(), expected[1])
            assert torch.equal(tiny.weight, plain.weight)
        (own,) = graphs.recorded.values()
        held.append(weakref.ref(own))
        del own
    gc.collect()
    assert [recorded() is not None for recorded in held] == [False, False, False, True]


def test_gradients_that_wait_are_added_to() -> None:
    tiny = Tiny()
    graphs = Graphs(tiny.passes, tiny.update, [tiny.weight], tiny.record)
    for _ in range(WARMUP + 1):
        graphs.passes([batch(1.0, 1.0)])
        graphs.update()
    graphs.passes([batch(1.0, 2.0)])
    graphs.passes([batch(3.0, 4.0)])
    assert tiny.weight.grad is not None and tiny.weight.grad.tolist() == [4.0, 6.0]
    before = tiny.weight.detach().clone()
    graphs.update()
    torch.testing.assert_close(tiny.weight, before - 0.1 * torch.tensor([4.0, 6.0]))


def test_an_update_on_the_host_follows_recorded_passes() -> None:
    tiny, plain = Tiny(), Tiny()
    graphs = Graphs(tiny.passes, None, [tiny.weight], tiny.record)
    for number in range(5):
        graphs.passes([batch(number, 1.0)])
        tiny.update()
        plain.passes([batch(number, 1.0)])
        plain.update()
        assert torch.equal(tiny.weight, plain.weight)


def test_replays_raise_the_version_of_weights() -> None:
    tiny = Tiny()
    graphs = Graphs(tiny.passes, tiny.update, [tiny.weight], tiny.record)
    for _ in range(5):
        before = tiny.weight._version
        graphs.passes([batch(1.0, 1.0)])
        graphs.update()
        assert tiny.weight._version > before


CASE = [
    "model=gpt_tiny", "model.n_layers=2", "model.vocabulary=640", "model.bias=true", "data=random",
    "data.sequence_length=64", "data.batch_size=4", "data.micro_batch_size=2",
    "attention.backend=triton", "optimizer.lr=0.003",
]  # fmt: skip


def test_off_the_gpu_there_is_none() -> None:
    cpu = torch.device("cpu")
    assert not uses_graphs(load(CASE), cpu)
    with pytest.raises(
        ConfigError, match=r"cuda_graph=on: the device is not a CUDA GPU; take auto"
    ):
        uses_graphs(load([*CASE, "trainer.cuda_graph=on"]), cpu)


@pytest.mark.parametrize(
    ("changes", "world", "reason"),
    [
        (["parallel=fsdp"], 2, "parallel.tensor and parallel.replicate are recorded, and here 2"),
        (["parallel=fsdp", "parallel.tensor=2"], 4, "and here 2 share weights, a sequence or"),
        (["parallel=pipeline2"], 2, "and here 2 share"),
        (["trainer.recompute=full", "trainer.offload_activations=true"], 1, "offload_activations"),
        (["engine=deepspeed"], 1, "engine=deepspeed"),
        (["trainer.nvtx=true"], 1, "nvtx"),
    ],
)
def test_what_cannot_be_recorded_says_so(changes: list[str], world: int, reason: str) -> None:
    config = load([*CASE, *changes], world)
    assert reason in (no_graphs(config) or "")
    assert no_graphs(load(CASE)) is None
    with pytest.raises(ConfigError, match=f"cuda_graph=on: .*{reason}.*; take auto or off"):
        load([*CASE, *changes, "trainer.cuda_graph=on"], world)  # whatever engine would run it


def test_small_transfers_of_tensor_ranks_hide_where_steps_are_recorded() -> None:
    both = [*CASE, "parallel=data", "parallel.tensor=2"]
    assert overlap_of(load(both, 2)) is Overlap.auto
    assert overlap_of(load([*both, "trainer.cuda_graph=off"], 2)) is Overlap.off
    assert overlap_of(load(both, 4)) is Overlap.off  # data ranks besides: recorded if asked for
    assert overlap_of(load([*both, "trainer.cuda_graph=on"], 4)) is Overlap.auto


def engine_of(*changes: str) -> tuple[NativeEngine, Any]:
    device = torch.device("cuda", 0)
    config = prepare_source(load([*CASE, "trainer.steps=20", *changes]), 1)
    engine = build_engine(config, mesh_of(config.parallel), device)
    assert isinstance(engine, NativeEngine)
    return engine, open_loader(config, 0, 1, device)


CHANGES = {
    "bf16": [],
    "fp32": ["precision=fp32"],
    "uncompiled": ["trainer.compile=false"],
    "logits": ["loss.fused=false"],
    "bf16 moments": ["optimizer=adamw_bf16"],
    "muon": ["optimizer=muon"],
    "fp8": ["precision=fp8_tensorwise"],
    "recomputed": ["trainer.recompute=selective"],
    "swiglu": ["model.mlp=swiglu", "model.norm=rmsnorm", "model.bias=false"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHANGES)
def test_on_a_gpu_every_number_is_the_same(name: str) -> None:
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 products")
    results = []
    for kind in ("off", "on"):
        engine, loader = engine_of(*CHANGES[name], f"trainer.cuda_graph={kind}")
        assert (engine.graphs is not None) == (kind == "on")
        numbers: list[Tensor] = []
        with loader:
            for step in range(8):
                numbers.append(engine.forward_backward(loader.step(step)))
                if step == 5:  # a gradient that is not finite
                    grad = next(iter(engine.parameters.values())).grad
                    assert grad is not None
                    grad.fill_(float("nan"))
                numbers.append(engine.step(0.003 / (1 + step)))
                if step in (1, 4):
                    numbers.append(engine.evaluate(loader.evaluation(4)))
        if engine.graphs is not None:
            assert len(engine.graphs.recorded) == 1
        results.append([*numbers, *engine.parameters.values()])
    for plain, recorded in zip(*results, strict=True):
        assert torch.equal(plain.nan_to_num(7.0), recorded.nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["on", "off"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "muon"])
def test_on_a_gpu_the_host_never_waits(optimizer: str, kind: str) -> None:
    engine, loader = engine_of(f"trainer.cuda_graph={kind}", f"optimizer={optimizer}")
    with loader:
        for step in range(4):
            engine.forward_backward(loader.step(step))
            engine.step(0.003)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(4, 8):
                engine.forward_backward(loader.step(step))
                engine.step(0.003 / step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_weights_loaded_later_are_used() -> None:
    engine, loader = engine_of("trainer.cuda_graph=on", "optimizer.lr=0.001")
    optimizer = build_optimizer(engine.parameters, load(CASE), mesh_of(load(CASE).parallel))
    assert optimizer.param_groups[0]["lr"].is_cuda
    with loader:
        batches = loader.step(0)
        for _ in range(4):
            first = engine.forward_backward(batches)
            engine.step(0.001)
        state = {n: t.tensor.clone() for n, t in engine.state().tensors.items()}
        before = engine.forward_backward(batches)
        engine.step(0.001)
        engine.forward_backward(batches)
        engine.step(0.001)
        with torch.no_grad():
            for name, view in engine.state().tensors.items():
                view.tensor.copy_(state[name])
        engine.loaded()
        assert torch.equal(engine.forward_backward(batches), before)
        assert before < first
