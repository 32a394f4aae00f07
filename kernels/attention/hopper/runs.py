"""Masks: of each row a run of columns stays.

As comparisons of rows with columns this took three to four instructions per score, because LLVM
packs their results into half-words and takes them apart again. Here a thread makes one word per
row, a bit for each of its columns there, before it has to wait for the scores; `ptxas` turns the
selections by constant bits into one predicate move for seven of them and a select each.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _code(n, other, from_first, to_limit, clear):
    """Assembly for n numbers of a thread. Operands: n results, the n numbers, and for each of the
    two ends asked for n times the row's end minus the thread's first column.

    A thread of a product's result holds quads: two columns of two rows; the next is 8 columns on.
    """
    code = "{ .reg .pred p; .reg .b32 t, end, row0, row1;"
    for row in range(2):
        code += f" mov.b32 row{row}, -1;"
        for i, is_first in enumerate([True] * from_first + [False] * to_limit):
            # as many bits as the thread has columns before the end; a shift by 32 or more gives 0
            code += f"""
                max.s32 t, ${(2 + i) * n + 2 * row}, 0;
                shr.u32 end, t, 3;
                and.b32 t, t, 7;
                min.u32 t, t, 2;
                mad.lo.u32 t, end, 2, t;
                mov.b32 end, 1;
                shl.b32 end, end, t;
                sub.u32 end, end, 1;"""
            if is_first:
                code += " not.b32 end, end;"
            code += f" and.b32 row{row}, row{row}, end;"
    for k in range(n):
        bit = 2 * (k // 4) + k % 2
        if k // 4 * 8 < clear:
            code += f" mov.f32 ${k}, ${n + k};"
            continue
        code += f"""
            and.b32 t, row{k // 2 % 2}, {1 << bit};
            setp.ne.u32 p, t, 0;
            selp.f32 ${k}, ${n + k}, 0f{other:08X}, p;"""
    return code + " }"


@gluon.constexpr_function
def _operands(n, from_first, to_limit):
    n_ends = from_first + to_limit
    # &: a result is there before all operands have been read
    return ",".join(["=&f"] * n + ["f"] * n + ["r"] * (n * n_ends))


@gluon.jit
def keep_run(
    x, first, limit, OTHER: gl.constexpr, FROM: gl.constexpr, TO: gl.constexpr,
    CLEAR: gl.constexpr = 0,
):  # fmt: skip
    """x [rows, at most 128 columns] fp32, the result of a product: as it is in the columns from
    `first` (if FROM) to below `limit` (if TO) of each row [rows] int32, and elsewhere the number
    whose bits OTHER is. All rows keep the first CLEAR columns, a multiple of 8."""
    COLUMNS: gl.constexpr = x.shape[1]
    N: gl.constexpr = COLUMNS // 2  # numbers of a thread: 128 threads have 64 rows
    # of a thread's columns the lane says bits 1 and 2
    mine = (gl.arange(0, COLUMNS, gl.SliceLayout(0, x.type.layout)) & 6)[None, :]
    CODE: gl.constexpr = _code(N, OTHER, FROM, TO, CLEAR)
    TYPES: gl.constexpr = _operands(N, FROM, TO)
    if FROM and TO:
        operands = [x, first[:, None] - mine, limit[:, None] - mine]
    elif FROM:
        operands = [x, first[:, None] - mine]
    else:
        operands = [x, limit[:, None] - mine]
    return gl.inline_asm_elementwise(CODE, TYPES, operands, dtype=gl.float32, is_pure=True, pack=N)
