"""What each rank holds of a model cut by FSDP: weights, notes, dtypes. Training is compared in
tests/distributed/test_matrix.py."""

import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flashtrain.build import build_engine, build_model
from flashtrain.compose import load
from flashtrain.config import Config
from flashtrain.data.loader import Batch
from flashtrain.model.shard import shard_of
from flashtrain.parallel.fsdp import give_back, held_parameters, shard_model
from flashtrain.parallel.layers import PartialRows
from flashtrain.parallel.mesh import SINGLE, Mesh, build_mesh
from tests.harness import run_ranks

CPU = torch.device("cpu")
# 40 and 56 rows over three ranks: 14, 14, 12 and 19, 19, 18; one key/value head for two ranks
TINY = [
    "experiment=null", "data=random", "model.vocabulary=56", "model.d_model=40", "model.n_layers=2",
    "model.n_heads=4", "model.n_kv_heads=1", "model.bias=true", "model.head_size=4",
    "data.sequence_length=6", "data.batch_size=12", "trainer.evaluate_sequences=12",
    "precision=bf16", "data.micro_batch_size=null",
]  # fmt: skip


def config(world: int, tensor: int, shard: int, *others: str) -> Config:
    return load([*TINY, f"parallel.tensor={tensor}", f"parallel.shard={shard}", *others], world)


def cut(made: Config, mesh: Mesh) -> torch.nn.Module:
    def shard(model: torch.nn.Module) -> None:
        shard_model(model, mesh, 3, torch.bfloat16, CPU)  # type: ignore[arg-type]

    return build_model(made, mesh.tensor, CPU, shard)


def test_parts_are_slices_of_the_dense_weights(tmp_path: Path) -> None:
    run_ranks(check_parts, 3, tmp_path, config(3, 1, 3))
    run_ranks(check_parts, 4, tmp_path, config(4, 2, 2))


def check_parts(made: Config) -> None:
    assert made.parallel.tensor is not None and made.parallel.shard is not None
    mesh = build_mesh(made.parallel.tensor, shard=made.parallel.shard)
    dense = dict(build_model(made, SINGLE, CPU).named_parameters())
    model = cut(made, mesh)
    held = held_parameters(model)
    assert held.keys() == dense.keys()
    for name, part in held.items():
        counted = torch.zeros(dense[name].shape)
        assert not isinstance(part, DTensor)
        for box in shard_of(part).boxes:
            place = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            assert torch.equal(box.view(part.detach()), dense[name].detach()[place]), name
            counted[place] += box.owned
        dist.all_reduce(counted)
        assert (counted == 1).all(), f"{name}: a value has no owner, or two"


def test_vectors_stay_whole_and_fp32_and_matrices_are_gathered_in_bf16(tmp_path: Path) -> None:
    run_ranks(check_dtypes, 2, tmp_path, config(2, 1, 2))


def check_dtypes(made: Config) -> None:
    model = cut(made, build_mesh(1, shard=2))
    seen: dict[str, torch.dtype] = {}

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        for name, parameter in module.named_parameters():
            assert not isinstance(parameter, DTensor)
            seen[name] = parameter.dtype

    model.blocks[0].register_forward_hook(note, prepend=True)  # type: ignore[union-attr, index]
    with torch.no_grad():
        model(torch.zeros(1, 6, dtype=torch.int64))
    assert seen["attention.qkv.weight"] is torch.bfloat16
    assert seen["norm_mlp.weight"] is torch.float32
    assert seen["attention.out.bias"] is torch.float32
    give_back(model)
    assert isinstance(model.get_parameter("embedding.weight"), DTensor)


def test_shared_rows_are_counted_from_the_part_s_beginning(tmp_path: Path) -> None:
    run_ranks(check_shared_rows, 4, tmp_path, config(4, 2, 2))


def check_shared_rows(made: Config) -> None:
    """A tensor rank has 8 query rows and the 4 key and 4 value rows that both have: the shard rank
    of rows 0 to 8 shares none, the other one 4 + 4."""
    mesh = build_mesh(2, shard=2)
    held = held_parameters(cut(made, mesh))
    shared = getattr(held["blocks.0.attention.qkv.weight"], "partial_rows", ())
    both = (PartialRows(0, 4, 0, 4), PartialRows(4, 4, 0, 4))
    assert shared == (both if mesh.shard.rank == 1 else ())


def test_sharded_blocks_compile_into_one_graph(tmp_path: Path) -> None:
    line = ["data.batch_size=2", "precision=fp32", "loss.fused=true", "trainer.recompute=selective"]
    made = [config(2, 1, 2, *line, f"trainer.compile={compiled}") for compiled in (False, True)]
    run_ranks(check_one_graph, 2, tmp_path, *made)


def check_one_graph(plain: Config, compiled: Config) -> None:
    compiler = torch.compile
    torch.compile = partial(compiler, backend="aot_eager")  # type: ignore[assignment]
    mesh = build_mesh(1, shard=2)
    ids = torch.randint(56, (1, 7), generator=torch.Generator().manual_seed(mesh.rank))
    results = []
    for made in (plain, compiled):
        engine = build_engine(made, mesh, CPU)
        torch._dynamo.utils.counters.clear()
        loss = engine.forward_backward([Batch(ids[:, :-1].clone(), ids[:, 1:].clone())])
        results.append((loss, engine.step(1e-3)))
    torch.testing.assert_close(results[1], results[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "a graph for each block"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_torch_warns_of_no_wrong_gradients(tmp_path: Path) -> None:
    run_ranks(check_no_warning, 2, tmp_path, config(2, 1, 2, "trainer.compile=false"))


def check_no_warning(made: Config) -> None:
    warnings.filterwarnings("error", "FSDP2-wrapped module")
    engine = build_engine(made, build_mesh(1, shard=2), CPU)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    engine.forward_backward([Batch(tokens, tokens)])
