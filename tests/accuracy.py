"""The accuracy rule for kernels: as good as eager PyTorch in the same dtype, twice over.

A fixed tolerance is either too loose to fail or wrong for the next shape. Here the tolerance is
measured: both the kernel and eager PyTorch are compared with the exact answer, in float64.
"""

import torch
from torch import Tensor


def assert_as_accurate(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    name: str = "result",
    terms: float = 0.0,
) -> None:
    """Fail unless our error is at most `factor` x eager's plus one rounding, in max and in mean.

    Args:
        ours: the result under test; one rounding is an ulp of its dtype at the answer's size
            (the largest for max, the mean for mean).
        eager: the same by plain PyTorch, every step in the dtype of the inputs.
        exact: the same in float64, from the same inputs.
        terms: the size of what is summed, for float32 sums: where inputs are float32 too, the
            roundings that remain are those of the terms, and eager may happen to have none.
    """
    assert exact.dtype == torch.float64, f"exact {name} must be float64, got {exact.dtype}"
    assert ours.shape == exact.shape, f"{name} is {list(ours.shape)}, not {list(exact.shape)}"
    assert not ours.isnan().any(), f"{name} holds {int(ours.isnan().sum())} NaNs"
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite]), f"{name}: infinities differ"
    ours_error = (ours.double() - exact)[finite].abs()
    if ours_error.numel() == 0:
        return
    eager_error = (eager.double() - exact)[finite].abs()
    size, ulp = exact[finite].abs(), torch.finfo(ours.dtype).eps
    for kind in ("max", "mean"):
        error, base, scale = (getattr(x, kind)().item() for x in (ours_error, eager_error, size))
        scale = max(scale, terms)
        limit = factor * base + ulp * scale
        assert error <= limit, (
            f"{name}: {kind} error {error:.3g} is above {limit:.3g}"
            f" = {factor} x eager's {base:.3g} + a rounding of {ulp * scale:.3g}"
        )
