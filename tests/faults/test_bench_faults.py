"""scripts/bench_faults.py in small: faults of two kinds, on two runs side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_fuzz import SCRIPTS


@pytest.mark.slow
def test_faults_are_survived_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    kinds = ["SIGTERM", "all processes killed"]
    command = [sys.executable, SCRIPTS / "bench_faults.py", "--faults", "4", "--every", "5"]
    command += ["--jobs", "2", "--json", file, "--only", *kinds]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(file.read_text())["faults"]
    assert found["injected"] == found["survived"] == dict.fromkeys(kinds, 2)
    assert found["runs"] == found["equal"] >= 2
    assert found["redone"]["SIGTERM"] == [0, 0]
    assert len(found["redone"]["all processes killed"]) == 2
    assert "runs bit-equal to the undisturbed one: " in ended.stdout
