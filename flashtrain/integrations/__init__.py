"""flashtrain's attention inside other people's models: `transformers` and `sdpa`.

Importing this makes sure that `kernels` is flashtrain's package: Hugging Face ships another one of
that name, and whichever stands first on sys.path is the one that Python imports.
"""

import importlib.util
from pathlib import Path


def _check_kernels() -> None:
    """Raises ImportError when `import kernels` finds, or has found, another package."""
    ours = Path(__file__).resolve().parents[2]
    spec = importlib.util.find_spec("kernels")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    if any((folder / "attention" / "op.py").exists() for folder in folders):
        return
    found = "nothing" if spec is None else spec.origin or (folders[0] if folders else spec.name)
    raise ImportError(
        f"`import kernels` finds {found}, not flashtrain's kernels: put {ours} in front on"
        " PYTHONPATH, import flashtrain.integrations before transformers, or"
        " `pip uninstall kernels` (Hugging Face's package of the same name)"
    )


_check_kernels()
