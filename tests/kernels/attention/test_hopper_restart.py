"""Restarts of Hopper kernels: Triton's own launcher over a driver that only writes down."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from kernels.attention.hopper import api, plan
from kernels.attention.hopper.launch import Launch
from kernels.attention.hopper.restart import Restart
from kernels.attention.hopper.tiles import FORWARD


class Card:
    """A driver and a compiled kernel; `started` holds what reached the C function."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started: list[list[Any]] = []
        self.encoded: list[int] = []
        self.stream = 7
        utils = SimpleNamespace(
            fill_tma_descriptor=self._fill, fill_tma_descriptor_tiled=self._fill
        )
        active = SimpleNamespace(
            utils=utils,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: self.stream,
        )
        patch.setattr(driver, "_active", active)

    def _fill(self, address: int, *layout: Any) -> Any:
        self.encoded.append(address)
        return Map(address)

    def _start(self, *arguments: Any) -> None:
        *head, last = arguments
        flat = [*head, *last] if isinstance(last, list | tuple) else [*head, last]
        self.started.append([_plain(value) for value in flat])

    def kernel(self, arg_names: list[str]) -> Any:
        """Stands in for a kernel: compiles to something that writes down."""

        def compile_and_run(grid: Any, *values: Any) -> CompiledKernel:
            described = [isinstance(value, TensorDescriptor) for value in values]
            signature = {i: "tensordesc<>" if yes else "i32" for i, yes in enumerate(described)}
            meta = dict.fromkeys(("swizzle", "elem_size", "elem_type", "block_size"), 2)
            metas = [{**meta, "fp4_padded": False}] * sum(described)
            run = object.__new__(CudaLauncher)
            run.launch = wrap_handle_tensordesc(self._start, signature, metas)
            run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
            run.arg_annotations, run.kernel_signature = [], b""
            run.global_scratch_size = run.global_scratch_align = 0
            run.profile_scratch_size = run.profile_scratch_align = 0
            compiled = object.__new__(CompiledKernel)
            vars(compiled).update(
                _run=run, module=1, function=2, packed_metadata=(4, 1, 9), src=None, name="kernel"
            )
            compiled[grid](*values)
            return compiled

        class Kernel:
            def __init__(self) -> None:
                self.arg_names = arg_names

            def __getitem__(self, grid: Any) -> Any:
                return lambda **call: compile_and_run(grid, *(call[name] for name in arg_names))

        return Kernel()


class Map:
    """A descriptor as the driver makes them."""

    def __init__(self, address: int) -> None:
        self.address = address


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, Map):
        return ("map", value.address)
    # the hooks and what they get: nobody is there to read them
    return None if type(value).__name__ in ("HookChain", "LazyDict") else value


def tensors_of(T: int) -> dict[str, Tensor | None]:
    q, k, v = (torch.randn(1, T, 2, 128, dtype=torch.bfloat16) for _ in range(3))
    counter = torch.zeros(1, dtype=torch.int32)
    made = plan.forward_buffers(q)
    return dict(q=q, k=k, v=v, slopes=None, sinks=None, bounds=None, counter=counter, **made)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def launch(card: Card) -> Launch:
    tensors = tensors_of(256)
    options = plan.Options(causal=True, scale=0.1)
    made = plan.plan_forward(tensors["q"], tensors["k"], options, FORWARD[128, True], 3)
    made.kernel = card.kernel(made.kernel.arg_names)
    made.run(tensors)
    assert len(card.started) == 1  # the recording starts nothing
    assert isinstance(made.again, Restart)
    return made


def test_another_call_hands_over_what_triton_would(card: Card, launch: Launch) -> None:
    others = tensors_of(256)
    card.stream = 8
    assert isinstance(launch.again, Restart)
    launch.again(others)
    launch.again.whole(others)
    ours, tritons = card.started[-2:]
    assert ours == tritons
    assert others["lse"] is not None and others["lse"].data_ptr() in ours
    assert card.started[0] != ours


def test_one_descriptor_is_made_per_address(card: Card, launch: Launch) -> None:
    first, second = tensors_of(256), tensors_of(256)
    before = len(card.encoded)
    for _ in range(3):
        launch.run(first)
        launch.run(second)
    assert len(card.encoded) == before + 8  # q, k, v, out
    assert card.started[-1] == card.started[-3] != card.started[-2]


def test_profilers_see_every_launch(card: Card, launch: Launch) -> None:
    seen: list[Any] = []
    assert isinstance(launch.again, Restart)
    whole = launch.again.whole
    launch.again.whole = lambda tensors: (seen.append(1), whole(tensors))[1]
    hook = knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        launch.run(tensors_of(256))
    finally:
        hook.remove(print)
    launch.run(tensors_of(256))
    assert len(seen) == 1


def test_no_tensor_is_kept_alive(launch: Launch) -> None:
    assert isinstance(launch.again, Restart)
    kept = [*launch.again.arguments, *(launch.again.inner or [])]
    assert not [value for value in kept if isinstance(value, Tensor | Map | TensorDescriptor)]


def test_kernels_without_descriptors_restart_too(card: Card) -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    tile = plan.choose_backward(64, True, 64)
    launches = plan.plan_backward(q, q, q, plan.Options(causal=True, scale=0.1), tile, 3)
    cast = launches[2]
    cast.kernel = card.kernel(cast.kernel.arg_names)
    for _ in range(2):
        made: dict[str, Tensor | None] = {**plan.backward_buffers(q, q, tile)}
        cast.run(made)
    assert isinstance(cast.again, Restart)
    cast.again.whole(made)
    assert card.started[-1] == card.started[-2] != card.started[0]


def test_calls_of_one_layout_are_planned_once(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two passes as the dispatch calls them; tensors of the CPU are of device -1."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(api, "_n_sm", lambda device: 3)
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(api, "_counters", {(-1, card.stream): counter})
    for plans in ("_forward_plans", "_backward_plans"):
        monkeypatch.setattr(api, plans, {})
    for name in ("attention_fwd_kernel", "prepare_rows_kernel", "attention_bwd_kernel"):
        monkeypatch.setattr(plan, name, card.kernel(getattr(plan, name).arg_names))
    monkeypatch.setattr(plan, "cast_dq_kernel", card.kernel(plan.cast_dq_kernel.arg_names))
    bounds = torch.zeros(1, 2, 256, dtype=torch.int32)
    sinks = torch.zeros(2)

    def passes(tensors: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, ...]:
        q, k, v = (tensors[name] for name in "qkv")
        call: dict[str, Any] = dict(causal=True, scale=0.1, **options)
        out, lse = api.forward(q, k, v, **call)
        above = torch.ones(1, dtype=out.dtype).expand_as(out)  # as of a sum: copied
        return api.backward(above, None, q, k, v, out, lse, **call)

    for options in ({}, {"before": 50, "softcap": 20.0, "bounds": bounds}, {"sinks": sinks}):
        grads = passes(tensors_of(256), **options)
        again = passes(tensors_of(256), **options)
        assert len(grads) == len(again) == (4 if "sinks" in options else 3)
    assert len(api._forward_plans) == 3
    assert len(api._backward_plans) == 2  # a sink is in lse
    assert len(card.started) == 3 * 2 * 4

    odd = tensors_of(256)
    whole = torch.randn(1, 256, 2, 136, dtype=torch.bfloat16)
    odd["q"] = whole[..., 4:132]  # off by 8 bytes: copied, and then laid out as the first
    passes(odd)
    assert len(api._forward_plans) == 3
    assert len(api._backward_plans) == 2
    started = [value for arguments in card.started[-4:] for value in arguments]
    assert ("map", odd["q"].data_ptr()) not in started
