"""The Hopper attention kernels on one GPU: right or not, and how fast each variant of them is.

    python scripts/bench_hopper.py                     # all of it
    python scripts/bench_hopper.py --json hopper.json  # and every number as JSON
    python scripts/bench_hopper.py --only backward,host --shapes 1024

features   out, lse, dq, dk, dv against float64, beside the error of eager PyTorch
timed      windows, documents, soft cap, other head sizes: milliseconds
portable   beside those, the portable kernels', which take minutes to compile
forward    twelve shapes of 16k tokens, width 2048, beside cuDNN: errors against float32, TFLOP/s of
backward   the shipped tiles and of variants; dq over repeats, since a race would show there first
host       time of a call in Python

FLOPs: forward 4 B H S^2 D (half when causal), backward 2.5 x forward, its small kernels included.
A worker process does the work. When it falls silent or dies, the launch it was at is named, left
out, and the rest goes on: a kernel under work may hang.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import hopper
from kernels.attention.hopper import plan
from scripts.parts.hopper_features import check_features, milliseconds, relative, time_features
from scripts.parts.hopper_variants import (
    SHAPES,
    Shape,
    backward_variants,
    compile_all,
    forward_variants,
)
from scripts.parts.supervise import State, report, say, supervise

PARTS = ("features", "timed", "portable", "forward", "backward", "host")
ROUNDS = 3  # of timings of all variants of a shape


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--seconds", type=float, default=140.0, help="time for all of it")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--shapes", default="", help="only shapes whose name holds one of these texts, by commas"
    )
    parser.add_argument("--base", action="store_true", help="the shipped tiles only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(unknown)} is not one of {', '.join(PARTS)}")
    texts = arguments.shapes.split(",")
    chosen = [shape for shape in SHAPES if any(text in shape.name for text in texts)]
    if arguments.worker:
        work(chosen, parts, arguments.base, State(**json.loads(arguments.worker)))
        return
    state = State(deadline=time.time() + arguments.seconds)
    command = [__file__, "--shapes", arguments.shapes, "--only", arguments.only]
    command += ["--base"] * arguments.base
    results = supervise(command, state)
    if arguments.json:
        arguments.json.write_text(json.dumps({"bad": state.bad, "results": results}, indent=1))
    print("hung or crashed:", state.bad or "nothing")
    sys.exit(1 if state.bad else 0)


def work(shapes: list[Shape], parts: list[str], base: bool, state: State) -> None:
    """The worker: whatever the ones before it have not finished."""
    if not {"forward", "backward"} & set(parts):
        shapes = []
    if "compile" not in state.done:
        name = torch.cuda.get_device_name()
        say(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
        compile_all(shapes, parts, base)
        state.finish("compile")
    if "features" in parts and "features" not in state.done:
        check_features(state)
        state.finish("features")
    if "timed" in parts and "timed" not in state.done:
        time_features(state, beside="portable" in parts)
        state.finish("timed")
    if shapes:
        say("shapes: TFLOP/s; errors of out, dq, dk, dv against float32, ours(cuDNN's)")
    for shape in shapes:
        if shape.name not in state.done and time.time() < state.deadline:
            Bench(shape, parts, base, state).run()
            state.finish(shape.name)
    if "host" in parts:
        host_time()
    state.finish("everything")


class Bench:
    """All variants at one shape."""

    def __init__(self, shape: Shape, parts: list[str], base: bool, state: State) -> None:
        self.shape, self.asked, self.base, self.state = shape, parts, base, state
        size = (16384 // shape.S, shape.S, 2048 // shape.D, shape.D)
        torch.manual_seed(1)
        self.q, self.k, self.v, self.d_out = (
            torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        self.call: dict[str, Any] = dict(causal=shape.causal, scale=shape.D**-0.5)
        self.errors: dict[str, list[float]] = {}  # of each variant
        self.kernels: dict[str, dict[str, float]] = {}  # of each variant of the backward
        self.exact = reference(self.q, self.k, self.v, self.d_out, shape.causal)

    def run(self) -> None:
        runs, cudnn_errors = self.cudnn()
        out, lse, errors = self.forward(runs["forward"])
        more: dict[str, Any] = {}
        if out is not None and lse is not None and "backward" in self.asked:
            more = self.backward(out, lse, runs["backward"])
        errors += more.pop("errors", [])
        text = " ".join(f"{a:.1e}({b:.1e})" for a, b in zip(errors, cudnn_errors, strict=False))
        say(f"{self.shape.name}: errors {text}")
        rates = {}
        for kind, factor in (("forward", 1.0), ("backward", 2.5)):
            if kind not in self.asked:
                continue
            rates[kind] = self.rates(runs[kind], factor)
            numbers = " | ".join(f"{name} {rate}" for name, rate in rates[kind].items())
            say(f"    {kind:8s} {numbers}")
        say("    " + ", ".join(f"{name} {value}" for name, value in more.items()))
        report(
            self.shape.name, cudnn_errors=cudnn_errors, errors=errors, by_variant=self.errors,
            kernels=self.kernels, **rates, **more,
        )  # fmt: skip

    def rates(self, runs: dict[str, Callable[[], Any]], factor: float) -> dict[str, int]:
        """TFLOP/s of each. In rounds: the clock falls under load, and must not favour the first."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(milliseconds(run))
        best = {name: statistics.median(found) for name, found in times.items()}
        return {name: round(factor * self.shape.flops / ms / 1e9) for name, ms in best.items()}

    def cudnn(self) -> tuple[dict[str, dict[str, Callable[[], Any]]], list[float]]:
        """The peer's two passes, and the errors of its out, dq, dk, dv."""
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (self.q, self.k, self.v)]
        above = self.d_out.transpose(1, 2)

        def forward() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=self.shape.causal
                )

        out = forward()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, above, retain_graph=True)

        got = [x.transpose(1, 2) for x in (out, *backward())]
        errors = [relative(a, b) for a, b in zip(got, self.exact, strict=True)]
        return {"forward": {"cuDNN": forward}, "backward": {"cuDNN": backward}}, errors

    def chosen(self, kind: str, variants: dict[str, Any]) -> list[tuple[str, Any]]:
        """The variants to run: none that hung or crashed at another length."""
        same = f"{self.shape.D} {self.shape.mask} "
        bad = {x.split(f" {kind} ")[-1] for x in self.state.bad if x.startswith(same)}
        return [(name, tile) for name, tile in variants.items() if name not in bad]

    def wanted(self, kind: str, name: str) -> bool:
        if name == "shipped":  # the backward needs the forward's out and lse
            return True
        return kind in self.asked and not self.base and time.time() < self.state.deadline

    def forward(
        self, runs: dict[str, Callable[[], Any]]
    ) -> tuple[Tensor | None, Tensor | None, list[float]]:
        """Add the variants that work to `runs`; out, lse and error of the first."""
        out, lse, errors = None, None, []
        for name, tile in self.chosen("forward", forward_variants(self.shape)):
            if not self.wanted("forward", name):
                continue

            def run(tile: Any = tile) -> tuple[Tensor, Tensor]:
                return hopper.forward(self.q, self.k, self.v, tile=tile, **self.call)

            label = f"{self.shape.name} forward {name}"
            got = self.state.attempt(label, run)
            if got is None:
                continue
            error = relative(got[0], self.exact[0])
            if out is None:
                (out, lse), errors = got, [error]
            if error > 0.01:
                say(f"!! {label}: error {error:.1e}")
            self.errors[f"forward {name}"] = [error]
            runs[name] = run
        return out, lse, errors or [1e9]

    def backward(
        self, out: Tensor, lse: Tensor, runs: dict[str, Callable[[], Any]]
    ) -> dict[str, Any]:
        """Add the variants that work to `runs`; errors, dq over repeats, kernels of the first."""
        more: dict[str, Any] = {}
        given = (self.d_out, None, self.q, self.k, self.v, out, lse)
        for name, tile in self.chosen("backward", backward_variants(self.shape)):
            if not self.wanted("backward", name):
                continue

            def run(tile: Any = tile) -> tuple[Tensor, ...]:
                return hopper.backward(*given, tile=tile, **self.call)

            label = f"{self.shape.name} backward {name}"
            got = self.state.attempt(label, run)
            if got is None:
                continue
            errors = [relative(a, b) for a, b in zip(got, self.exact[1:], strict=True)]
            self.errors[f"backward {name}"] = errors
            if max(errors) > 0.02:
                say(f"!! {label}: errors " + " ".join(f"{error:.1e}" for error in errors))
            # only the order of the fp32 additions to dQ may differ
            repeats, same = 0.0, True
            for _ in range(50 if self.shape.S != 4096 else 10):
                dq, dk, dv = run()
                repeats = max(repeats, relative(dq, got[0]))
                same &= torch.equal(dk, got[1]) and torch.equal(dv, got[2])
            if repeats > 2e-3 or not same:
                say(f"!! {label}: dq differs by {repeats:.1e} between repeats, dk, dv same: {same}")
            runs[name] = run
            kernels = self.parts(out, lse, tile)
            say(f"    {name:26s} dq over repeats {repeats:.1e}, {kernels}")
            self.kernels[name] = kernels
            if not more:
                more = dict(errors=errors, dq_over_repeats=repeats)
        return more

    def parts(self, out: Tensor, lse: Tensor, tile: Any) -> dict[str, float]:
        """Milliseconds of each of the three kernels, and the rate of the main one alone."""
        options = plan.Options(self.call["causal"], self.call["scale"])
        n_sm = torch.cuda.get_device_properties(0).multi_processor_count
        launches = plan.plan_backward(self.q, self.k, self.d_out, options, tile, n_sm)
        tensors: dict[str, Tensor | None] = dict(q=self.q, k=self.k, v=self.v, out=out, lse=lse)
        tensors |= dict(d_out=self.d_out, d_lse=None, slopes=None, bounds=None)
        counter = torch.zeros(1, dtype=torch.int32, device="cuda") if self.shape.causal else None
        tensors |= dict(counter=counter)
        tensors |= plan.backward_buffers(self.q, self.k, tile)
        found = {}
        for launch in launches:
            ms = milliseconds(functools.partial(launch.run, tensors))
            found[launch.kernel.fn.__name__.split("_")[0] + " ms"] = round(ms, 4)
        found["main TFLOP/s"] = round(2.5 * self.shape.flops / found["attention ms"] / 1e9)
        return found


def reference(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool) -> list[Tensor]:
    """out, dq, dk, dv in float32, a few heads at a time."""
    B, S, H, D = q.shape
    n = max(1, 2**28 // (S * S))
    results = [torch.empty(B * H, S, D, device=q.device) for _ in range(4)]
    flat = [x.transpose(1, 2).reshape(B * H, S, D) for x in (q, k, v, d_out)]
    hidden = torch.ones(S, S, device=q.device, dtype=torch.bool).triu(1) if causal else None
    for i in range(0, B * H, n):
        a, b, c, d = (x[i : i + n].float() for x in flat)
        p = a @ b.mT * D**-0.5
        if hidden is not None:
            p.masked_fill_(hidden, float("-inf"))
        p = p.softmax(-1)
        out = p @ c
        dv = p.mT @ d
        ds = d @ c.mT
        ds -= (d * out).sum(-1, keepdim=True)
        ds *= p
        parts = (out, ds @ b * D**-0.5, ds.mT @ a * D**-0.5, dv)
        for whole, part in zip(results, parts, strict=True):
            whole[i : i + n] = part
        del p, ds
    return [x.view(B, H, S, D).transpose(1, 2) for x in results]


def host_time() -> None:
    """Microseconds of Python per call: tiny tensors, many calls, no wait in between."""
    from kernels.attention import attention

    q, k, v, d_out = (
        torch.randn(1, 128, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    call: dict[str, Any] = dict(causal=True, scale=0.1)
    out, lse = hopper.forward(q, k, v, **call)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: hopper.forward(q, k, v, **call),
        "backward": lambda: hopper.backward(d_out, None, q, k, v, out, lse, **call),
        "attention() without gradients": lambda: attention(q, k, v, causal=True),
        "SDPA": lambda: sdpa(*heads_first, is_causal=True),
    }
    found = {}
    for name, run in calls.items():
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            run()
        found[name] = round((time.perf_counter() - start) / 200 * 1e6, 1)
        torch.cuda.synchronize()
    say("host microseconds per call: " + ", ".join(f"{name} {us}" for name, us in found.items()))
    report("host", **found)


if __name__ == "__main__":
    main()
