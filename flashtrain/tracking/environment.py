"""What a run ran on, for its record: versions, devices, the state of the checkout."""

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "deepspeed", "numpy", "hydra-core", "wandb", "tokenizers")
ROOT = Path(__file__).resolve().parent.parent.parent


def environment(world_size: int) -> dict[str, Any]:
    """JSON types; no environment variable, which could hold a secret."""
    cuda = torch.cuda.is_available()
    return {
        "processes": world_size,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "devices on this host": torch.cuda.device_count() if cuda else os.cpu_count(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """`deea4d9`, `deea4d9 with changes`, or None where this is no git checkout."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--exclude=*",
        "--dirty= with changes",
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
