"""Where the time of a training step goes: a table by part, and a trace to look at.

    python scripts/profile_step.py --trace trace.json          # gpt2_124m, 32 x 1024, one GPU
    python scripts/profile_step.py --case "experiment=gpt_1.3b data.sequence_length=2048 ..."
    torchrun --standalone --nproc-per-node 2 scripts/profile_step.py --case "... parallel=tensor2"

Runs whole optimizer steps on random tokens (loader, forward, backward, norm, clip, optimizer),
first without the profiler, then traced. Each part's arithmetic is held to the card's own limits,
measured here: a large matrix product and a copy. Attention counts 4 B H T^2 D / 2 forward (causal)
and 2.5 times that backward. The table is rank 0's; which kernel is which: parts/step_parts.py.
Open the trace at https://ui.perfetto.dev.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import Config, ConfigError, EngineKind
from flashtrain.data.source import open_loader, prepare_source
from flashtrain.optim import on_device
from flashtrain.parallel.mesh import mesh_of
from scripts.parts.step_parts import (
    DATA,
    EXCHANGED,
    GROUPS,
    MODEL,
    RANGE,
    STEP,
    UPDATE,
    Part,
    Problem,
    Profile,
    Total,
    profile,
)  # fmt: skip
from scripts.parts.where import where

DEFAULT = (
    "experiment=gpt2_124m data.sequence_length=1024 data.batch_size=32 data.micro_batch_size=32"
)
PLACES = {"embedding": "embedding", "position": "embedding", "norm": "norm"}  # run uncompiled
DTYPES = {
    "float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16,
    "c10::Float8_e4m3fn": torch.float8_e4m3fn, "c10::Float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def open_case(case: str, steps: int, device: torch.device) -> tuple[Config, Any, Any]:
    """(config, engine, loader) of some overrides. Collective over the ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    overrides = case.split() if "data=" in case else [*case.split(), "data=random"]
    if "trainer.cuda_graph" not in case:
        overrides.append("trainer.cuda_graph=off")  # whose kernels have no operators around them
    config = prepare_source(load([*overrides, f"trainer.steps={steps}"], world), world)
    if config.engine.name is not EngineKind.native:
        raise ConfigError(f"engine={config.engine.name.name}: profile_step looks into native only")
    if config.parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.pipeline={config.parallel.pipeline}: profile_step looks into a model whose "
            "layers one rank has all of"
        )
    mesh = mesh_of(config.parallel)
    engine = build_engine(config, mesh, device)
    return config, engine, open_loader(config, mesh.data.rank, mesh.data.size, device)


def mark(owner: Any, name: str, label: str) -> None:
    """Run `owner.name(..)` inside a range of the trace. Not for what a compiler traces."""
    inner: Callable[..., Any] = getattr(owner, name)

    def marked(*arguments: Any, **keywords: Any) -> Any:
        with record_function(label):
            return inner(*arguments, **keywords)

    setattr(owner, name, marked)


def mark_engine(engine: Any) -> None:
    """Name the places outside the blocks. Inside them products and attention name themselves."""
    mark(engine, "step", UPDATE)
    mark(engine.loss, "forward", MODEL)
    mark(engine.loss, "head", RANGE + "head")
    for name, label in PLACES.items():
        mark(getattr(engine.model, name), "forward", RANGE + label)


def problem_of(config: Config, engine: Any) -> Problem:
    """Sizes of this rank's weights and of one micro-batch."""
    model, data = config.model, config.data
    assert model.head_size is not None and data.micro_batch_size is not None
    block = engine.model.blocks[0]
    layers = {"qkv": block.attention.qkv, "out": block.attention.out}
    for name in ("up", "gate_up", "down"):
        if hasattr(block.mlp, name):
            layers[name] = getattr(block.mlp, name)
    weights = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    vocabulary, width = engine.model.head.weight.shape
    parallel = config.parallel
    heads = model.n_heads // (parallel.tensor or 1)
    square = data.micro_batch_size * heads * data.sequence_length**2 * model.head_size
    return Problem(
        {**weights, "head": (vocabulary, width)},
        data.micro_batch_size * data.sequence_length // parallel.context,
        # over several context ranks one attention is several calls of different sizes: no rate
        attention_flops=2.0 * square if parallel.context == 1 else 0.0,
        dtype="c10::BFloat16" if config.precision.compute.name == "bf16" else "float",
    )


def update_bytes(engine: Any) -> dict[Part, float]:
    """Bytes that one step must move at least: the norm reads gradients, and so does clipping, which
    writes them too where no optimizer does it in its own pass; the optimizer reads them, and reads
    and writes weights and its own state."""
    parameters = list(engine.parameters.values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    state = engine.optimizer.state.values()
    held = sum(t.numel() * t.element_size() for each in state for t in each.values() if t.dim())
    norm = Part("gradient norm + clip", "all")
    clips = engine.clip_norm is not None and not on_device(engine.optimizer)
    return {Part("optimizer", "update"): 3.0 * weights + 2 * held, norm: (1 + 2 * clips) * weights}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call: median of ten groups of five, after two such groups."""
    times = []
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        for _ in range(5):
            call()
        _wait(device)
        times.append((time.perf_counter() - began) / 5)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_limit(kind: str, device: torch.device) -> float:
    """FLOP/s of a square product of this dtype, 8192 wide on a GPU, 512 on a CPU."""
    n, dtype = 8192 if device.type == "cuda" else 512, DTYPES[kind]
    # in 8 bits the other side is always e4m3: of two e5m2 there is no product
    other = torch.float8_e4m3fn if dtype.itemsize == 1 else dtype
    a, b = (torch.randn(n, n, device=device).to(each) for each in (dtype, other))
    if dtype.itemsize > 1:
        return 2 * n**3 / seconds(lambda: a @ b, device)
    one = torch.ones((), device=device)
    call = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * n**3 / seconds(call, device)


def copy_limit(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB on a GPU, 64 MiB on a CPU."""
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def trace_steps(
    engine: Any, loader: Any, rate: float, warmup: int, steps: int, device: torch.device, path: Path
) -> float:
    """Write the trace of `steps` + 1 steps; returns ms of a step without the profiler."""

    def one(number: int) -> None:
        with record_function(STEP):
            with record_function(DATA):
                batches = loader.step(number)
            engine.forward_backward(batches)
            engine.step(rate)

    for number in range(warmup):
        one(number)
    _wait(device)
    began = time.perf_counter()
    for number in range(warmup, warmup + steps):
        one(number)
    _wait(device)
    plain = (time.perf_counter() - began) / steps * 1e3
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        for number in range(warmup + steps, warmup + 2 * steps + 1):
            one(number)
        _wait(device)
    recorded.export_chrome_trace(str(path))
    return plain


def rows_of(
    result: Profile, moved: dict[Part, float], products: dict[str, float], copies: float
) -> list[dict[str, Any]]:
    """The table: a row for each group, and for each part of those that have more than one."""
    rows = []
    for group in GROUPS:
        own = {part: total for part, total in result.totals.items() if part.group == group}
        for part, total in own.items():
            if part in moved:
                total.bytes, total.known = moved[part] * result.steps, total.busy
        if not own:
            continue
        rows.append(_row(group, "", list(own.values()), result, products, copies))
        if len(own) > 1:
            rows += [
                _row(group, part.detail, [total], result, products, copies)
                for part, total in sorted(own.items(), key=lambda item: _place(item[0].detail))
            ]
    return rows


def _place(detail: str) -> tuple[str, int]:
    """Layers by name, forward first."""
    layer, _, way = detail.rpartition(": ")
    order = ("forward", "y", "dx", "dW", "backward", "update")
    return layer, order.index(way) if way in order else len(order)


def _row(
    group: str, detail: str, totals: list[Total], result: Profile, products: dict[str, float],
    copies: float,
) -> dict[str, Any]:  # fmt: skip
    """Rates are over the kernels whose work is known; none where that is less than 9/10."""
    time_us, busy = (sum(getattr(t, key) for t in totals) for key in ("time", "busy"))
    row: dict[str, Any] = {
        "part": group,
        "detail": detail,
        "ms": time_us / result.steps / 1e3,
        "share": time_us / result.time,
        "busy_ms": busy / result.steps / 1e3,
        "kernels": sum(t.kernels for t in totals) / result.steps,
    }
    flops = sum(sum(t.flops.values()) for t in totals)
    ideal = sum(n / products[kind] for t in totals for kind, n in t.flops.items()) * 1e6
    known = sum(t.known for t in totals)
    if flops and busy:
        row |= {"tflops": flops / busy / 1e6, "of_limit": ideal / busy}
    elif known > 0.9 * busy > 0:
        rate = sum(t.bytes for t in totals) / known * 1e6
        row |= {"gb_s": rate / 1e9, "of_limit": rate / copies}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'part':<34}{'ms':>9}{'share':>8}{'kernels':>9}{'TFLOP/s':>9}{'GB/s':>8}{'of limit':>10}"
    )
    for row in rows:
        name = f"  {row['detail']}" if row["detail"] else row["part"]
        cells = f"{name:<34}{row['ms']:>9.3f}{row['share']:>8.1%}{row['kernels']:>9.0f}"
        rate = f"{row['tflops']:.1f}" if "tflops" in row else ""
        width = f"{row['gb_s']:.0f}" if "gb_s" in row else ""
        limit = f"{row['of_limit']:.0%}" if "of_limit" in row else ""
        print(f"{cells}{rate:>9}{width:>8}{limit:>10}".rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default=DEFAULT, help="Hydra overrides of the configuration")
    parser.add_argument("--steps", type=int, default=4, help="steps in the table (default 4)")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them (default 6)")
    parser.add_argument("--json", type=Path, help="write rows and environment here")
    parser.add_argument("--trace", type=Path, help="keep the Chrome trace here")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else None
    device = device or torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        config, engine, loader = open_case(
            options.case, options.warmup + 2 * options.steps + 1, device
        )
    except ConfigError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 2
    mark_engine(engine)
    with tempfile.TemporaryDirectory() as folder, loader:
        path = Path(folder) / "trace.json"
        if first and options.trace is not None:
            path = options.trace
        rate = config.optimizer.lr * 0.1
        plain = trace_steps(engine, loader, rate, options.warmup, options.steps, device, path)
        events = json.loads(path.read_text(), strict=False)["traceEvents"] if first else []
    if first:
        result = profile(events, problem_of(config, engine))
        kinds = sorted({kind for total in result.totals.values() for kind in total.flops})
        products = {kind: product_limit(kind, device) for kind in kinds}
        copies = copy_limit(device)
        rows = rows_of(result, update_bytes(engine), products, copies)
        traced = result.time / result.steps / 1e3
        summary: dict[str, Any] = where() | {
            "case": options.case,
            "steps": result.steps,
            "step_ms": round(plain, 3),
            "traced_step_ms": round(traced, 3),
            "limits_tflops": {kind: round(limit / 1e12, 1) for kind, limit in products.items()},
            "limit_gb_s": round(copies / 1e9),
            "waits_per_step": {k: n / result.steps for k, n in result.waits.items()},
        }
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))
        if EXCHANGED in result.totals:
            busy = result.totals[EXCHANGED].busy / result.steps / 1e3
            print(f"communication in all: {busy:.3f} ms a step, with or without kernels beside it")
        print()
        show(rows)
        if options.json:
            options.json.write_text(json.dumps({**summary, "rows": rows}, indent=2))
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
