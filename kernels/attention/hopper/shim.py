"""Names of Gluon that differ between Triton versions, and what it has no name for.

Triton 3.6 and 3.7 say `async_copy_global_to_shared`; later versions say `async_load` and have
`async_atomic_add`. The builder of 3.6 and 3.7 can already emit the reducing copy.
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

NEW_NAMES = hasattr(tma, "async_load")

tma_load = tma.async_load if NEW_NAMES else tma.async_copy_global_to_shared
tma_store = tma.async_store if NEW_NAMES else tma.async_copy_shared_to_global


@builtin
def _reduce_add(desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Add a tile of shared memory to global memory, `cp.reduce.async.bulk.tensor...add`."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coord, src.handle)


tma_add = getattr(tma, "async_atomic_add", _reduce_add)
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of the threads of a partition


@gluon.constexpr_function
def _wait_code(n):
    return f"cp.async.bulk.wait_group {n}; mov.u32 $0, 0;"


@gluon.jit
def stored(BUT: gl.constexpr):
    """Until all that this partition stored or added by the copy engine, but for the last BUT
    copies, is in global memory; `tma.store_wait` waits until it has left shared memory."""
    CODE: gl.constexpr = _wait_code(BUT)
    gl.inline_asm_elementwise(CODE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_async_global():
    """What ordinary instructions wrote to global memory is there for the copy engine."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for(ptr, value):
    """Until the number at `ptr` is `value` or more; what was written before that is seen then."""
    seen = gl.atomic_add(ptr, 0, sem="acquire")
    while seen < value:
        seen = gl.atomic_add(ptr, 0, sem="acquire")
