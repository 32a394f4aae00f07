"""The kernel that keeps rows in shared memory: emulated on the CPU; on a GPU
as it is, and so is the one that keeps them in registers.

The emulator is attention's; what it lacks, copies in groups that a thread waits for, is here: a
place holds NaN from the issue of a copy until its group has been waited for.
"""

import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear_cross_entropy import rows_shared, rows_triton
from kernels.linear_cross_entropy.problem import Terms
from kernels.linear_cross_entropy.tiles import KEPT, Tile
from tests.kernels.attention import gluon_emulator
from tests.kernels.linear_cross_entropy.kept import check_kept

REGISTERS = Tile(block=4096, warps=16, programs=1, keeps="registers")


class Groups(threading.local):
    """The copies of one program: those of the open group, and the committed ones."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []

    def copy(self, place: Any, pointer: Any, mask: Any = None) -> None:
        values = gluon_emulator._gl_load(pointer, mask)
        place.data.fill_(float("nan"))
        self.open.append(lambda: place.data.copy_(values))

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        while len(self.committed) > pending:
            for finish in self.committed.pop(0):
                finish()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups()
    copies = types.SimpleNamespace(
        async_copy_global_to_shared=groups.copy, commit_group=groups.commit, wait_group=groups.wait
    )
    replaced = gluon_emulator._REPLACED
    monkeypatch.setitem(replaced, id(rows_shared.async_copy), copies)
    monkeypatch.setitem(replaced, id(rows_shared.barrier), lambda: None)
    monkeypatch.setattr(gluon_emulator._GL, "num_warps", lambda: 1, raising=False)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("words", "block", "programs"), [(75, 32, 3), (64, 64, 1), (75, 128, 2), (9, 16, 7)]
)
@pytest.mark.usefixtures("emulated")
def test_emulated_rows_are_those_of_pytorch(
    words: int, block: int, programs: int, softcap: float
) -> None:
    def launch(
        logits: Tensor, labels: Tensor, statistics: Tensor, terms: Terms, **more: Any
    ) -> None:
        arguments = dict(
            logits_ptr=logits, labels_ptr=labels, lse_ptr=statistics[0], target_ptr=statistics[1],
            n=len(logits), stride=logits.stride(0), V=words, first_word=terms.first_word,
            ignore_index=terms.ignore_index, cap=terms.softcap, z_loss=terms.z_loss,
            BLOCK=block, TILES=-(-words // block), SOFTCAP=terms.softcap > 0,
        )  # fmt: skip
        kernel = rows_shared.shared_rows_kernel
        plan = types.SimpleNamespace(kernel=kernel, grid=(programs,), bind=lambda x: x)
        gluon_emulator.emulate(plan, arguments)  # type: ignore[arg-type]

    check_kept(launch, words, torch.float32, softcap, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("words", [1, 4000, 4096, 28001, 50257, 50304])
def test_rows_on_a_gpu_are_those_of_pytorch(words: int, dtype: torch.dtype, softcap: float) -> None:
    for tile in (KEPT, REGISTERS):
        if tile.fits(words, dtype):
            check_kept(rows_triton.launch, words, dtype, softcap, "cuda", tile=tile)
