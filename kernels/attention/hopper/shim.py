"""Names of Gluon that differ between Triton versions, and what it has no name for.

Triton 3.6 and 3.7 say `async_copy_global_to_shared`; later versions say `async_load` and have
`async_atomic_add`. The builder of 3.6 and 3.7 can already emit the reducing copy.
"""

from typing import Any

from triton._C.libtriton import ir
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
