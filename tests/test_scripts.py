"""scripts/setup_venv.sh against a stand-in for Python: what it installs, and when nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# notes every call; `-m venv` copies itself, `pip install torch==...` makes torch importable, and a
# call that contains $BREAK fails
STAND_IN = """#!/usr/bin/env bash
all="$*"
printf '%s\\n' "$all" >>"$CALLS"
case "$all" in *"${BREAK:-no such call}"*) echo broken >&2; exit 1;; esac
case "$all" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;
  *" install "*torch==*) printf '%s' "${all##*torch==}" >"$(dirname "$0")/torch";;
  *"import torch"*) cat "$(dirname "$0")/torch";;
  *"import triton"*) exit 1;;
esac
"""


class Checkout:
    """A copy of what setup_venv.sh reads, with the stand-in as its interpreter."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls = folder / "check out", folder / "calls"  # a blank in the path
        (self.root / "scripts").mkdir(parents=True)
        for name in ("scripts/setup_venv.sh", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python-stand-in"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def setup(self, **environment: str) -> tuple[int, str, list[str]]:
        """(exit status, what it said, what it asked pip to install)."""
        self.calls.write_text("")
        run = subprocess.run(
            [self.root / "scripts" / "setup_venv.sh"],
            cwd="/",
            env={
                "PATH": os.environ["PATH"],
                "PYTHON": str(self.python),
                "CALLS": str(self.calls),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=30,
        )
        calls = self.calls.read_text().splitlines()
        return run.returncode, run.stderr, [call for call in calls if " install " in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_new_environment_is_made_once_and_announced_in_one_line(checkout: Checkout) -> None:
    status, said, installed = checkout.setup()
    assert status == 0
    assert len(said.splitlines()) == 1
    assert "torch 2.13.0" in said
    assert installed[0].endswith("torch==2.13.0")
    assert installed[-1].endswith(f"--editable {checkout.root}[dev]")
    assert checkout.setup() == (0, "", [])


def test_an_interrupted_installation_is_finished_and_torch_kept(checkout: Checkout) -> None:
    status, said, _ = checkout.setup(BREAK="--editable")
    assert status == 1
    assert "broken" in said  # pip's own words
    assert "run the same command again" in said
    status, _, installed = checkout.setup()
    assert status == 0
    assert not [call for call in installed if "torch==" in call]
    assert installed[-1].endswith(f"--editable {checkout.root}[dev]")


def test_changed_pins_are_installed_without_touching_torch(checkout: Checkout) -> None:
    checkout.setup()
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("new-package==1.0\n")
    status, said, installed = checkout.setup()
    assert status == 0
    assert "changed" in said
    assert installed
    assert not [call for call in installed if "torch==" in call]
    assert checkout.setup() == (0, "", [])


def test_another_torch_is_taken_where_asked_for_and_never_swapped(checkout: Checkout) -> None:
    other = str(checkout.root / "other")
    _, _, installed = checkout.setup(FLASHTRAIN_VENV=other, FLASHTRAIN_TORCH="2.11.0")
    assert installed[0].endswith("torch==2.11.0")
    status, said, installed = checkout.setup(FLASHTRAIN_VENV=other, FLASHTRAIN_TORCH="2.12.0")
    assert status == 1
    assert "has torch 2.11.0, not FLASHTRAIN_TORCH=2.12.0" in said
    assert not installed


def test_an_old_python_is_refused_by_name(checkout: Checkout) -> None:
    status, said, installed = checkout.setup(BREAK="version_info")
    assert status == 1
    assert "needs Python 3.11 or newer" in said
    assert "PYTHON" in said
    assert not installed
