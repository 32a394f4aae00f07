"""Runs Gluon kernels for Hopper on the CPU: slow, small, and strict about synchronisation.

Gluon has no interpreter. Here the Python source of a kernel runs as it is, with `gl`, `tma`,
`mbarrier` and the tensor-core products replaced: a program is one thread per partition of
`warp_specialize`, and copies finish on threads of their own after a random delay. It raises on

    a wait that never ends (with the barrier's state), a barrier that gets too many arrivals,
    a product or a copy whose shared memory is overwritten before it is done,
    the result of a product used before it was waited for,
    shared memory handed to the copy engine or to another partition without a proxy fence.

Memory is poisoned with NaN: shared memory at first and again when a load into it is issued, so
a load issued too early shows in the result. Layouts, registers and speed are not emulated.
"""

import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from kernels.attention.hopper import masks, runs, shim
from kernels.attention.hopper.launch import Launch, Tensors

PATIENCE = 20.0  # seconds a wait may take
SHORTEST_DELAY, LONGEST_DELAY = 0.0, 2e-3  # seconds a copy takes, mostly
NAP, NAPS = 2e-2, 0.03  # seconds now and then, at this share of all copies and waits


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are in."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def add(self, arrivals: int, announced: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += announced
            assert self.missing >= 0, "more arrivals at a barrier than its count in one phase"
            if self.missing == 0 and self.bytes == 0:
                self.phase += 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE)
        assert done, (
            f"a wait for parity {int(parity)} never ended: phase {self.phase},"
            f" {self.missing} of {self.count} arrivals and {self.bytes} bytes missing"
        )


class Shared:
    """A view of shared memory, or of an array of barriers."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def index(self, i: Any) -> Any:
        item = self.data[int(i)]
        return item if isinstance(item, Barrier) else Shared(item)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.data.contiguous().view(-1).view(dtype).view(shape))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert self.data.shape == value.shape and self.data.dtype == value.dtype
        self.data.copy_(value)
        if self.data.dtype != torch.int32:  # a ticket: read by ordinary loads
            _mine.unfenced = True


class Pointer:
    """A tensor's memory from an offset on."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """A TensorDescriptor: blocks that start anywhere, zeros outside."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.view = torch.as_strided(host.base, host.shape, host.strides)
        self.block_shape = list(host.block_shape)
        self.dtype = host.base.dtype
        self.layout = host.layout
        size = torch.Size(host.block_shape).numel() * host.base.itemsize
        self.block_type = types.SimpleNamespace(nbytes=size)

    def inside(self, at: list[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor under the block at `at`, and where in the block it lies."""
        here, there = [], []
        for start, size, block in zip(at, self.view.shape, self.block_shape, strict=True):
            low, high = max(0, int(start)), min(size, int(start) + block)
            here.append(slice(low, max(low, high)))
            there.append(slice(low - int(start), max(low, high) - int(start)))
        return self.view[tuple(here)], tuple(there)

    def read(self, at: list[Any]) -> Tensor:
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        part, there = self.inside(at)
        block[there] = part
        return block


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


class Product:
    """A tensor-core product in flight: computed at its issue, and again when it is waited for."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.value, self.done = compute, compute(), False

    def finish(self) -> None:
        assert _same(self.value, self.compute()), "an operand changed while a product read it"
        self.done = True


class _Mine(threading.local):
    """What belongs to one partition of one program."""

    def __init__(self) -> None:
        self.program = 0
        self.programs = 1
        self.products: list[Product] = []
        self.stores: list[tuple[threading.Thread, threading.Event]] = []
        self.failures: list[BaseException] = []
        self.unfenced = False


_mine = _Mine()
_atomic = threading.Lock()


def _nap() -> None:
    """Lets the others run ahead as far as the barriers let them."""
    if random.random() < NAPS:
        time.sleep(NAP)


def _later(work: Callable[[], None]) -> threading.Thread:
    failures = _mine.failures

    def run() -> None:
        time.sleep(max(SHORTEST_DELAY, random.uniform(0, LONGEST_DELAY)))
        _nap()
        _catch(failures, work)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _catch(failures: list[BaseException], work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as failure:
        failures.append(failure)


def _mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    start = acc.value if isinstance(acc, Product) else acc

    def compute() -> Tensor:
        left = a.data if isinstance(a, Shared) else a
        product = left.float() @ b.data.float()
        assert product.shape == start.shape
        return product + start if use_acc else product

    assert not _mine.unfenced, "shared memory written and not fenced before a product"
    product = Product(compute)
    _mine.products.append(product)
    return product


def _mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    while len(_mine.products) > outstanding:
        _mine.products.pop(0).finish()
    assert all(dep.done for dep in deps), "waited for a product, but not long enough"
    values = tuple(dep.value for dep in deps)
    return values[0] if len(values) == 1 else values


def _load(desc: Descriptor, at: list[Any], barrier: Barrier, target: Shared) -> None:
    assert list(target.data.shape) == desc.block_shape and target.data.dtype == desc.dtype
    target.data.fill_(float("nan"))
    at = [int(place) for place in at]

    def work() -> None:
        target.data.copy_(desc.read(at))
        barrier.add(0, -desc.block_type.nbytes)

    _later(work)


def _store(desc: Descriptor, at: list[Any], source: Shared, add: bool = False) -> None:
    assert not _mine.unfenced, "shared memory written and not fenced before a copy"
    assert list(source.data.shape) == desc.block_shape and source.data.dtype == desc.dtype
    issued = source.data.clone()
    at = [int(place) for place in at]

    read = threading.Event()

    def work() -> None:
        assert _same(issued, source.data), "shared memory changed while a copy was reading it"
        read.set()
        time.sleep(random.uniform(SHORTEST_DELAY, LONGEST_DELAY))
        with _atomic:
            part, there = desc.inside(at)
            part.copy_(part + issued[there] if add else issued[there])

    _mine.stores.append((_later(work), read))


def _store_wait(pendings: int) -> None:
    """Until all but so many have read shared memory; what they write may come later."""
    for _, read in _mine.stores[: len(_mine.stores) - pendings]:
        read.wait(PATIENCE)


def _written() -> None:
    while _mine.stores:
        _mine.stores.pop(0)[0].join(PATIENCE)


def _fence(cluster: bool = False) -> None:
    _mine.unfenced = False


def _wait(barrier: Barrier, parity: int) -> None:
    barrier.wait(parity)
    _nap()


def _arrive(barrier: Barrier, count: int = 1) -> None:
    assert not _mine.unfenced, "shared memory written and not fenced before an arrival"
    barrier.add(count, 0)


def _specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
    program, programs, failures = _mine.program, _mine.programs, _mine.failures

    def run(function: Any, arguments: tuple[Any, ...]) -> None:
        _mine.program, _mine.programs, _mine.failures = program, programs, failures
        _catch(failures, lambda: function(*arguments))
        _written()  # a kernel ends when all is written

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barrier() if len(shape) == 1 else Shared([Barrier() for _ in range(shape[0])])
    poison = float("nan") if dtype.is_floating_point else -1
    return Shared(torch.full(shape, poison, dtype=dtype))


def _gl_load(
    pointer: Pointer,
    mask: Any = None,
    other: float = 0.0,
    cache_modifier: str = "",
    volatile: bool = False,
) -> Tensor:
    at = torch.as_tensor(pointer.offset)
    if mask is None:
        return pointer.memory[at]
    mask = mask.broadcast_to(at.shape)
    value = pointer.memory[torch.where(mask, at, 0)]
    return torch.where(mask, value, torch.tensor(other, dtype=value.dtype))


def _gl_store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at = torch.as_tensor(pointer.offset)
    value = torch.as_tensor(value, dtype=pointer.memory.dtype).broadcast_to(at.shape)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.broadcast_to(at.shape)
    pointer.memory[at[mask]] = value[mask]


def _atomic_add(pointer: Pointer, value: Any, sem: str = "") -> Tensor:
    at = torch.as_tensor(pointer.offset)
    with _atomic:
        before = pointer.memory[at].clone()
        pointer.memory[at] += value
    return before


def _atomic_exchange(pointer: Pointer, value: int, sem: str = "") -> None:
    with _atomic:
        pointer.memory[pointer.offset] = value


def _pair(function: Callable[..., Tensor], plain: Callable[..., Any]) -> Callable[..., Any]:
    def either(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return function(torch.as_tensor(a), torch.as_tensor(b))
        return plain(a, b)

    return either


def _tanh(x: Tensor) -> Tensor:
    """As wrong as the instruction may be: 2 ** -11 of the value, now up, now down."""
    return x.tanh() * (1 + 2.0**-11 * (2 * torch.rand(x.shape) - 1))


def _keep_run(
    x: Tensor, first: Any, limit: Any, other: int, has_first: bool, has_limit: bool, clear: int = 0
) -> Tensor:
    columns = torch.arange(x.shape[1])
    keep = torch.ones_like(x, dtype=torch.bool)
    if has_first:
        keep &= columns[None, :] >= first[:, None]
    if has_limit:
        keep &= columns[None, :] < limit[:, None]
    keep[:, :clear] = True
    bits = torch.tensor(other, dtype=torch.int64).to(torch.int32)
    return torch.where(keep, x, bits.view(torch.float32))


def _no_layout(*_: Any, **__: Any) -> None:
    return None


_GL = types.SimpleNamespace(
    **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64")},
    **dict.fromkeys(
        (
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "BlockedLayout",
            "DistributedLinearLayout",
        ),
        _no_layout,
    ),
    SwizzledSharedLayout=_no_layout,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=_no_layout),
    allocate_shared_memory=_allocate,
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    convert_layout=lambda value, layout, assert_trivial=False: value,
    where=lambda mask, a, b: torch.where(torch.as_tensor(mask), a, b),
    maximum=_pair(torch.maximum, max),
    minimum=_pair(torch.minimum, min),
    max=lambda value, axis: value.amax(axis),
    min=lambda value, axis: value.amin(axis),
    sum=lambda value, axis: value.sum(axis),
    cast=lambda value, dtype: torch.as_tensor(value, dtype=dtype),
    broadcast=torch.broadcast_tensors,
    join=lambda a, b: torch.stack((a, b), -1),
    split=lambda x: x.unbind(-1),
    exp2=torch.exp2,
    log2=torch.log2,
    cdiv=lambda a, b: -(-a // b),
    program_id=lambda axis: torch.tensor(_mine.program),
    num_programs=lambda axis: _mine.programs,
    static_range=range,
    load=_gl_load,
    store=_gl_store,
    atomic_add=_atomic_add,
    atomic_xchg=_atomic_exchange,
    warp_specialize=_specialize,
)
_REPLACED = {
    id(gl): _GL,
    id(tl): _GL,
    id(hopper.mbarrier): types.SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.add(1, size),
        wait=_wait,
        arrive=_arrive,
    ),
    id(hopper.tma): types.SimpleNamespace(store_wait=_store_wait),
    id(hopper.fence_async_shared): _fence,
    id(hopper.warpgroup_mma): _mma,
    id(hopper.warpgroup_mma_wait): _mma_wait,
    id(masks.tanh): _tanh,
    id(runs.keep_run): _keep_run,
    id(shim.tma_load): _load,
    id(shim.tma_store): _store,
    id(shim.barrier): lambda: None,  # the threads of a partition are one
    id(shim.tma_add): lambda desc, at, source: _store(desc, at, source, add=True),
}


def _emulated(function: Any, known: dict[int, Any]) -> Callable[..., Any]:
    """The kernel's own Python code over the replaced names."""
    if id(function) in known:
        return known[id(function)]
    names: dict[str, Any] = {}
    plain = types.FunctionType(function.fn.__code__, names, argdefs=function.fn.__defaults__)
    known[id(function)] = plain
    for name, value in function.fn.__globals__.items():
        if isinstance(value, gl.constexpr):
            names[name] = value.value
        elif id(value) in _REPLACED:
            names[name] = _REPLACED[id(value)]
        elif isinstance(value, GluonJITFunction | JITFunction):
            names[name] = _emulated(value, known)
        else:
            names[name] = value
    return plain


def emulate(launch: Launch, tensors: Tensors) -> None:
    """Run a launch on CPU tensors, all its programs at the same time.

    Raises:
        AssertionError: the kernel breaks a rule of synchronisation; see the top of this file.
    """
    kernel = _emulated(launch.kernel, {})
    arguments = {}
    for name, value in launch.bind(tensors).items():
        if isinstance(value, TensorDescriptor):
            arguments[name] = Descriptor(value)
        elif isinstance(value, Tensor):
            size = value.untyped_storage().size() // value.itemsize
            memory = torch.as_strided(value, (size,), (1,), 0)
            arguments[name] = Pointer(memory, value.storage_offset())
        else:
            arguments[name] = value
    failures: list[BaseException] = []

    def run(program: int) -> None:
        _mine.program, _mine.programs, _mine.failures = program, launch.grid[0], failures
        _catch(failures, lambda: kernel(**arguments))

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(launch.grid[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
