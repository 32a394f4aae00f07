"""`torch.library` ops that cost the host little: a step of training calls hundreds.

`torch.library.custom_op` runs 8 us of Python around each call: a look at whether a result shares
memory with an argument, an autograd function, a compiler switched off. An op defined here is the
function itself behind PyTorch's dispatcher, 3 us (one core of a server, torch 2.11 and 2.13,
2026-11-27), and differs in three ways:

- Nobody looks whether a result shares memory with an argument, which it must not.
  `torch.library.opcheck` looks, and the tests call it for each op.
- Without a formula for its gradient an op refuses arguments that want one where autograd records;
  custom_op would say so in backward. `register_autograd` brings a formula, and with it 4 us a call.
  Under torch.func, which hides from the op that one is wanted, PyTorch only warns.
- Results are made by the function alone: keyword-only arguments and lists of tensors are not meant.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._ops import OpOverload
from torch.library import Library

Function = Callable[..., Any]
_libraries: dict[str, Library] = {}  # of each op, which lasts as long as the library it is in


def operation(
    name: str, mutates_args: Iterable[str] = (), schema: str | None = None
) -> Callable[[Function], OpOverload]:
    """Decorates a function of tensors and numbers, on any device, which then is an op.

    Args:
        name: "namespace::name".
        mutates_args: names of the tensors that it writes. Autograd and torch.compile learn of it.
        schema: "(..) -> .."; default: what the function's annotations say.
    """
    namespace, _, short = name.partition("::")
    mutated = tuple(mutates_args)

    def define(function: Function) -> OpOverload:
        if name in _libraries:  # its module is loaded again, as notebooks do: the new one counts
            _libraries.pop(name)._destroy()
        library = _libraries[name] = Library(namespace, "FRAGMENT")
        signature = schema or torch.library.infer_schema(function, mutates_args=mutated)
        library.define(short + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(short, _loud(function, name), "CompositeExplicitAutograd")
        op: OpOverload = getattr(getattr(torch.ops, namespace), short).default
        if mutated:
            names = [argument.name for argument in op._schema.arguments]
            kernel = _counting(op, [names.index(argument) for argument in mutated])
            library.impl(short, kernel, "ADInplaceOrView", with_keyset=True)
        return op

    return define


def register_fake(op: OpOverload) -> Callable[[Function], Function]:
    """Decorates what gives an op's results without their numbers, for torch.compile."""

    def register(function: Function) -> Function:
        fake = _loud(function, op.name())
        torch.library.register_fake(op, fake, lib=_libraries[op.name()])
        return function

    return register


def register_autograd(op: OpOverload, gradients: Function, **options: Any) -> None:
    """torch.library's, of the same name, in the library of the op."""
    torch.library.register_autograd(op, gradients, lib=_libraries[op.name()], **options)


def _loud(function: Function, name: str) -> Function:
    """The function, which below autograd would lose a gradient without a word."""

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            raise RuntimeError(
                f"{name} has no formula for its gradient: call it within an autograd function, or "
                "under torch.no_grad()"
            )
        return function(*arguments)

    return _uncompiled(kernel)


def _counting(op: OpOverload, mutated: list[int]) -> Function:
    """Tells autograd of each write, so that backward refuses what it had kept of the tensor."""

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        for place in mutated:
            torch.autograd.graph.increment_version(arguments[place])
        return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return _uncompiled(kernel)


def _uncompiled(kernel: Function) -> Function:
    """Where a compiler gave up on a caller it would try this, and kernels and all below."""
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(kernel.__code__, skip)
    return kernel
