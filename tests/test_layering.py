"""Who may import whom, and what no package may do: scripts -> flashtrain -> kernels."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flashtrain", "kernels")
# loading these runs what a file says; checkpoints and data are tensors, tokens and JSON
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load"),
    *("hydra.utils.instantiate", "hydra.utils.call", "instantiate"),
}


def sources(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """(path relative to the repository, syntax tree) of every Python file under `folder`."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of everything imported anywhere in a file, functions included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer: write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offenders(folder: str, *forbidden: str) -> list[str]:
    """`file imports name` for every import under `folder` of a forbidden module."""
    return [
        f"{path} imports {name}"
        for path, tree in sources(folder)
        for name in sorted(imports(tree))
        if any(name == module or name.startswith(module + ".") for module in forbidden)
    ]


def unsafe(tree: ast.Module) -> list[str]:
    """What in a file would run code that data brought along."""
    found = [name for name in imports(tree) if name.split(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(name)
            if name in ("np.load", "numpy.load") and not any(
                keyword.arg == "allow_pickle" for keyword in node.keywords
            ):
                found.append(f"{name} without allow_pickle=False")
            found += [
                f"{keyword.arg}=True"
                for keyword in node.keywords
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code")
                and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            ]
    return found


def test_kernels_know_neither_flashtrain_nor_process_groups() -> None:
    assert not offenders("kernels", "flashtrain", "scripts", "tests", "torch.distributed")


def test_flashtrain_imports_neither_scripts_nor_tests() -> None:
    assert not offenders("flashtrain", "scripts", "tests")


def test_the_model_knows_no_parallelism() -> None:
    layers = ("parallel", "engine", "trainer", "data", "checkpoint", "tracking", "train")
    above = [f"flashtrain.{layer}" for layer in layers]
    assert not offenders("flashtrain/model", "torch.distributed", *above)


def test_planning_computes_and_starts_nothing() -> None:
    above = ("parallel", "engine", "trainer", "data", "checkpoint", "tracking", "train")
    running = [f"flashtrain.{layer}" for layer in above]
    assert not offenders("flashtrain/planning", "torch.distributed", *running)


def test_deepspeed_has_one_importer() -> None:
    found = offenders("flashtrain", "deepspeed") + offenders("kernels", "deepspeed")
    assert all(line.startswith("flashtrain/engine/deepspeed.py ") for line in found), found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_run_no_code_that_data_brings(package: str) -> None:
    found = {path: unsafe(tree) for path, tree in sources(package)}
    assert found, f"no Python file under {package}/"
    assert not {path: what for path, what in found.items() if what}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "def f():\n    from hydra.utils import instantiate\n    instantiate(config)",
        "subprocess.run(command, shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path)",
        "eval(text)",
    ],
)
def test_the_check_for_unsafe_code_can_fail(line: str) -> None:
    assert unsafe(ast.parse(line))


def test_the_check_for_unsafe_code_lets_harmless_code_pass() -> None:
    assert not unsafe(ast.parse("model.eval()\njson.load(file)\nsubprocess.run(c, shell=False)"))


def test_kernels_is_our_package() -> None:
    # Hugging Face ships an import package of the same name
    import kernels

    assert kernels.__file__ is not None
    assert Path(kernels.__file__).is_relative_to(ROOT)


def test_the_config_loads_without_torch() -> None:
    """A refused command line costs a tenth of a second, not an import of torch."""
    code = "import sys, flashtrain.config; print(*{'torch', 'wandb'}.intersection(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == ""
