"""What is saved beside training is what was there when the save began, to the last byte."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flashtrain import checkpoint, watch
from flashtrain.checkpoint import (
    Peers,
    Saver,
    State,
    background,
    collect,
    find_latest,
    own_peers,
    restore,
    save,
    snapshot,
)
from flashtrain.checkpoint.integrity import FileRecord
from flashtrain.checkpoint.snapshot import HostMemory
from flashtrain.config import TrainerConfig
from flashtrain.interruption import Interruption
from flashtrain.watch import Watch
from tests.flashtrain.checkpoint.emulate import Tiny, on_threads, shard, train_step, trained
from tests.harness import run_ranks

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def saver(folder: Path, peers: Peers | None = None, **options: Any) -> Saver:
    return Saver(folder, CPU, peers or Peers(), **options)


class Gate:
    """Holds every background write up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.running, self.most = threading.Event(), 0, 0
        write = background.save

        def held(*args: Any, **kwargs: Any) -> Path:
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.opened.wait(30)
            try:
                return write(*args, **kwargs)
            finally:
                self.running -= 1

        monkeypatch.setattr(background, "save", held)


@torch.no_grad()
def spoil(state: State) -> None:
    """What training does to weights, moments, counters and generators, only worse."""
    for local in state.tensors.values():
        local.tensor.fill_(float("nan"))
    for scalar in state.scalars.values():
        scalar.fill_(-1)
    random.random(), np.random.rand(), torch.rand(1)


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True, "fused": True}])
def test_files_are_those_of_a_synchronous_save_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
) -> None:
    model, optimizer = trained(**kwargs)
    model.register_parameter("odd", torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16)))
    state, meta = collect(model, optimizer), {"tokens": 12}
    save(tmp_path / "one", 7, state, meta)
    gate, beside = Gate(monkeypatch), saver(tmp_path / "two")
    beside.start(7, state, meta)
    spoil(state)
    gate.opened.set()
    assert beside.finish()
    (saved,) = beside.results()
    assert (saved.step, saved.path, saved.failure) == (7, tmp_path / "two" / "step-00000007", None)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_beside_training_write_what_ranks_write(tmp_path: Path, ranks: int) -> None:
    model, optimizer = trained()
    whole = save(tmp_path / "whole", 2, collect(model, optimizer), {})

    def both(peers: Peers) -> None:
        part = shard(ranks, peers.rank)
        own = torch.optim.AdamW(part.parameters(), lr=0.01)
        restore(whole, part, own)
        state, rng = collect(part, own), checkpoint.rng_state()
        save(tmp_path / "one", 2, state, {}, peers=peers, rng=rng)
        beside = saver(tmp_path / "two", peers)
        beside.start(2, state, {})
        spoil(state)
        beside.finish()
        assert [saved.failure for saved in beside.results()] == [None]

    assert on_threads(ranks, both) == [None] * ranks
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    tensors = [name for name in one if name.endswith(".safetensors")]
    assert len(tensors) == ranks
    assert {name: two[name] for name in tensors} == {name: one[name] for name in tensors}
    found = Tiny()
    restore(tmp_path / "two" / "step-00000002", found, torch.optim.AdamW(found.parameters()))
    assert torch.equal(found.qkv.weight, model.qkv.weight)


def test_a_rank_that_does_not_write_copies_nothing(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = collect(model, optimizer)

    def work(peers: Peers) -> HostMemory | None:
        beside = saver(tmp_path, peers, writes=peers.rank == 0)
        beside.prepare(state)
        beside.start(1, state, {})
        beside.finish()
        assert [saved.failure for saved in beside.results()] == [None]
        return beside.memory

    memories = on_threads(2, work)
    assert isinstance(memories[0], HostMemory)
    assert memories[1] is None
    assert find_latest(tmp_path) == tmp_path / "step-00000001"


def test_training_goes_on_from_it_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    beside = saver(tmp_path)
    beside.start(2, collect(model, optimizer), {})
    train_step(model, optimizer)
    beside.finish()
    other = Tiny()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    path = find_latest(tmp_path)
    assert path is not None
    restore(path, other, other_optimizer)
    train_step(other, other_optimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_second_save_waits_for_the_first_and_uses_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "NOTICED_S", 0.1)
    gate, beside, state = Gate(monkeypatch), saver(tmp_path), collect(*trained())
    beside.start(1, state, {})
    assert beside.results() == []
    assert beside.memory is not None
    places = {name: room.data_ptr() for name, room in beside.memory.rooms.items()}
    assert not beside.finish(timeout=0.01)

    second = threading.Thread(target=lambda: beside.start(2, state, {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.opened.set()
    second.join(30)
    beside.finish()
    assert gate.most == 1
    first, after = beside.results()
    assert (first.step, after.step) == (1, 2)
    assert first.waited_s == 0.0
    assert 0.1 < after.waited_s <= after.stall_s
    assert {name: room.data_ptr() for name, room in beside.memory.rooms.items()} == places
    (record,) = [record for record in caplog.records if "waited" in record.getMessage()]
    assert record.getMessage().startswith("step 2 waited")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_is_waited_for_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """However long it takes: `Watch` asks for it."""
    gate, state = Gate(monkeypatch), collect(Tiny())
    beside = saver(tmp_path / "saved", asynchronous=asynchronous)
    verdicts: list[str] = []
    config = TrainerConfig(hang_timeout=0.01)  # 0.6 s
    guard = Watch(tmp_path, 0, config, Interruption(), saving=beside.is_awaited)
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
    monkeypatch.setattr(guard, "_end", verdicts.append)

    def opened_late() -> None:
        for _ in range(10):
            guard.at("what follows step 1", stepping=False)  # as long as training goes on
            time.sleep(0.05)
        awaited.append(beside.is_awaited())
        time.sleep(1.5)
        awaited.append(beside.is_awaited())
        gate.opened.set()

    awaited: list[bool] = []
    late = threading.Thread(target=opened_late)
    with guard:
        late.start()
        beside.start(1, state, {})
        if asynchronous:
            late.join(0.3)
            assert not beside.is_awaited()
        beside.finish()
        late.join()
        assert awaited == [True, True] and not beside.is_awaited()
        assert verdicts == []
        time.sleep(1)
        assert any("hang_timeout" in why for why in verdicts)
    assert [saved.failure for saved in beside.results()] == [None]


def test_memory_is_made_before_the_first_save_and_anew_for_another_layout(tmp_path: Path) -> None:
    model, optimizer = trained(steps=0)
    beside = saver(tmp_path)
    beside.prepare(collect(model, optimizer))
    beside.start(1, collect(model, optimizer), {})
    before = beside.memory
    train_step(model, optimizer)  # makes the moments
    beside.start(2, collect(model, optimizer), {})
    assert beside.memory is not before
    beside.close()
    assert beside.memory is None
    assert [saved.failure for saved in beside.results()] == [None, None]
    other, other_optimizer = trained(seed=1)
    restore(tmp_path / "step-00000002", other, other_optimizer)
    assert torch.equal(other.qkv.weight, model.qkv.weight)


def test_host_memory_is_as_large_as_what_is_written_and_no_values_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot, "BLOCK", 300)  # bytes: some tensors share a block, some do not
    model, optimizer = trained()
    for index, dtype in enumerate((torch.bfloat16, torch.float64, torch.float32)):
        model.register_parameter(f"p{index}", torch.nn.Parameter(torch.randn(5, dtype=dtype)))
    state = collect(model, optimizer)
    elsewhere = state.tensors["model/p0"]
    state.tensors["model/p0"] = replace(
        elsewhere, boxes=tuple(replace(box, owned=False) for box in elsewhere.boxes)
    )
    memory = HostMemory(state, CPU)
    copy = memory.copy(state)
    written = [local for name, local in state.tensors.items() if name != "model/p0"]
    assert memory.bytes == sum(t.tensor.numel() * t.tensor.element_size() for t in written)
    assert copy.tensors["model/p0"].tensor.numel() == 0
    assert copy.tensors["model/p0"].boxes == ()
    assert list(copy.tensors) == list(state.tensors)
    for name, local in state.tensors.items():
        if name != "model/p0":
            assert torch.equal(copy.tensors[name].tensor, local.tensor), name
    assert copy.scalars == state.scalars
    assert len({room.data_ptr() // PAGESIZE for room in memory.rooms.values()}) > 2
    # CUDA is given whole pages, and torch looks at the first one to see whether memory is pinned
    assert {room.untyped_storage().data_ptr() % PAGESIZE for room in memory.rooms.values()} == {0}
    assert memory.fits(state)
    assert not memory.fits(collect(model))


def fail_once(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """The disk is full in the middle of the first file that `rank` writes."""
    write, left = checkpoint.store.write_tensors, [1]

    def full(path: Path, entries: list[tuple[str, torch.Tensor]]) -> FileRecord:
        if path.name == f"rank-{rank:05d}.safetensors" and left:
            left.clear()
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return write(path, entries)

    monkeypatch.setattr(checkpoint.store, "write_tensors", full)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_any_rank_is_one_sentence_on_all_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, asynchronous: bool
) -> None:
    fail_once(monkeypatch, rank)

    def work(peers: Peers) -> list[str | None]:
        model = shard(2, peers.rank)
        beside = saver(tmp_path, peers, asynchronous=asynchronous)
        for step in (1, 2):
            beside.start(step, collect(model), {})
        beside.finish()
        return [saved.failure for saved in beside.results()]

    one, two = on_threads(2, work)
    assert one == two
    assert "No space left on device" in one[0]
    assert one[1] is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_unforeseen_failure_beside_training_is_said_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(background, "save", broken)
    beside, at_once = saver(tmp_path), saver(tmp_path, asynchronous=False)
    beside.start(3, collect(Tiny()), {})
    beside.finish()
    (saved,) = beside.results()
    assert saved.failure is not None
    assert "step-00000003: Connection closed by peer" in saved.failure
    with pytest.raises(RuntimeError, match="Connection closed"):
        at_once.start(3, collect(Tiny()), {})


def test_a_checkpoint_in_flight_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, go_on = threading.Event(), threading.Event()
    complete = checkpoint.store._complete

    def late(*args: Any) -> None:
        written.set()
        assert go_on.wait(30)
        complete(*args)

    save(tmp_path, 1, collect(Tiny()), {})
    monkeypatch.setattr(checkpoint.store, "_complete", late)
    beside = saver(tmp_path)
    beside.start(2, collect(Tiny()), {})
    assert written.wait(30)  # every byte of the tensors is there
    assert (tmp_path / "step-00000002.tmp" / "rank-00000.safetensors").is_file()
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    go_on.set()
    beside.finish()
    assert find_latest(tmp_path) == tmp_path / "step-00000002"


def test_real_ranks_save_between_the_collectives_of_training(tmp_path: Path) -> None:
    run_ranks(check_real_ranks, 2, tmp_path, tmp_path / "checkpoints")


def check_real_ranks(folder: Path) -> None:
    rank, peers = dist.get_rank(), own_peers(2)
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else CPU
    model = shard(2, rank).to(device)
    beside = Saver(folder, device, peers)
    kept: list[torch.Tensor] = []
    delay(beside, 0.3 * rank)  # so that rank 0 waits, in its thread, while training goes on
    for step in range(1, 4):
        with torch.no_grad():
            model.qkv.weight.add_(1)
        kept.append(model.qkv.weight.detach().clone())
        beside.start(step, collect(model), {})
        for number in range(50):
            total = torch.tensor([number + rank], dtype=torch.float64, device=device)
            dist.all_reduce(total)
            assert total.item() == 2 * number + 1
    beside.finish()
    results = beside.results()
    assert [(saved.step, saved.failure) for saved in results] == [(1, None), (2, None), (3, None)]
    assert find_latest(folder, Peers(dist.group.WORLD)) == folder / "step-00000003"
    for step in (2, 3):
        restore(folder / f"step-{step:08d}", model, torch.optim.AdamW(model.parameters()))
        assert torch.equal(model.qkv.weight, kept[step - 1])


def delay(beside: Saver, seconds: float) -> None:
    write: Callable[..., None] = beside._write

    def late(*args: Any) -> None:
        time.sleep(seconds)
        write(*args)

    beside._write = late  # type: ignore[method-assign]


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{"fused": True}, {}])
def test_a_gpu_is_copied_into_pinned_memory_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, optimizer = trained()
    path = save(tmp_path / "cpu", 2, collect(model, optimizer), {})
    model = Tiny().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **kwargs)
    restore(path, model, optimizer)
    model.register_parameter("large", torch.nn.Parameter(torch.randn(1 << 24, device=device)))
    state = collect(model, optimizer)
    save(tmp_path / "one", 2, state, {})
    gate, beside = Gate(monkeypatch), Saver(tmp_path / "two", device, Peers())
    beside.prepare(state)
    beside.start(2, state, {})
    spoil(state)
    gate.opened.set()
    beside.finish()
    assert beside.memory is not None
    pageable = [name for name, room in beside.memory.rooms.items() if not room.is_pinned()]
    assert not pageable, f"{pageable} of {len(beside.memory.rooms)} are not page-locked"
    assert [saved.failure for saved in beside.results()] == [None]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    beside.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_real_gpus_save_between_the_collectives_of_training(tmp_path: Path) -> None:
    run_ranks(check_real_ranks, 2, tmp_path, tmp_path / "checkpoints", backend="nccl")
