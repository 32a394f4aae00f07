"""Steps of tensor-parallel ranks as CUDA graphs give what they give one by one, to the last bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.engine.graph import Graph, Graphs, uses_graphs
from flashtrain.engine.native import NativeEngine
from flashtrain.parallel.mesh import mesh_of
from tests.harness import run_ranks

CASE = [
    "model=gpt_tiny", "model.n_layers=2", "model.d_model=512", "model.n_heads=8",
    "model.vocabulary=640", "data=random", "data.sequence_length=512", "data.batch_size=4",
    "data.micro_batch_size=2", "optimizer.lr=0.003", "trainer.steps=20", "parallel=tensor2",
]  # fmt: skip
CHANGES = {
    "collectives": ["parallel.overlap=off"],
    "overlap": ["parallel.overlap=on"],
    "llama": ["parallel.overlap=on", "model.mlp=swiglu", "model.norm=rmsnorm", "position=rope"],
    "fp8": ["parallel.overlap=off", "precision=fp8_tensorwise"],
    "uncompiled": ["parallel.overlap=on", "trainer.compile=false"],
    "muon": ["parallel.overlap=on", "optimizer=muon"],
    "data": ["parallel=data", "data.batch_size=8"],  # two micro-batches on each of two ranks
    "data, fp8": ["parallel=data", "data.batch_size=8", "precision=fp8_tensorwise"],
    "data, muon": ["parallel=data", "data.batch_size=8", "optimizer=muon"],
}


def test_auto_records_one_gpu_and_ranks_of_one_kind() -> None:
    gpu = torch.device("cuda", 0)
    assert uses_graphs(load(["model=gpt_tiny", "model.vocabulary=640", "data=random"]), gpu)
    assert not uses_graphs(load(CASE, 2), torch.device("cpu"))
    data = ["parallel.tensor=1", "parallel.replicate=2"]
    off, fp8, muon = "parallel.overlap=off", "precision=fp8_tensorwise", "optimizer=muon"
    for change in ([], [off], [fp8], [muon], data, [*data, fp8], [*data, muon]):
        assert uses_graphs(load([*CASE, *change], 2), gpu), change
    for change, ranks in ((["parallel.overlap=fused"], 2), (["parallel.replicate=2"], 4)):
        assert not uses_graphs(load([*CASE, *change], ranks), gpu), change
        assert uses_graphs(load([*CASE, *change, "trainer.cuda_graph=on"], ranks), gpu), change
    assert not uses_graphs(load([*CASE, "parallel.shard=2"], 4), gpu)
    with pytest.raises(ConfigError, match="cuda_graph=on: of processes that talk"):
        uses_graphs(load([*CASE, "parallel.shard=2", "trainer.cuda_graph=on"], 4), gpu)


def test_gradients_of_data_ranks_stay_where_they_were_recorded(tmp_path: Path) -> None:
    run_ranks(check_data_ranks, 2, tmp_path)


def check_data_ranks() -> None:
    """On a CPU, where a stand-in for a graph runs the passes once more: DDP puts gradients into its
    buckets each time, so the update finds those of the step at the addresses of the recording."""
    cpu = torch.device("cpu")
    small = ["model.d_model=64", "model.n_heads=2", "data.sequence_length=32", "parallel=data"]
    config = prepare_source(load([*CASE, *small, "data.batch_size=8"], 2), 2)
    results = []
    for records in (False, True):
        mesh = mesh_of(config.parallel)
        engine = build_engine(config, mesh, cpu)
        assert isinstance(engine, NativeEngine)
        parameters = list(engine.parameters.values())
        if records:
            record = partial(run_again, parameters)
            engine.graphs = Graphs(engine._passes, None, parameters, record, warmup=3)
        numbers: list[Tensor] = []
        with open_loader(config, mesh.data.rank, mesh.data.size, cpu) as loader:
            for step in range(6):
                numbers.append(engine.forward_backward(loader.step(step)))
                numbers.append(engine.step(0.003 / (1 + step)))
        assert not records or (engine.graphs is not None and len(engine.graphs.recorded) == 1)
        results.append([*numbers, *(p.detach().clone() for p in parameters)])
        engine.close()
    for plain, recorded in zip(*results, strict=True):
        assert torch.equal(plain, recorded)


def run_again(parameters: list[Parameter], function: Callable[[], Any]) -> tuple[Graph, Any]:
    result = function()
    places = [p.grad for p in parameters]

    class Again:
        def replay(self) -> None:
            for p in parameters:
                p.grad = None
            for to, new in zip(result, function(), strict=True):
                to.copy_(new)
            for p, place in zip(parameters, places, strict=True):
                assert p.grad is not None and place is not None
                assert p.grad.data_ptr() == place.data_ptr()
                p.grad = None

    return Again(), result


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CHANGES)
def test_on_gpus_every_number_is_the_same(name: str, tmp_path: Path) -> None:
    run_ranks(check_every_number, 2, tmp_path, name, backend="nccl", limit=300)


def check_every_number(name: str) -> None:
    device, results = torch.device("cuda", dist.get_rank()), []
    for kind in ("off", "on"):
        config = load([*CASE, *CHANGES[name], f"trainer.cuda_graph={kind}"], 2)
        config = prepare_source(config, 2)
        mesh = mesh_of(config.parallel)
        engine = build_engine(config, mesh, device)
        assert isinstance(engine, NativeEngine)
        assert (engine.graphs is not None) == (kind == "on")
        numbers: list[Tensor] = []
        with open_loader(config, mesh.data.rank, mesh.data.size, device) as loader:
            for step in range(16):  # data ranks run the first 11 as they are
                numbers.append(engine.forward_backward(loader.step(step)))
                numbers.append(engine.step(0.003 / (1 + step)))
                if step in (1, 4):  # outside of the graphs, over the same memory of peers
                    numbers.append(engine.evaluate(loader.evaluation(4)))
        assert engine.graphs is None or len(engine.graphs.recorded) == 1
        results.append([*numbers, *(p.detach().clone() for p in engine.parameters.values())])
        engine.close()
    for plain, recorded in zip(*results, strict=True):
        assert torch.equal(plain, recorded)
