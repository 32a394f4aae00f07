"""What every figure stands beside: the machine, the versions and the day."""

import importlib.util
import platform
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch
import triton


def where(*packages: str) -> dict[str, str]:
    """Of this process; `packages`: names to import of what else was raced, left out if missing."""
    cuda = torch.cuda.is_available()
    found = {
        "gpu": torch.cuda.get_device_name() if cuda else f"none, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            for name in packages_distributions().get(package, [package]):
                try:
                    found[name] = version(name)
                except PackageNotFoundError:  # a folder on the path
                    found[name] = "?"
    return found
