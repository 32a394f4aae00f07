"""Starting a compiled kernel again with little Python: what differs is addresses and the stream.

A Triton launch ends in one call of a C function. `record` makes Triton's own launcher show what it
would hand to that function, once; a Restart then calls it itself, with the addresses of other
tensors and the current stream. The copy engine's descriptors hold an address and nothing else that
changes, so one is made per address, and addresses come back in training.

It works alike where launchers look different (Triton 3.6: one long argument list, 3.7: the kernel's
arguments as a list within). A launcher it does not know is left to do its work itself, more slowly.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

Tensors = Mapping[str, Any]
MOST_DESCRIPTORS = 512  # per argument; 128 bytes each
STREAM = 3  # its place among the C function's arguments


class Restart:
    """One compiled kernel with all its arguments but addresses and the stream.

    Args:
        start: the C function; `arguments`: its arguments; `inner`: the list behind them, if any.
        pointers, blocks: where in the last of the two lists an address and a descriptor go.
        whole: Triton's own launch.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        arguments: list[Any],
        inner: list[Any] | None,
        pointers: list[tuple[int, str]],
        blocks: list[tuple[int, str, Callable[[Tensor], Any]]],
        whole: Callable[[Tensors], None],
    ) -> None:
        self.start, self.arguments, self.inner, self.whole = start, arguments, inner, whole
        self.pointers = pointers
        self.blocks: list[tuple[int, str, Callable[[Tensor], Any], dict[int, Any]]] = [
            (place, name, make, {}) for place, name, make in blocks
        ]
        self.hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        self.device = driver.active.get_current_device()
        self.stream_of = driver.active.get_current_stream

    def __call__(self, tensors: Tensors) -> None:
        for hook in self.hooks:
            if hook.calls:  # a profiler wants to know of each launch
                self.whole(tensors)
                return
        arguments = self.arguments.copy()
        values = arguments if self.inner is None else self.inner.copy()
        for place, name in self.pointers:
            values[place] = tensors[name].data_ptr()
        for place, name, make, known in self.blocks:
            tensor = tensors[name]
            address = tensor.data_ptr()
            block = known.get(address)
            if block is None:
                if len(known) >= MOST_DESCRIPTORS:
                    known.clear()
                block = known[address] = make(tensor)
            values[place] = block
        arguments[STREAM] = self.stream_of(self.device)
        if self.inner is None:
            self.start(*arguments)
        else:
            self.start(*arguments, values)


def record(
    compiled: Any,
    grid: tuple[int, int, int],
    bound: list[Any],
    pointers: list[str],
    blocks: Sequence[tuple[str, Callable[[Tensor], Any]]],
    whole: Callable[[Tensors], None],
) -> Callable[[Tensors], None]:
    """A Restart of a compiled kernel, or `whole` where its launcher is of an unknown kind.

    Args:
        bound: the kernel's arguments of a first call.
        pointers: names of the tensors among them, in order.
        blocks: name and maker of the descriptors among them, in order.
        whole: launches for other tensors by Triton's own means.
    """
    launcher = compiled.run
    launch = getattr(launcher, "launch", None)
    encode: Any = getattr(launch, "__globals__", {}).get("make_tensordesc_arg")
    cells = dict(zip(_free_names(launch), getattr(launch, "__closure__", None) or (), strict=True))
    if launch is None or (blocks and (encode is None or "launcher" not in cells)):
        return whole
    metas = cells["tensordesc_meta"].cell_contents if blocks else []
    start = cells["launcher"].cell_contents if blocks else launch
    shown: list[tuple[Any, ...]] = []
    here = threading.get_ident()

    def show(*arguments: Any) -> Any:
        if threading.get_ident() != here:
            return start(*arguments)
        return shown.append(arguments)

    try:
        if blocks:
            cells["launcher"].cell_contents = show
        else:
            launcher.launch = show
        compiled[grid](*bound)
    finally:
        if blocks:
            cells["launcher"].cell_contents = start
        else:
            launcher.launch = start
    arguments, inner = list(shown[0]), None
    if isinstance(arguments[-1], list | tuple):
        inner = list(arguments.pop())
    values = arguments if inner is None else inner
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    for i, value in enumerate(arguments):
        if any(value is hook for hook in hooks) or type(value).__name__ == "LazyDict":
            arguments[i] = None  # what the hooks get; without hooks nobody reads it
    at = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    makers = [_encoder(make, encode, meta) for (_, make), meta in zip(blocks, metas, strict=True)]
    given = [value for value in bound if isinstance(value, TensorDescriptor)]
    kinds = {type(encode(x, meta)[0]) for x, meta in zip(given, metas, strict=True)}
    maps = [i for i, value in enumerate(values) if type(value) in kinds]
    if len(at) != len(pointers) or len(maps) != len(blocks):
        return whole
    for i in at + maps:
        values[i] = None  # keeps no memory alive
    return Restart(
        start,
        arguments,
        inner,
        list(zip(at, pointers, strict=True)),
        [(i, name, make) for i, (name, _), make in zip(maps, blocks, makers, strict=True)],
        whole,
    )


def _free_names(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_freevars


def _encoder(
    make: Callable[[Tensor], Any], encode: Callable[[Any, Any], list[Any]], meta: Any
) -> Callable[[Tensor], Any]:
    """From a tensor to what the driver calls a tensor map: the first of Triton's arguments."""
    return lambda tensor: encode(make(tensor), meta)[0]
