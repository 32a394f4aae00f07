"""AdamW whose step is our own kernel's: on GPUs, and wherever both moments are kept in bf16.

PyTorch's fused AdamW writes the gradient back where it divides it, which clipping by the norm lets
it do: 32 bytes a parameter in place of 28.

bf16 takes 4 bytes a parameter where fp32 takes 8, as DeepSeek-V3 kept them (arXiv:2412.19437,
section 3.3.3). They are rounded to nearest, after the parameter took them unrounded. Rounding at
random would be unbiased for any beta; but its noise is another on every layout of ranks, and what
it repairs is not there for the betas in use. A moment moves by (1 - beta) of its distance to the
new value, and bf16 has 8 bits, so a move below 2^-9 to 2^-8 of the moment is lost: with beta2 =
0.95 where g^2 is within 4 to 8 % of v, which is 2 to 4 % of the step and less than g^2 scatters
anyway; with beta2 = 0.999 v would never shrink. So betas above 0.99 are refused
(flashtrain/precision.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from flashtrain.checkpoint import adam_state
from kernels.adamw import adamw_

LARGE = 2**18  # numbers of a parameter that is worth a launch of its own


class KernelAdamW(AdamW):
    """torch's AdamW in names, groups and options (no amsgrad, no maximize), with its own step.

    moments: the dtype that both are kept in.

    0-dim fp32 on the device, as in torch's fused kernels: `found_inf`, where the step does nothing
    unless it is 0; `grad_scale`, by which gradients are divided; and a group's "lr".
    """

    def __init__(self, groups: Any, *, moments: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            small: list[tuple[nn.Parameter, Any]] = []  # with its state
            large: list[tuple[nn.Parameter, Any]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state = self.state[parameter] = self.fresh_state(parameter, group)
                (small if self._is_small(parameter) else large).append((parameter, state))
            steps = [state["step"] for _, state in (*small, *large)]
            if steps:
                # a list of them: for one tensor the host would wait
                torch._foreach_add_(steps, 1.0 if skip is None else [1.0 - skip] * len(steps))
            if small:
                self._step_together(small, group, skip, scale)
            beta1, beta2 = group["betas"]
            for parameter, state in large:
                assert parameter.grad is not None
                adamw_(
                    parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
                    lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                    weight_decay=group["weight_decay"], skip=skip, scale=scale,
                )  # fmt: skip

    def _is_small(self, parameter: Tensor) -> bool:
        """Whether PyTorch's kernel for many at a time is better, and can."""
        fits = parameter.is_cuda and self.moments is torch.float32
        return fits and parameter.numel() < LARGE

    def _step_together(
        self, kept: list[tuple[nn.Parameter, Any]], group: Any, skip: Tensor | None,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        parameters = [parameter for parameter, _ in kept]
        gradients = [p.grad for p in parameters if p.grad is not None]
        m, v, counts = ([s[key] for _, s in kept] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [*parameters], gradients, m, v, [], counts,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False, grad_scale=scale, found_inf=skip,
        )  # fmt: skip

    def fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept of a parameter, before its first step."""
        state = adam_state(parameter, group)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=self.moments, requires_grad=False)
        return state
