"""The masks' assembly, run by an interpreter of the few instructions it has."""

import re

import pytest
import torch

from kernels.attention.hopper.runs import _code, _operands
from kernels.attention.hopper.scores import MINUS_INF
from kernels.attention.hopper.softmax import MASKED, MASKED_BITS

WORD = 1 << 32


def signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


STEPS = {
    "mov.b32": lambda a: a,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "min.u32": min,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shl.b32": lambda a, b: a << min(b, 32),
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "setp.ne.u32": lambda a, b: int(a != b),
}


def execute(code: str, numbers: list[str], ends: list[int]) -> list[str]:
    """What the block leaves in its results; numbers go through it as names."""
    n = len(numbers)
    held: dict[str, int] = {f"${2 * n + i}": end % WORD for i, end in enumerate(ends)}
    results = [""] * n
    body = re.sub(r"\.reg [^;]*;", "", code.strip().removeprefix("{").removesuffix("}"))
    for step in filter(None, map(str.strip, body.split(";"))):
        name, rest = step.split(" ", 1)
        to, *given = (x.strip() for x in rest.split(","))
        if name == "mov.f32":
            results[int(to.removeprefix("$"))] = numbers[int(given[0].removeprefix("$")) - n]
        elif name == "selp.f32":
            kept = numbers[int(given[0].removeprefix("$")) - n]
            results[int(to.removeprefix("$"))] = kept if held[given[2]] else given[1]
        else:
            values = [held[x] if x in held else int(x) % WORD for x in given]
            held[to] = STEPS[name](*values) % WORD
    return results


@pytest.mark.parametrize("ends", [("to",), ("from",), ("from", "to")])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("clear", [0, 64])
def test_a_run_of_columns_is_kept(columns: int, ends: tuple[str, ...], clear: int) -> None:
    n = columns // 2
    asked = "from" in ends, "to" in ends
    code = _code.fn(n, MINUS_INF.value, *asked, clear)
    assert _operands.fn(n, *asked).count(",") == (2 + len(ends)) * n - 1
    for lane in range(4):
        # number k of a thread: (row, column), as the tensor cores leave them
        places = [(k // 2 % 2, 8 * (k // 4) + 2 * lane + k % 2) for k in range(n)]
        for low in (-300, -1, 0, 1, 2, 3, 7, 8, 15, 63, 64, 66, 127, 128, 500):
            for high in (-7, 0, 5, 8, 62, 63, 64, 100, 126, 127, 128, 129, 1 << 20):
                rows = {"from": (low, low + 1), "to": (high, high + 1)}
                given = [rows[end][row] - 2 * lane for end in ends for row, _ in places]
                got = execute(code, [f"x{k}" for k in range(n)], given)
                for k, (row, column) in enumerate(places):
                    keep = ("from" not in ends or column >= rows["from"][row]) and (
                        "to" not in ends or column < rows["to"][row]
                    )
                    keep = keep or column < clear
                    assert got[k] == (f"x{k}" if keep else "0fFF800000")


def test_the_bits_are_of_the_numbers_they_stand_for() -> None:
    for bits, number in ((MASKED_BITS, MASKED.value), (MINUS_INF, float("-inf"))):
        assert torch.tensor(bits.value).to(torch.int32).view(torch.float32).item() == number
