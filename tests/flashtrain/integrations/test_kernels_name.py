"""Two packages are imported as `kernels`: flashtrain's and one of Hugging Face."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with another package `kernels` installed, as new as transformers wants it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    metadata = tmp_path / "kernels-0.18.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.9\n")
    return tmp_path


def run(code: str, *path: Path) -> tuple[int, str]:
    """(exit status, last line it printed) of Python with these folders first on sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("first", ["", "import kernels; "], ids=["found", "imported"])
def test_a_foreign_kernels_in_front_is_one_error(first: str, foreign: Path) -> None:
    status, line = run(first + "import flashtrain.integrations", foreign, ROOT)
    assert status == 1
    assert line.startswith(f"ImportError: `import kernels` finds {foreign}")
    assert f"put {ROOT} in front" in line
    assert "pip uninstall kernels" in line


def test_ours_in_front_of_an_installed_foreign_one_is_one_error(foreign: Path) -> None:
    """transformers goes by the version that is installed, and imports what comes first."""
    pytest.importorskip("transformers", reason="needs transformers")
    status, line = run("import flashtrain.integrations.transformers", ROOT, foreign)
    assert status == 1
    assert line.startswith("ImportError: transformers cannot be imported")
    assert line.endswith("`pip uninstall kernels`")


def test_a_folder_named_flashtrain_beside_the_users_script_is_in_nobodys_way(
    tmp_path: Path,
) -> None:
    """As where the checkout lies beside it: Python takes the folder for the package's beginning."""
    try:
        distribution("flashtrain")
    except PackageNotFoundError:
        pytest.skip("flashtrain is not installed")
    (tmp_path / "flashtrain").mkdir()
    status, line = run("import flashtrain.integrations as i; print(i.__file__)", tmp_path)
    assert status == 0, line
    assert Path(line) == ROOT / "flashtrain" / "integrations" / "__init__.py"


def test_transformers_does_not_take_ours_for_the_other() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers.utils import is_kernels_available

    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"
    assert not is_kernels_available()


def test_flashtrain_imports_no_transformers() -> None:
    code = "import sys, flashtrain, flashtrain.build, flashtrain.integrations.sdpa; "
    assert run(code + "print('transformers' in sys.modules)", ROOT) == (0, "False")
