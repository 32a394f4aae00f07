"""Kernels compiled for GPUs that need not be there, in a process that never saw the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compiled(script: Path, capability: int, cache: Path) -> list[dict[str, Any]]:
    """What `script CAPABILITY` prints of each kernel, a JSON line for each."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
