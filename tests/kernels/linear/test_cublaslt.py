"""What a product tells the library, without one: a stand-in notes what it gets."""

import ctypes
from ctypes import c_int, c_size_t, c_void_p
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fp8_cast import E4M3
from kernels.linear import cublaslt, products
from kernels.linear.cublaslt import MATMUL, Epilogue, Plan

SET = (c_void_p, c_int, c_void_p, c_size_t)
CREATED = {"MatmulDescCreate": 100, "MatrixLayoutCreate": 200, "MatmulPreferenceCreate": 300}


class Library:
    """C functions that write calls down, their pointers as numbers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pointed: dict[int, int] = {}
        self.bytes: dict[int, int] = {}
        self.layouts: list[tuple[int, int, int, int]] = []
        self.cublasLtMatmul = ctypes.CFUNCTYPE(c_int, *MATMUL)(self._multiply)
        self.cublasLtMatmulDescSetAttribute = ctypes.CFUNCTYPE(c_int, *SET)(self._set)

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            number = CREATED.get(name.removeprefix("cublasLt"))
            if number is not None:
                arguments[0]._obj.value = number
            if name == "cublasLtMatrixLayoutCreate":
                self.layouts.append(tuple(number.value for number in arguments[1:]))
            if name == "cublasLtMatmulAlgoGetHeuristic":
                arguments[8][0].workspace = 64
                arguments[9]._obj.value = 1
            return 0

        return function

    def _multiply(self, *arguments: Any) -> int:
        alpha, beta = (ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_float))[0] for i in (2, 7))
        self.calls.append((*arguments[:2], alpha, *arguments[3:7], beta, *arguments[8:]))
        return 0

    def _set(self, _: Any, attribute: int, value: Any, size: int) -> int:
        if size == 8:
            self.pointed[attribute] = ctypes.cast(value, ctypes.POINTER(ctypes.c_uint64))[0]
        if size == 1:
            self.bytes[attribute] = ctypes.cast(value, ctypes.POINTER(ctypes.c_int8))[0]
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(cublaslt, "_library", lambda: made)
    monkeypatch.setattr(cublaslt, "_handle", lambda device: c_void_p(7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0x5EED, raising=False)
    return made


@pytest.mark.parametrize("added", [True, False])
def test_addresses_arrive(added: bool, library: Library) -> None:
    a, b, d, c = (torch.zeros(8, 8) for _ in "abdc")
    bias = torch.zeros(8)
    plan = Plan(*(cublaslt.row_major(x) for x in (a, b, d)), Epilogue.bias, 16)
    for _ in "again":
        bias = torch.zeros(8)
        plan.run(a, b, d, c=c if added else None, bias=bias)
        (call,) = library.calls
        library.calls.clear()
        assert library.pointed[cublaslt._Of.bias] == bias.data_ptr()
        assert call[:2] == (7, 100)
        assert call[2:7] == (1.0, a.data_ptr(), 200, b.data_ptr(), 200)
        assert call[7:9] == ((1.0, c.data_ptr()) if added else (0.0, d.data_ptr()))
        assert call[9:12] == (200, d.data_ptr(), 200)
        assert call[14:] == (64, 0x5EED)


@pytest.mark.parametrize("fast", [True, False])
def test_fp8_is_told_its_scales_and_how_to_sum(fast: bool, library: Library) -> None:
    x, weight = torch.zeros(5, 16).to(torch.float8_e5m2), torch.zeros(32, 16).to(E4M3)
    stream, y = (torch.zeros(5, 32, dtype=torch.bfloat16) for _ in "cd")
    matrices = cublaslt.row_major(weight, True), cublaslt.row_major(x), cublaslt.row_major(y)
    plan = Plan(*matrices, Epilogue.none, 16, fast=fast)
    # cudaDataType, rows, columns, leading dimension
    assert library.layouts == [(28, 16, 32, 16), (29, 16, 5, 16), (14, 32, 5, 32)]
    assert library.bytes == {25: fast}
    for _ in "again":
        scales = torch.ones(()), torch.ones(())
        plan.run(weight, x, y, c=stream, scales=scales)
        assert [library.pointed[n] for n in (17, 18)] == [scale.data_ptr() for scale in scales]
    assert library.calls[-1][7:9] == (1.0, stream.data_ptr())


def test_16_bits_are_told_no_scale(library: Library) -> None:
    a, b, d = (torch.zeros(8, 8, dtype=torch.bfloat16) for _ in "abd")
    Plan(*(cublaslt.row_major(x) for x in (a, b, d)), Epilogue.none, 16).run(a, b, d)
    assert not library.bytes and not {17, 18} & library.pointed.keys()


def test_a_plan_serves_products_of_its_kind(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_plans", {})

    def made(rows: int, columns: int, offset: int = 0) -> Tensor:
        flat = torch.zeros(rows * columns + 256, dtype=torch.bfloat16)
        start = -flat.data_ptr() // 2 % 128 + offset
        return flat[start : start + rows * columns].view(rows, columns)

    x, weight, y = made(16, 8), made(24, 8), made(16, 24)
    first = products._plan(weight, x, y, Epilogue.none, True)
    assert products._plan(made(24, 8), made(16, 8), made(16, 24), Epilogue.none, True) is first
    others = [
        products._plan(weight, x, y, Epilogue.bias, True),
        products._plan(weight, made(32, 8), made(32, 24), Epilogue.none, True),
        products._plan(weight, x, y.float(), Epilogue.none, True),
        products._plan(x, made(16, 24), made(24, 8), Epilogue.none, False),
        products._plan(weight, x, y, Epilogue.none, True, made(16, 24, 8)),  # of 16 bytes
        products._plan(weight, x, y, Epilogue.none, True, fast=True),
    ]
    assert len({id(plan) for plan in (first, *others)}) == 7
