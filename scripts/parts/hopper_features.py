"""The second part of bench_hopper.py: every feature of the Hopper kernels, right and how fast."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.attention import hopper
from kernels.attention.hopper import plan
from kernels.attention.hopper.tiles import LARGEST_HEAD
from kernels.attention.op import document_bounds
from kernels.attention.problem import UNBOUNDED
from kernels.attention.reference import attention_reference
from scripts.parts.supervise import State, report, say


@dataclass(frozen=True)
class Feature:
    """One call; `joint`: q, k, v are views into one projection."""

    D: int
    causal: bool
    T: int
    S: int
    B: int = 2
    H: int = 4
    H_kv: int = 4
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    documents: int = 0  # in each row, about
    dtype: torch.dtype = torch.bfloat16
    joint: bool = False

    @property
    def name(self) -> str:
        found = [f"{self.D} {'causal' if self.causal else 'full'} {self.T}x{self.S}"]
        found.append(f"{self.H}/{self.H_kv}")
        if self.window != (UNBOUNDED, UNBOUNDED):
            found.append(f"window {self.window[0]},{self.window[1]}")
        found += [f"softcap {self.softcap:g}"] * (self.softcap > 0)
        found += [f"{self.documents} documents"] * (self.documents > 0)
        found += ["fp16"] * (self.dtype == torch.float16) + ["joint"] * self.joint
        found += ["alibi"] * self.alibi + ["sinks"] * self.sinks
        return " ".join(found)

    @property
    def backward(self) -> bool:
        return LARGEST_HEAD["backward"] >= self.D

    def options(self) -> plan.Options:
        return plan.Options(
            self.causal, self.D**-0.5, self.alibi, *self.window, self.softcap,
            torch.float32 if self.sinks else None, self.documents > 0,
        )  # fmt: skip


# fmt: off
FEATURES = [
    Feature(**{"D": D, "causal": causal, **more})
    for D in (128, 64)
    for causal, more in [
        (True, dict(T=256, S=256)),
        (False, dict(T=256, S=256)),
        (True, dict(T=1000, S=1000, H=6, H_kv=2)),
        (False, dict(T=333, S=1001, H_kv=1)),
        (True, dict(T=77, S=200, H=2, H_kv=2)),
        (True, dict(T=500, S=500, H_kv=2, alibi=True)),
        (True, dict(T=640, S=640, dtype=torch.float16, joint=True)),
        (False, dict(T=1, S=1, H=2, H_kv=2)),
        (True, dict(T=1000, S=1000, window=(200, 0))),
        (False, dict(T=700, S=1001, window=(130, 70), H_kv=2)),
        (True, dict(T=300, S=1500, window=(64, 0))),
        (True, dict(T=1000, S=1000, documents=5)),
        (False, dict(T=1000, S=1000, documents=5, H_kv=1)),
        (True, dict(T=777, S=777, softcap=15.0)),
        (False, dict(T=777, S=777, softcap=1.5)),
        (True, dict(T=777, S=777, softcap=15.0, dtype=torch.float16)),
        (True, dict(T=600, S=600, sinks=True)),
        (True, dict(T=900, S=900, H_kv=2, window=(300, 0), softcap=20.0, alibi=True, sinks=True,
                    documents=4)),
    ]
] + [
    Feature(D, causal, 500, 700, **more)
    for D in (24, 80, 96, 160, 256)
    for causal, more in [(True, {}), (False, dict(window=(200, 100)))]
] + [Feature(256, True, 900, 900, H_kv=2, softcap=20.0, sinks=True, documents=4)]

# 16k tokens, width 2048: what the skipping of tiles and the padding of heads are worth
TIMED = [
    Feature(128, True, 16384, 16384, B=1, H=16, H_kv=16, window=(1024, 0)),
    Feature(64, True, 16384, 16384, B=1, H=32, H_kv=32, window=(1024, 0)),
    Feature(128, True, 16384, 16384, B=1, H=16, H_kv=16, documents=16),
    Feature(64, True, 16384, 16384, B=1, H=32, H_kv=32, documents=16),
    Feature(128, True, 4096, 4096, B=4, H=16, H_kv=16, softcap=30.0),
    Feature(64, True, 4096, 4096, B=4, H=32, H_kv=32, softcap=30.0),
    Feature(128, True, 4096, 4096, B=4, H=16, H_kv=16, sinks=True),
    Feature(96, True, 4096, 4096, B=4, H=20, H_kv=20),
    Feature(256, True, 4096, 4096, B=4, H=8, H_kv=8),
    Feature(256, False, 4096, 4096, B=4, H=8, H_kv=8),
]
# fmt: on


class Inputs:
    """Random tensors of a feature, and its call in the words of the kernels."""

    def __init__(self, feature: Feature) -> None:
        f = feature
        self.feature = f

        def normal(*size: int) -> Tensor:
            return torch.randn(f.B, *size, f.D, device="cuda", dtype=f.dtype)

        self.q, self.k, self.v = normal(f.T, f.H), normal(f.S, f.H_kv), normal(f.S, f.H_kv)
        if f.joint:
            self.q, self.k, self.v = normal(f.T, 3 * f.H).split(f.H, 2)
        self.d_out, self.d_lse = normal(f.T, f.H), torch.randn(f.B, f.H, f.T, device="cuda")
        heads = torch.arange(1.0, f.H + 1, device="cuda")
        self.slopes = 0.5**heads if f.alibi else None
        self.sinks = torch.randn(f.H, device="cuda") if f.sinks else None
        starts = torch.rand(f.B, f.T, device="cuda") < f.documents / f.T
        self.documents = starts.cumsum(1).to(torch.int32) if f.documents else None
        before, after = f.window
        bounds = None if self.documents is None else document_bounds(self.documents)
        self.call: dict[str, Any] = dict(
            causal=f.causal, scale=f.D**-0.5, alibi_slopes=self.slopes, before=before,
            after=0 if f.causal else after, softcap=f.softcap, sinks=self.sinks, bounds=bounds,
        )  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        return hopper.forward(self.q, self.k, self.v, **self.call)

    def backward(self, out: Tensor, lse: Tensor, d_lse: Tensor | None = None) -> tuple[Tensor, ...]:
        return hopper.backward(self.d_out, d_lse, self.q, self.k, self.v, out, lse, **self.call)

    def reference(self, compute: torch.dtype) -> list[Tensor]:
        """out, lse and, where our kernels have them, all gradients."""
        f = self.feature
        leaves = [x.detach().to(compute).requires_grad_() for x in (self.q, self.k, self.v)]
        sinks = None if self.sinks is None else self.sinks.to(compute).requires_grad_()
        both = attention_reference(
            *leaves, causal=f.causal, window=f.window, alibi_slopes=self.slopes,
            softcap=f.softcap or None, sinks=sinks, documents=self.documents, compute=compute,
        )  # fmt: skip
        found = [x.detach() for x in both]
        if f.backward:
            leaves += [] if sinks is None else [sinks]
            above = (self.d_out.to(both[0].dtype), self.d_lse.to(both[1].dtype))
            found += torch.autograd.grad(both, leaves, above)
        return found


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; 1e9 for nan."""
    value = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
    return value if math.isfinite(value) else 1e9


def check_features(state: State) -> None:
    say("features: error of out, lse, dq, dk, dv (and d_sinks) against float64, ours/eager's")
    for number, feature in enumerate(FEATURES):
        torch.manual_seed(number)
        inputs = Inputs(feature)

        def ours(inputs: Inputs = inputs) -> list[Tensor]:
            out, lse = inputs.forward()
            torch.cuda.synchronize()
            if not inputs.feature.backward:
                return [out, lse]
            return [out, lse, *inputs.backward(out, lse, inputs.d_lse)]

        got = state.attempt(f"features {feature.name}", ours)
        if got is None:
            continue
        exact, eager = inputs.reference(torch.float64), inputs.reference(feature.dtype)
        errors = [relative(a, b) for a, b in zip(got, exact, strict=True)]
        floor = [max(relative(a, b), 1e-6) for a, b in zip(eager, exact, strict=True)]
        factor = 3 if feature.softcap else 2
        bad = any(error > factor * low for error, low in zip(errors, floor, strict=True))
        numbers = " ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(errors, floor, strict=True))
        say(f"  {feature.name:44s} {numbers}{'   <-- BAD' * bad}")
        report(f"features {feature.name}", errors=errors, eager=floor)


def time_features(state: State, *, beside: bool) -> None:
    """Milliseconds of both passes; `beside`: and of the portable kernels, which compile first."""
    from kernels.attention import portable

    say("features timed, ms forward / backward")
    for feature in TIMED:
        torch.manual_seed(0)
        x = Inputs(feature)
        call = {name: value for name, value in x.call.items() if name not in ("causal", "scale")}
        features = portable.Features(x.call["scale"], **call)

        def ours(x: Inputs = x) -> list[float]:
            out, lse = x.forward()
            found = [milliseconds(x.forward)]
            if x.feature.backward:
                found.append(milliseconds(lambda: x.backward(out, lse)))
            return found

        def theirs(x: Inputs = x, features: Any = features) -> list[float]:
            out, lse = portable.forward(x.q, x.k, x.v, features)
            given = (x.d_out, None, x.q, x.k, x.v, out, lse, features)
            return [
                milliseconds(lambda: portable.forward(x.q, x.k, x.v, features)),
                milliseconds(lambda: portable.backward(*given)),
            ]

        found = {"hopper": state.attempt(f"timed {feature.name}", ours)}
        if beside:
            found["triton"] = state.attempt(f"timed {feature.name}, triton", theirs)
        text = ", ".join(
            f"{name} " + ("failed" if ms is None else " / ".join(f"{n:.3f}" for n in ms))
            for name, ms in found.items()
        )
        say(f"  {feature.name:44s} {text}")
        report(f"timed {feature.name}", **found)


def milliseconds(run: Any) -> float:
    """Of one call, with a cold L2; some of the calls before it only warm up."""
    found: float = triton.testing.do_bench(run, warmup=4, rep=15, return_mode="median")
    return found
