"""A Hugging Face model with its eager attention and with flashtrain's: errors, tokens, times.

For blip2_demo.py and bench_huggingface.py.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

IMPLEMENTATIONS = ("eager", "flashtrain")


class Float64(TorchFunctionMode):
    """A model in double stays in double where its code asks for float32 (norms, softmax)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {n: torch.float64 if a is torch.float32 else a for n, a in (kwargs or {}).items()}
        return args[0].double() if func is Tensor.float else func(*args, **kwargs)


def agreement(model: PreTrainedModel, batch: dict[str, Tensor], gradients: bool = True) -> bool:
    """Print the errors of both against float64, in the model's dtype; True when ours pass.

    The rule is that of the tests: at most twice eager's error plus one rounding, max and mean.
    Gradients make one vector, those of each parameter in units of its largest.
    """
    told = {}
    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        told[name] = _results(model, batch, gradients)
    model.set_attn_implementation("eager")
    with Float64():
        exact = _results(copy.deepcopy(model).double(), batch, gradients)
    units = {name: gradient.abs().max() for name, gradient in exact[1].items()}
    rounding, passed = torch.finfo(model.dtype).eps, True
    for what in ("logits", "gradients")[: 1 + gradients]:
        truth, eager, ours = (
            logits.double() if what == "logits" else _vector(found, units)
            for logits, found in (exact, *(told[name] for name in IMPLEMENTATIONS))
        )
        for kind in ("max", "mean"):
            size, theirs, error = (
                getattr(x.abs(), kind)().item() for x in (truth, eager - truth, ours - truth)
            )
            good = error <= 2 * theirs + rounding * size
            passed = passed and good
            print(
                f"  {what:<9} {kind:<4} error: flashtrain {error:.2e}, eager {theirs:.2e}"
                f"  {'within the rule' if good else 'ABOVE THE RULE'}"
            )
    return passed


def _results(
    model: PreTrainedModel, batch: dict[str, Tensor], gradients: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """logits of the tokens, not the padding, and gradients of the loss by parameter."""
    batch = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in batch.items()}
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        output = model(**batch)
    logits = output.logits.detach()
    if logits.shape[:2] == batch["attention_mask"].shape:
        logits = logits[batch["attention_mask"] > 0]
    if gradients:
        output.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits, found


def _vector(gradients: dict[str, Tensor], units: dict[str, Tensor]) -> Tensor:
    # the bias of keys moves all scores of a query alike: its gradient is 0 but for rounding
    kept = [n for n in units if not n.endswith((".k_proj.bias", ".key.bias")) and units[n] > 1e-12]
    return torch.cat([(gradients[n].double() / units[n]).flatten() for n in kept])


def milliseconds(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    """The median time of a call, after three to warm up."""
    times = []
    for number in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
