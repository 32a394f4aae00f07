"""Whole steps: with everything, without each of the parts of kernels/, without all of them.

    python scripts/bench_without.py                               # gpt2_124m, 12 steps of each
    python scripts/bench_without.py --models 350m 1.3b --steps 8
    python scripts/bench_without.py --only stream light            # two of them, about 100 s
    python scripts/bench_without.py --case "experiment=llama_1b data.sequence_length=2048 ..."

Without a part the model computes it as torch.compile does, or as PyTorch's own kernel; without
`graph` every kernel is launched by the host. `light` is trainer.recompute=light. The same for
everything comes first and last, as cards slow down while they are hot. Figures are those of
scripts/bench_train.py.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

import flashtrain.model.attention as model_attention
import flashtrain.model.embedding as model_embedding
import flashtrain.model.linear as model_linear
import flashtrain.model.norm as model_norm
import flashtrain.optim.adamw as model_adamw
from flashtrain.config import ConfigError
from flashtrain.model.attention import Attention
from kernels.attention import attention_packed
from kernels.rope import rotate
from scripts import bench_train

MODELS = dict(zip(("124m", "350m", "1.3b"), bench_train.ONE_GPU, strict=True))
# `stream`: norm, product and sum as one operation; `norms`: their kernels, too
PARTS = ("stream", "norms", "products", "packed", "rotation", "embedding", "adamw", "graph")
KEYS = ("ms/step", "peak GB", "reserved GB", "loss", "start s")


@contextlib.contextmanager
def without(parts: tuple[str, ...]) -> Any:
    """In here the model does without these parts."""
    with contextlib.ExitStack() as stack:

        def put(owner: object, attribute: str, other: object) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, other))

        def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        if "stream" in parts or "norms" in parts or "products" in parts:
            put(model_linear.Linear, "fuses", False)
        if "norms" in parts:
            put(model_norm, "add_norm", partial(model_norm.add_norm, backend="torch"))
        if "products" in parts:
            put(model_linear, "linear", plain_linear)
        if "packed" in parts:
            put(Attention, "_stays_packed", lambda *_: False)
        if "rotation" in parts:
            put(model_attention, "attention_packed", _rotated_apart)
        if "embedding" in parts:
            rows = partial(model_embedding.embedding, backend="torch")
            put(model_embedding, "embedding", rows)
        if "adamw" in parts:
            put(model_adamw, "KernelAdamW", _torchs_own)
        yield


def _rotated_apart(
    qkv: Tensor, heads: int, *, rotation: Tensor | None, in_place: bool, **options: Any
) -> Tensor:
    if rotation is not None:
        turning = (qkv.shape[2] + heads) // 2
        turned = rotate(qkv[:, :, :turning], rotation)
        qkv = torch.cat((turned, qkv[:, :, turning:]), dim=2)
    return attention_packed(qkv, heads, **options)


def _torchs_own(*given: Any, moments: torch.dtype, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(*given, **options)


def measured(
    case: str, steps: int, only: list[str], measure: Callable[..., dict[str, Any]]
) -> None:
    """Print a line for each."""
    device = torch.device("cuda", 0)
    everything: tuple[str, tuple[str, ...], str] = ("with everything", (), "")
    cases = [(f"without {part}", (part,), "") for part in PARTS if part in only]
    if "all" in only:
        cases.append(("without all", PARTS, ""))
    if "light" in only:
        cases.append(("light", (), " trainer.recompute=light"))
    for name, parts, more in [everything, *cases, everything]:
        if "graph" in parts:
            more += " trainer.cuda_graph=off"
        try:
            with without(parts):
                found = measure(case + more, steps, 5, device)
        except (ConfigError, torch.OutOfMemoryError) as error:
            print(f"{name:<20} {str(error).splitlines()[0]}", flush=True)
            continue
        told = "  ".join(f"{key} {found[key]}" for key in KEYS)
        print(f"{name:<20} {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["124m"], help="which")
    parser.add_argument("--case", help="Hydra overrides of another one, in place of --models")
    names = (*PARTS, "all", "light")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of them")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default 12)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_without: needs a CUDA GPU, none is visible", file=sys.stderr)
        return 2
    for case in [options.case] if options.case else [MODELS[name] for name in options.models]:
        print(case)
        measured(case, options.steps, options.only, bench_train.measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
