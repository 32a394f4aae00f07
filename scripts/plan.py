"""Plan a run before renting GPUs: which layouts fit, what fills the memory, how fast each would be.

    python scripts/plan.py model=llama_8b gpus=64 gpu=h100
    python scripts/plan.py experiment=gpt_1.3b gpus=2 gpu=h200 parallel.tensor=2 --top 3
    python scripts/plan.py gpu=h100 --scaling scaling.png     # llama_8b and llama_70b to 4,096 GPUs
    python scripts/plan.py --measured bench_train.json        # predictions beside measured rows
    python scripts/plan.py model=llama_8b gpus=2 gpu=h200 host=256 data.batch_size=1 \\
        parallel.context=2 optimizer=adamw_bf16 trainer.recompute=full trainer.mlp_chunks=16 \\
        trainer.offload_activations=true --longest            # the longest sequence that fits

key=value is the configuration, as everywhere; what of `parallel`, data.micro_batch_size and
trainer.recompute is named stays as it is, the rest is searched. model=NAME alone takes the batch,
length and positions of configs/experiment/NAME.yaml. More keys: gpus=N (default 8), gpu=NAME
(default h100), links=NAME or GB/s per GPU between hosts, node=N GPUs of a host (default 8), host=GB
of a host's memory, which bounds trainer.offload_activations (default: enough).

"bound by" names what costs most beside the products and attention that the model itself asks for:
hbm (norms, activations, casts and other kernels bound by memory bandwidth), recomputation,
optimizer, offload (to the host's memory), host (launching kernels), or the communication and the
waits of an axis: tensor, context, shard, replicate, pipeline. Figures are predictions; what they
rest on: flashtrain/planning/rates.py
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.compose import CONFIGS, load, read
from flashtrain.config import Config, ConfigError, Recompute
from flashtrain.model.gpt import n_parameters
from flashtrain.planning.gpus import GPUS, NETWORKS, Cluster, build_cluster, one_host
from flashtrain.planning.layouts import (
    Degrees,
    Plan,
    layout_overrides,
    longest,
    predict,
    search,
)
from flashtrain.planning.memory import USABLE, host_bytes, predict_memory
from flashtrain.planning.scaling import Curve, scaling

GB = 1e9
PRESETS = ("llama_8b", "llama_70b")
OWN_KEYS = {"gpus": "8", "gpu": "h100", "links": "", "node": "8", "host": "inf"}


def split_keys(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """This script's own keys, and Hydra overrides."""
    own, overrides = dict(OWN_KEYS), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in own and equals:
            own[key] = value
        else:
            overrides.append(argument)
    for key in ("gpus", "node"):
        if not own[key].isdigit() or int(own[key]) < 1:
            raise ConfigError(f"{key}={own[key]} must be a whole number, 1 or more")
    if own["host"] != "inf" and not own["host"].isdigit():
        raise ConfigError(f"host={own['host']} must be a whole number of GB")
    return own, overrides


def cluster_of(own: dict[str, str]) -> Cluster:
    return build_cluster(
        own["gpu"], own["links"] or None, int(own["node"]), GB * float(own["host"])
    )


def complete(overrides: list[str]) -> list[str]:
    """With the experiment that belongs to the model, and without data."""
    keys = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    name = keys.get("model", "").partition("=")[2]
    if name and "experiment" not in keys and (CONFIGS / "experiment" / f"{name}.yaml").exists():
        overrides = [f"experiment={name}", *overrides]
    if "data" not in keys:
        # random tokens need no path; the lengths of the group would beat the experiment's only
        # if it said nothing, and every experiment for shards says both
        overrides = ["data=random", *overrides]
    return overrides


def named_degrees(config: Config, overrides: list[str]) -> Degrees:
    """What the command line fixes of the layout."""
    keys = {override.partition("=")[0].lstrip("+~") for override in overrides}
    parallel, whole = config.parallel, "parallel" in keys
    fixed: dict[str, Any] = {
        key: getattr(parallel, key)
        for key in ("pipeline", "tensor", "context", "shard", "replicate", "zero")
        if whole or f"parallel.{key}" in keys
    }
    if "trainer.recompute" in keys:
        fixed["recompute"] = config.trainer.recompute
    if "data.micro_batch_size" in keys:
        fixed["micro_batch_size"] = config.data.micro_batch_size
    return Degrees(**fixed)


def describe(config: Config, gpus: int, cluster: Cluster) -> str:
    model = config.model
    parameters = n_parameters(model, config.position, config.data.sequence_length)
    return (
        f"{config.name}: {parameters / 1e9:.2f} billion parameters, "
        f"{config.data.batch_size} x {config.data.sequence_length} tokens a step, "
        f"{config.precision.compute.name}, on {gpus} {cluster.gpu.name} "
        f"({cluster.gpu.memory / GB:.1f} GB each, {USABLE:.0%} of it usable; "
        f"{cluster.node} a host, {cluster.gpu.link / GB:.0f} GB/s inside "
        f"and {cluster.network / GB:g} between hosts)"
    )


def print_plans(plans: list[Plan], top: int) -> None:
    columns = ("tokens/s/GPU", "step ms", "GB", "bound by", "layout")
    print("  ".join(f"{column:>12}" for column in columns[:-1]), "", columns[-1])
    for plan in plans[:top]:
        values = (
            f"{plan.tokens_per_second / plan.gpus:,.0f}",
            f"{plan.step.total * 1e3:,.1f}",
            f"{plan.memory.total / GB:.1f}",
            plan.step.bound,
        )
        words = " ".join(layout_overrides(plan.config))
        print("  ".join(f"{value:>12}" for value in values), "", words)


def print_parts(plan: Plan) -> None:
    """Where memory and time of one layout go, and what recomputation would change."""
    memory = "  ".join(f"{name} {part / GB:.1f}" for name, part in vars(plan.memory).items())
    step = "  ".join(
        f"{name} {part * 1e3:,.1f}" for name, part in vars(plan.step).items() if part > 0
    )
    print(f"  GB   {memory}")
    kinds = []
    for kind in Recompute:
        trainer = dataclasses.replace(plan.config.trainer, recompute=kind)
        if kind is not Recompute.full:  # which alone may be offloaded
            trainer.offload_activations = False
        if kind is Recompute.selective:  # which takes MLPs as a whole
            trainer.mlp_chunks = 1
        other = predict_memory(dataclasses.replace(plan.config, trainer=trainer))
        kinds.append(f"{kind.name} {other.activations / GB:.1f}")
    if pinned := host_bytes(plan.config):
        print(f"       on the host, pinned, of each rank: {pinned / GB:.1f}")
    print(f"       activations by trainer.recompute: {', '.join(kinds)}")
    print(f"  ms   {step}")


def as_row(plan: Plan) -> dict[str, Any]:
    return {
        "layout": layout_overrides(plan.config),
        "gpus": plan.gpus,
        "tokens/s": round(plan.tokens_per_second),
        "memory": {name: round(part) for name, part in vars(plan.memory).items()},
        "host memory": round(host_bytes(plan.config)),
        "seconds": vars(plan.step),
        "bound": plan.step.bound,
    }


def plan_layouts(own: dict[str, str], overrides: list[str], options: argparse.Namespace) -> int:
    cluster = cluster_of(own)
    gpus = int(own["gpus"])
    config = read(complete(overrides))
    plans, smallest = search(config, gpus, cluster, named_degrees(config, overrides))
    found = plans or [smallest]
    assert found[0] is not None
    print(describe(found[0].config, gpus, cluster))
    if smallest is not None:
        print(
            f"nothing fits: the smallest layout needs {smallest.memory.total / GB:.1f} GB of "
            f"{USABLE * cluster.gpu.memory / GB:.1f}: {' '.join(layout_overrides(smallest.config))}"
        )
        print_parts(smallest)
        return 1
    print(f"{len(plans)} layouts fit")
    print_plans(plans, options.top)
    print("the first of them, memory and time by part:")
    print_parts(plans[0])
    if options.json:
        rows = [as_row(plan) for plan in plans[: options.top]]
        options.json.write_text(json.dumps({"gpu": cluster.gpu.name, "rows": rows}, indent=2))
    return 0


def plan_longest(own: dict[str, str], overrides: list[str]) -> int:
    cluster, gpus = cluster_of(own), int(own["gpus"])
    config = read(complete(overrides))
    plan = longest(config, gpus, cluster, named_degrees(config, overrides))
    if plan is None:
        print("plan: not even a short sequence fits", file=sys.stderr)
        return 1
    print(describe(plan.config, gpus, cluster))
    print(f"the longest sequence that fits has {plan.config.data.sequence_length:,} tokens")
    print_plans([plan], 1)
    print_parts(plan)
    return 0


def plan_scaling(own: dict[str, str], overrides: list[str], options: argparse.Namespace) -> int:
    from scripts.parts.scaling_plot import draw_curves, pyplot

    pyplot()  # refused now and not after the search
    cluster = cluster_of(own)
    chosen = any(word.startswith(("model=", "experiment=")) for word in overrides)
    names = [[]] if chosen else [[f"experiment={name}"] for name in PRESETS]
    curves: list[Curve] = []
    for name in names:
        words = [*name, *overrides]
        config = read(complete(words))
        curves += scaling(config, cluster, named_degrees(config, words))
    for curve in curves:
        print(f"{curve.name}, {curve.kind} scaling")
        for plan in curve.plans:
            print(f"{plan.gpus:6} GPUs", end=" ")
            print(f"{plan.tokens_per_second / plan.gpus:8,.0f} tokens/s per GPU, bound by", end=" ")
            print(f"{plan.step.bound:<13} {' '.join(layout_overrides(plan.config))}")
    title = f"Predicted, not measured: {cluster.gpu.name}, {cluster.node} a host, "
    draw_curves(
        curves, title + f"{cluster.network / GB:g} GB/s per GPU between hosts", options.scaling
    )
    return 0


def beside_measured(own: dict[str, str], options: argparse.Namespace) -> int:
    """Rows of scripts/bench_train.py --json with what the formulas say of them."""
    try:
        report = json.loads(options.measured.read_text())
        gpu = report["environment"]["gpu"]
        known = all("error" in row or {"case", "world"} <= row.keys() for row in report["rows"])
    except (json.JSONDecodeError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{options.measured} is not what scripts/bench_train.py --json writes")
    print(f"{gpu}: measured, predicted, error")
    for row in report["rows"]:
        if "error" in row:
            continue
        case, world = row["case"].split(), int(row["world"])
        if not any(word.startswith("data=") for word in case):
            case = ["data=random", *case]  # as bench_train runs it
        cluster = one_host(build_cluster(gpu, own["links"] or None), world)
        try:
            plan = predict(load([*case, "trainer.steps=1"], world), world, cluster)
        except ValueError as error:
            print(f"{row['case']}: {error}")
            continue
        pairs = {
            "tokens/s": (row["tokens/s"], plan.tokens_per_second),
            "peak GB": (row["peak GB"], plan.memory.allocated / GB),
        }
        print(f"{row['case']} on {world}")
        for name, (measured, predicted) in pairs.items():
            error_ = predicted / measured - 1
            print(f"  {name:<9} {measured:12,.1f} {predicted:12,.1f} {error_:+8.1%}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"gpu: {', '.join(GPUS)}; links: {', '.join(NETWORKS)} or GB/s per GPU",
    )
    parser.add_argument(
        "overrides", nargs="*", help="key=value; gpus=, gpu=, links=, node=, host= too"
    )
    parser.add_argument("--top", type=int, default=10, help="layouts to print (default 10)")
    parser.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    parser.add_argument("--json", type=Path, help="write the printed layouts here")
    parser.add_argument("--scaling", type=Path, help="draw weak and strong scaling here (PNG)")
    parser.add_argument("--measured", type=Path, help="JSON of scripts/bench_train.py to compare")
    options = parser.parse_intermixed_args()
    try:
        own, overrides = split_keys(options.overrides)
        if options.measured:
            return beside_measured(own, options)
        if options.scaling:
            return plan_scaling(own, overrides, options)
        if options.longest:
            return plan_longest(own, overrides)
        return plan_layouts(own, overrides, options)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
