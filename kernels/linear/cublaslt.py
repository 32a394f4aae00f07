"""Products of cuBLASLt with epilogues that PyTorch does not offer, through the library it brings.

An epilogue is what a product does with its result before it leaves the registers: add a bias, take
its GELU and keep what went in, multiply by GELU's derivative, add up a gradient for the bias.

cuBLASLt counts matrices by columns. A row-major [N, F] is a column-major [F, N] with leading
dimension F, so D = Z^T is what is computed: its rows are features, its columns tokens.

    Z = X W^T       D [F, N] = W [F, K] X^T [K, N]        plus C; or aux Z, out gelu(Z)
    dW = dY^T X     D [K, F] = X^T [K, N] dY [N, F]       in fp32

Of fp8 it takes the first form alone, K contiguous on both sides, and A and B each times a scale.
The numbers below are those of cublasLt.h and library_types.h of CUDA 13.
"""

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORKSPACE = 32 << 20  # bytes; what PyTorch gives cuBLAS on Hopper
COMPUTE_FP32 = 68
MATMUL = (*(c_void_p,) * 14, c_size_t, c_void_p)  # what cublasLtMatmul takes
KINDS = {  # cudaDataType
    torch.float32: 0, torch.float16: 2, torch.bfloat16: 14,
    torch.float8_e4m3fn: 28, torch.float8_e5m2: 29,
}  # fmt: skip


class Epilogue(IntEnum):
    none = 1
    bias = 4
    gelu_aux = 160
    gelu_aux_bias = 164
    dgelu = 192  # times GELU's derivative of aux; scripts/bench_block.py times it


class _Of(IntEnum):
    """Attributes of a product's description."""

    transpose_a, transpose_b, epilogue, bias, aux, aux_ld = 3, 4, 7, 8, 11, 12
    scale_a, scale_b, fast = 17, 18, 25


class _Wish(IntEnum):
    """Attributes of a preference."""

    workspace, align_a, align_b, align_c, align_d = 1, 5, 6, 7, 8


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class UnsupportedError(RuntimeError):
    """The library has no way to compute a product."""


@dataclass(frozen=True)
class Matrix:
    """Column-major, as it lies in memory; `transposed`: used as its transpose."""

    rows: int
    columns: int
    dtype: torch.dtype
    transposed: bool = False


def row_major(x: Tensor, transposed: bool = False) -> Matrix:
    """A contiguous [n, m]. In column-major terms it is x^T; transposed: x."""
    return Matrix(x.shape[1], x.shape[0], x.dtype, transposed)


class Plan:
    """D = op(A) op(B) + C with an epilogue, for matrices of these sizes; see the module's text.

    choice: which of the library's ranked ways to take.
    fast: of fp8, keep fewer bits of partial sums.
    """

    def __init__(
        self, a: Matrix, b: Matrix, d: Matrix, epilogue: Epilogue, alignment: int, choice: int = 0,
        fast: bool = False,
    ) -> None:  # fmt: skip
        """Raises UnsupportedError where the library has no such way."""
        self.lock = threading.Lock()  # addresses are a part of the description
        self.handle, self.description = _handle(torch.cuda.current_device()), c_void_p()
        _check("MatmulDescCreate", byref(self.description), COMPUTE_FP32, KINDS[torch.float32])
        self._set(_Of.transpose_a, c_int32(int(a.transposed)))
        self._set(_Of.transpose_b, c_int32(int(b.transposed)))
        self._set(_Of.epilogue, c_uint32(epilogue))
        if epilogue not in (Epilogue.none, Epilogue.bias):
            self._set(_Of.aux_ld, c_int64(d.rows))
            self._set(_Of.aux, c_void_p(256))  # any address of that alignment
        if epilogue in (Epilogue.bias, Epilogue.gelu_aux_bias):
            self._set(_Of.bias, c_void_p(256))
        if a.dtype.itemsize == 1:
            self._set(_Of.fast, ctypes.c_int8(int(fast)))
            self._set(_Of.scale_a, c_void_p(256))
            self._set(_Of.scale_b, c_void_p(256))
        self.a, self.b, self.d = (_layout(matrix) for matrix in (a, b, d))
        found = self._ways(alignment, choice + 1)
        if len(found) <= choice:
            raise UnsupportedError(f"cuBLASLt has no way {choice} for {epilogue.name}: {a} {b} {d}")
        self.way = found[choice]
        # made once: a product costs the host as much as its arguments
        self.workspace, self.algorithm = self.way.workspace, byref(self.way)
        self.one, self.zero = byref(c_float(1.0)), byref(c_float(0.0))
        self.address = c_void_p()

    def run(
        self, a: Tensor, b: Tensor, d: Tensor, *,
        c: Tensor | None = None, aux: Tensor | None = None, bias: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """On the current stream.

        c: of d's shape and dtype, added; bias: in d's dtype; scales: of a and of b, one fp32 number
        each on the device, which fp8 must have.
        """
        size, workspace = self.workspace, None
        if size:
            workspace = torch.empty(size, dtype=torch.uint8, device=d.device)
        stream = torch._C._cuda_getCurrentRawStream(d.get_device())
        with self.lock:
            if aux is not None:
                self._point(_Of.aux, aux)
            if bias is not None:
                self._point(_Of.bias, bias)
            if scales is not None:
                self._point(_Of.scale_a, scales[0])
                self._point(_Of.scale_b, scales[1])
            _check(
                "Matmul",
                self.handle, self.description, self.one, a.data_ptr(), self.a, b.data_ptr(), self.b,
                self.zero if c is None else self.one, (d if c is None else c).data_ptr(), self.d,
                d.data_ptr(), self.d, self.algorithm,
                None if workspace is None else workspace.data_ptr(), size, stream,
            )  # fmt: skip

    def _point(self, attribute: int, tensor: Tensor) -> None:
        self.address.value = tensor.data_ptr()
        self._set(attribute, self.address)

    def _set(self, attribute: int, value: Any) -> None:
        _check(
            "MatmulDescSetAttribute",
            self.description, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)),
        )  # fmt: skip

    def _ways(self, alignment: int, count: int) -> list[_Heuristic]:
        preference = c_void_p()
        _check("MatmulPreferenceCreate", byref(preference))
        for wish in _Wish:
            is_room = wish is _Wish.workspace
            value: Any = c_uint64(WORKSPACE) if is_room else c_uint32(alignment)
            _check(
                "MatmulPreferenceSetAttribute",
                preference, c_int(wish), byref(value), c_size_t(ctypes.sizeof(value)),
            )  # fmt: skip
        results, returned = (_Heuristic * count)(), c_int(0)
        status = _library().cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.description, self.a, self.b, self.d, self.d, preference, c_int(count),
            results, byref(returned),
        )  # fmt: skip
        _check("MatmulPreferenceDestroy", preference)
        if status:
            return []
        return [way for way in results[: returned.value] if way.state == 0]


@cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded, found by its name. OSError where there is none."""
    major = (torch.version.cuda or "0").partition(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")
    library.cublasLtMatmul.argtypes = MATMUL  # then addresses may be plain numbers
    return library


def available() -> bool:
    try:
        _library()
    except OSError:
        return False
    return True


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _check("Create", byref(handle))
    return handle


def _layout(matrix: Matrix) -> c_void_p:
    layout = c_void_p()
    _check(
        "MatrixLayoutCreate",
        byref(layout), c_int(KINDS[matrix.dtype]), c_uint64(matrix.rows), c_uint64(matrix.columns),
        c_int64(matrix.rows),
    )  # fmt: skip
    return layout


def _check(function: str, *arguments: Any) -> None:
    status = getattr(_library(), f"cublasLt{function}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{function} gave status {status}")
