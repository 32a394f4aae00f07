"""Which backend runs a call, and why: never a silent fallback, and a refusal is one sentence."""

import importlib
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.attention import sdpa, tiles
from kernels.attention.problem import Problem, describe

BACKENDS = ("auto", "hopper", "triton", "torch", "reference")
HOPPER = (9, 0)


@dataclass(frozen=True)
class Choice:
    """The backend of each pass. They may differ: out and lse mean the same in all of them."""

    forward: str
    backward: str
    why: str


@lru_cache(maxsize=4096)  # asked at every call; a problem is plain numbers
def resolve(problem: Problem, backend: str) -> Choice:
    """The backend for a problem.

    `auto` means, on a GPU: hopper where it supports the problem, else triton; on the CPU: torch
    where it supports the problem, else reference.

    Raises:
        ValueError: the backend is unknown or cannot compute the problem.
    """
    check_name(backend)
    if backend == "reference":
        return Choice("reference", "reference", "asked for by name")
    if backend == "hopper":
        _need(backend, _hopper_refusal(problem))
        return Choice("hopper", *_hopper_backward(problem))
    if backend in ("triton", "torch"):
        _need(backend, triton_refusal(problem) if backend == "triton" else sdpa.supports(problem))
        return Choice(backend, backend, "asked for by name")
    if problem.device.type == "cpu":
        reason = sdpa.supports(problem)
        name = "torch" if reason is None else "reference"
        return Choice(name, name, reason or "PyTorch's fused CPU kernel")
    reason = _hopper_refusal(problem)
    if reason is None:
        return Choice("hopper", *_hopper_backward(problem))
    _need("triton", triton_refusal(problem))
    return Choice("triton", "triton", f"not hopper: {reason}")


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str = "auto", **options: Any
) -> str:
    """Say in one line which backend `attention` would take for the same arguments, and why.

    Raises:
        ValueError: as `attention` would.
    """
    choice = resolve(describe(q, k, v, causal=causal, **options), backend)
    if choice.forward == choice.backward:
        return f"{choice.forward} ({choice.why})"
    return f"{choice.forward} forward, {choice.backward} backward ({choice.why})"


def check_name(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")


def _need(backend: str, refusal: str | None) -> None:
    if refusal is not None:
        raise ValueError(
            f"attention backend {backend!r} cannot run this call: {refusal};"
            " backend='reference' computes everything, slowly"
        )


def triton_refusal(problem: Problem) -> str | None:
    """Why the portable Triton kernels cannot compute a problem; None when they can."""
    device = problem.device
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs CUDA tensors, got cpu (for tests: set TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability < tiles.OLDEST:
            return f"it needs compute capability 8.0 or newer, this GPU has {_dotted(capability)}"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, got {problem.dtype}"
    sizes = (problem.head_size, problem.head_size, problem.value_size)
    for name, size, strides in zip("qkv", sizes, problem.strides, strict=True):
        if strides[3] != 1 and size > 1:
            return (
                f"the last dimension of {name} has stride {strides[3]}, not 1: make it contiguous"
            )
    return None


def hopper() -> ModuleType:
    """The Hopper kernels; imported only here, because Gluon exists in few versions of Triton."""
    return importlib.import_module("kernels.attention.hopper")


def _hopper_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"it needs CUDA tensors, got {problem.device.type}"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability != HOPPER:
        return f"it needs compute capability 9.0, this GPU has {_dotted(capability)}"
    features = {
        "bias": problem.bias,
        "key_mask": problem.key_mask,
        "dropout": problem.dropout > 0,
        f"values of {problem.value_size} under keys of {problem.head_size}": (
            problem.value_size != problem.head_size
        ),
    }
    unsupported = [name for name, used in features.items() if used]
    if unsupported:
        return f"it has no {', '.join(unsupported)}"
    missing = _hopper_missing()
    if missing is not None:
        return missing
    refusal: str | None = hopper().supports(problem)
    return refusal


@cache  # looking for a module takes longer than launching a kernel
def _hopper_missing() -> str | None:
    try:
        hopper()
    except ImportError as reason:
        return f"its kernels cannot be imported ({reason})"
    return None


def _hopper_backward(problem: Problem) -> tuple[str, str]:
    """The backward pass of a problem whose forward runs on hopper, and why."""
    judge = getattr(hopper(), "supports_backward", None)
    reason = judge(problem) if judge is not None else None
    if reason is None:
        return "hopper", "compute capability 9.0"
    _need("triton", triton_refusal(problem))
    return "triton", f"backward not hopper: {reason}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
