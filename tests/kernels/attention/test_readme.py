"""The README's table names tests and cases that exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.kernels.attention import cases, test_hopper, test_hopper_emulated, test_sdpa

HERE = Path(__file__).parent
README = HERE.parents[2] / "kernels/attention/README.md"
TEXT = README.read_text().split("## What runs where")[1].split("`auto` takes")[0]
CELLS = [cell for line in TEXT.splitlines() if line.startswith("|") for cell in line.split("|")]
NAMES = sorted(set(re.findall(r"`(test_\w+(?:::\w+)?)`", TEXT)))


def reference_cases() -> set[str]:
    """Read off the decorator: pytest keeps it out of reach."""
    tree = ast.parse((HERE / "test_reference.py").read_text())
    function = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "test_reference_is_the_definition"
    )
    call = function.decorator_list[0]
    assert isinstance(call, ast.Call)
    return set(ast.literal_eval(call.args[1]))


KNOWN = {
    "H": set(test_hopper.CASES),
    "E": set(test_hopper_emulated.CASES),
    "A": set(cases.CASES),
    "S": set(test_sdpa.SUPPORTED),
    "R": reference_cases(),
}


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_exist(name: str) -> None:
    module, _, function = name.partition("::")
    assert f"def {function}" in (HERE / f"{module}.py").read_text()


def test_named_cases_exist() -> None:
    found = 0
    for cell in CELLS:
        letter = ""
        for part in re.findall(r'(?:\b([HEASR]) )?"([^"]+)"', cell):
            letter = part[0] or letter
            assert part[1] in KNOWN[letter], f"{letter} {part[1]}"
            found += 1
    assert found > 40
