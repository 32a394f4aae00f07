"""Every script says what it does: `--help` exits with 0, and touches no GPU and no file."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()  # the others are parts of scripts
)
# all in one process, which imports PyTorch once
ASK = """
import contextlib, io, json, runpy, sys
answers = {}
for path in sys.argv[1:]:
    before, sys.argv = list(sys.path), [path, "--help"]
    sys.path.insert(0, path.rpartition("/")[0])
    said, status = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            status = end.code
        except ImportError as error:
            status = f"not installed: {error.name}"
    answers[path] = [status or 0, said.getvalue()]
    sys.path = before
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, str]]:
    folder = tmp_path_factory.mktemp("help")
    asked = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, SCRIPTS)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert asked.returncode == 0, asked.stderr
    assert not list(folder.iterdir())
    found: dict[str, tuple[object, str]] = json.loads(asked.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_complete(path: Path, answers: dict[str, tuple[object, str]]) -> None:
    status, said = answers[str(path)]
    if isinstance(status, str):
        pytest.skip(status)
    assert status == 0, said
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc is not None
    shown = " ".join(said.split())
    for paragraph in doc.split("\n\n"):
        assert " ".join(paragraph.split()) in shown, f"{path.name} --help leaves out: {paragraph}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_is_explained(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    silent = [
        call.args[0].value
        for call in calls
        if ast.unparse(call.func).rpartition(".")[2] in ("add_argument", "add")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and not any(keyword.arg == "help" for keyword in call.keywords)
    ]
    assert not silent, f"{path.name} --help says nothing about {', '.join(map(str, silent))}"


@pytest.mark.parametrize("name", ["train.sh", "launch.sh", "test.sh"])
def test_shell_scripts_explain_themselves(name: str, tmp_path: Path) -> None:
    asked = subprocess.run(
        [ROOT / "scripts" / name, "--help"],
        cwd=tmp_path,
        env={**os.environ, "FLASHTRAIN_VENV": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert asked.returncode == 0, asked.stderr
    assert f"scripts/{name}" in asked.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_table_of_scripts_names_it(path: Path) -> None:
    assert f"`{path.name}`" in (ROOT / "scripts" / "README.md").read_text()
