"""Block inputs that wait on the host: the same numbers, and no more of them on the device."""

import pytest
import torch
from torch import Tensor

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.data.loader import Batch
from flashtrain.engine import native
from flashtrain.engine.native import NativeEngine
from flashtrain.engine.offload import Entry, Offload, offload_inputs, pin
from flashtrain.model.gpt import GPT
from flashtrain.parallel.mesh import ALONE, SINGLE

CPU, LAYERS = torch.device("cpu"), 5


def engine(*overrides: str, device: torch.device = CPU) -> NativeEngine:
    config = load(
        ["data=random", "model.vocabulary=64", "model.d_model=32", f"model.n_layers={LAYERS}",
         "data.sequence_length=16", "data.batch_size=8", "trainer.recompute=full", *overrides]
    )  # fmt: skip
    return NativeEngine(build_model(config, SINGLE, device), config, ALONE, device)


def batch(seed: int, device: torch.device = CPU) -> Batch:
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed)).to(device)
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone())


def gradients(one: NativeEngine, device: torch.device = CPU) -> list[Tensor]:
    one.forward_backward([batch(seed, device) for seed in (0, 1)])
    return [p.grad.clone() for p in one.model.parameters() if p.grad is not None]


@pytest.fixture
def offloads(monkeypatch: pytest.MonkeyPatch) -> list[Offload]:
    """Those that engines make from now on."""
    made: list[Offload] = []

    def make(model: GPT, device: torch.device, newest: int) -> None:
        made.append(offload_inputs(model, device, newest))

    monkeypatch.setattr(native, "offload_inputs", make)
    return made


@pytest.mark.parametrize(("compiled", "stay"), [(False, 1), (True, 1), (False, 3), (False, 9)])
def test_gradients_are_the_same(compiled: bool, stay: int, offloads: list[Offload]) -> None:
    plain, other = (
        engine("trainer.compile=false", *offloaded)
        for offloaded in ([], ["trainer.offload_activations=true", f"trainer.offload_keep={stay}"])
    )
    if compiled:
        for block in other.model.blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(other), gradients(plain), strict=True):
        assert torch.equal(ours, theirs)
    # every block's input and the final norm's, of the micro-batch alone: memory is used again
    assert len(offloads[0].rooms) == max(LAYERS + 1 - stay, 0)


@pytest.mark.parametrize("stay", [1, 2])
def test_what_stays_on_the_device_does_not_grow_with_depth(
    stay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device: set[Entry] = set()
    most = {"forward": 0, "backward": 0}
    backward = False

    class Watched(Entry):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "device":
                (on_device.discard if value is None else on_device.add)(self)
                stage = "backward" if backward else "forward"
                most[stage] = max(most[stage], len(on_device))

        def take(self) -> Tensor:
            nonlocal backward
            backward = True
            return super().take()

    monkeypatch.setattr("flashtrain.engine.offload.Entry", Watched)
    offloaded = ["trainer.offload_activations=true", f"trainer.offload_keep={stay}"]
    one = engine("trainer.compile=false", *offloaded)
    one.forward_backward([batch(0)])
    assert stay + 2 < LAYERS
    # one leaving and the newest one; one in use, or on its way
    assert most == {"forward": stay + 2, "backward": 2}
    assert not on_device


def test_pinned_memory_is_let_go_with_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[tuple[object, ...]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            did.append(("lock", address, size, flags))
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            did.append(("unlock", address))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: did.append(("error", error)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append(("wait", device)))
    room = torch.empty(3, 1000)
    address, device = room.data_ptr(), torch.device("cuda", 1)
    pin(room, device)
    assert did == [("lock", address, 12000, 0), ("error", 0)]
    del room
    assert did[2:] == [("wait", device), ("unlock", address)]


@pytest.mark.gpu
def test_the_gpu_keeps_less_and_computes_the_same() -> None:
    device = torch.device("cuda")
    sizes = ("model.d_model=1024", "model.n_heads=8", "model.n_layers=24", "model.d_ff=1024")
    results, peaks = [], []
    for on in ("false", "true"):
        one = engine(*sizes, "data.sequence_length=2048", f"trainer.offload_activations={on}",
                     device=device)  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(64, (4, 2049), generator=draw).to(device)
        wide = Batch(ids[:, :-1].clone(), ids[:, 1:].clone())
        one.forward_backward([wide])  # compiles; gradients and host memory are there from here on
        one.model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            one.forward_backward([wide])
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([p.grad.clone() for p in one.model.parameters() if p.grad is not None])
        del one
    for ours, theirs in zip(*results, strict=True):
        error = torch.linalg.vector_norm(ours - theirs)
        assert error <= 1e-2 * torch.linalg.vector_norm(theirs)  # atomics of bf16 backward
    one_input = 4 * 2048 * 1024 * 2
    assert peaks[0] - peaks[1] >= (24 - 5) * one_input
