"""Which part of a training step every kernel of a profiler trace belongs to.

A kernel is known by the operators that ran on the host when it was launched: kernel and launch
carry one correlation number, and the launch lies inside its operators' spans on its thread. That
holds under torch.compile, whose products and attention stay operators with shapes and whose fused
kernels announce themselves. A backward operator carries the sequence number of its forward one, so
it belongs to the range that one ran in. On the CPU an operator is its own kernel.

All kernels of one CUDA graph have one launch, and so one part.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scripts.parts.step_operators import PASSES, PRODUCTS, Event, bytes_moved, product_sizes

Gaps = list[tuple[float, float]]

RANGE = "flashtrain: "  # what the ranges that scripts/profile_step.py marks begin with
STEP, DATA, UPDATE, MODEL = (RANGE + name for name in ("step", "data", "update", "model"))
BACKWARD = "autograd::engine::evaluate_function"
SPANS = ("cpu_op", "user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = ("FSDP::", "fsdp::", "c10d::", "_c10d_functional::", "symm_mem::", "nccl:", "gloo:")


class Part(NamedTuple):
    group: str
    detail: str


GAPS = Part("launch gaps", "nothing runs")
WAITS = Part("data", "waited for")
EXCHANGED = Part("communication", "with nothing beside it")
LAYERS = {"qkv": "projections", "out": "projections", "head": "head + loss"}  # others: MLP
GROUPS = (
    "attention", "projections", "MLP", "norms + elementwise", "embedding", "head + loss",
    "optimizer", "gradient norm + clip", "communication", "data", "other", "launch gaps",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a trace does not say."""

    weights: Mapping[str, tuple[int, int]]  # of this rank: layer -> (out, in)
    tokens: int  # of a micro-batch
    attention_flops: float  # of one forward call on this rank; backward: 2.5 times that
    dtype: str  # of the products, as a trace spells it


@dataclass
class Total:
    time: float = 0.0  # us of the steps in which this ran and nothing counted before it
    busy: float = 0.0  # us that its kernels ran
    kernels: int = 0
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by dtype
    bytes: float = 0.0  # of the tensors that fused kernels name, each once
    known: float = 0.0  # us of the kernels behind `bytes`


@dataclass(frozen=True)
class Activity:
    start: float
    end: float
    name: str
    launched: float
    stack: tuple[Event, ...]  # from the inside out


@dataclass(frozen=True)
class Profile:
    steps: int
    time: float  # us of all steps
    totals: dict[Part, Total]
    waits: Counter[str]  # calls in which the host waited for the device


def profile(events: Iterable[Event], problem: Problem) -> Profile:
    """Every microsecond of the traced steps but the first, given to one part.

    Kernels that run at the same time: the one that began first counts. Communication counts where
    no other kernel runs. What is left is `data` while the host waits for a batch, else a gap.

    Raises ValueError when fewer than two steps were marked.
    """
    events = [event for event in events if event.get("ph") == "X"]
    # the GPU's copy of a range, of category gpu_user_annotation, would count each step twice
    marks = (e for e in events if e["name"] == STEP and e["cat"] in SPANS)
    steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in marks)
    if len(steps) < 2:
        raise ValueError(f"the trace has {len(steps)} marked steps: at least 2 are needed")
    parents = link(event for event in events if event["cat"] in (*SPANS, *LAUNCHES))
    first, last = steps[1][0], steps[-1][1]
    origins = forward_ranges(events, parents)
    everything = sorted(activities(events, parents), key=lambda one: one.start)
    traced = [one for one in everything if one.launched >= first]
    begin = max((one.end for one in everything if one.launched < first), default=first)
    end = max((one.end for one in traced), default=begin)
    totals: dict[Part, Total] = defaultdict(Total)
    counted: set[int] = set()
    parts = [describe(one, problem, origins, totals, counted) for one in traced]

    gaps: Gaps = [(begin, end)]
    for exchanging in (False, True):
        own = [
            (one.start, one.end, part)
            for one, part in zip(traced, parts, strict=True)
            if (part is EXCHANGED) is exchanging
        ]
        gaps = spend(gaps, own, totals)
    waits = sorted((e["ts"], e["ts"] + e["dur"], WAITS) for e in events if e["name"] == DATA)
    gaps = spend(gaps, waits, totals)
    totals[GAPS].time += sum(stop - start for start, stop in gaps)
    waited = Counter(
        event["name"]
        for event in events
        if event["cat"] in LAUNCHES
        and "ynchronize" in event["name"]
        and first <= event["ts"] < last
    )
    return Profile(len(steps) - 1, end - begin, dict(totals), waited)


def link(spans: Iterable[Event]) -> dict[int, Event]:
    """The span around each span on its thread, by the span's `id`."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for span in spans:
        threads[span["tid"]].append(span)
    parents: dict[int, Event] = {}
    for thread in threads.values():
        open_: list[Event] = []
        for span in sorted(thread, key=lambda span: (span["ts"], -span["dur"])):
            while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= span["ts"]:
                open_.pop()
            if open_:
                parents[id(span)] = open_[-1]
            open_.append(span)
    return parents


def stack_of(event: Event, parents: Mapping[int, Event]) -> tuple[Event, ...]:
    """The event and the spans around it, from the inside out."""
    stack = [event]
    while (parent := parents.get(id(stack[-1]))) is not None:
        stack.append(parent)
    return tuple(stack)


def forward_ranges(events: Iterable[Event], parents: Mapping[int, Event]) -> dict[int, str]:
    """Sequence number of an autograd node -> innermost marked range that made it.

    Operators that make no node carry the number of the next one: the last to carry it made it.
    """
    made: dict[int, tuple[float, str]] = {}
    for event in events:
        number = event.get("args", {}).get("Sequence number")
        if number is None or event["name"].startswith(BACKWARD):
            continue
        stack = stack_of(event, parents)
        if any(span["name"].startswith(BACKWARD) for span in stack):
            continue
        if number not in made or event["ts"] >= made[number][0]:
            made[number] = event["ts"], _range(stack) or ""
    return {number: name for number, (_, name) in made.items()}


def _range(stack: Iterable[Event]) -> str | None:
    return next((span["name"] for span in stack if span["name"].startswith(RANGE)), None)


def activities(events: list[Event], parents: Mapping[int, Event]) -> Iterator[Activity]:
    """What ran on the device; without one, each operator where no operator inside it runs."""
    kernels = [event for event in events if event["cat"] in ON_DEVICE]
    if kernels:
        launches = {
            event["args"]["correlation"]: event
            for event in events
            if event["cat"] in LAUNCHES and "correlation" in event.get("args", {})
        }
        for event in kernels:
            launch = launches.get(event["args"].get("correlation"))
            stack = () if launch is None else stack_of(launch, parents)
            launched = event["ts"] if launch is None else launch["ts"]
            stop = event["ts"] + event["dur"]
            yield Activity(event["ts"], stop, event["name"], launched, stack)
        return
    mains = {event["tid"] for event in events if event["name"] == STEP and event["cat"] in SPANS}
    operators = [e for e in events if e["cat"] == "cpu_op" and e["tid"] in mains]
    inside: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(operators, key=lambda event: event["ts"]):
        _, *around = stack_of(event, parents)
        outer = next((span for span in around if span["cat"] == "cpu_op"), None)
        if outer is not None:
            inside[id(outer)].append(event)
    for event in operators:
        stack, at = stack_of(event, parents), event["ts"]
        for child in inside[id(event)]:
            if child["ts"] > at:
                yield Activity(at, child["ts"], event["name"], at, stack)
            at = max(at, child["ts"] + child["dur"])
        if event["ts"] + event["dur"] > at:
            yield Activity(at, event["ts"] + event["dur"], event["name"], at, stack)


def describe(
    one: Activity,
    problem: Problem,
    origins: Mapping[int, str],
    totals: dict[Part, Total],
    counted: set[int],
) -> Part:
    """The part of an activity; its work is added to that part's total, an operator's once."""
    part, operator = part_of(one, problem, origins)
    total, duration = totals[part], one.end - one.start
    total.busy += duration
    total.kernels += 1
    moved = None if operator is None else bytes_moved(operator)
    if moved is not None:
        total.known += duration
    if operator is None or id(operator) in counted:
        return part
    counted.add(id(operator))
    arguments = operator.get("args", {})
    if part.group == "attention":
        factor = 2.5 if part.detail == "backward" else 1.0
        total.flops[problem.dtype] += factor * problem.attention_flops
    elif (product := product_sizes(operator)) is not None:
        kinds = arguments.get("Input type", [])
        kind = kinds[PRODUCTS[operator["name"]]] if kinds else problem.dtype
        total.flops[kind] += 2.0 * math.prod(product)
    else:
        total.bytes += moved or 0.0
    return part


def part_of(
    one: Activity, problem: Problem, origins: Mapping[int, str]
) -> tuple[Part, Event | None]:
    """The part, and the operator whose work that is where its work can be counted."""
    names = [span["name"] for span in one.stack]
    if "nccl" in one.name.lower() or any(name.startswith(COMMUNICATION) for name in names):
        return EXCHANGED, None
    outermost = one.stack[::-1]
    product = next((span for span in outermost if span["name"] in PRODUCTS), None)
    if any(name.startswith("Optimizer.") for name in names):
        return Part("optimizer", "update" if product is None else "products"), product
    if UPDATE in names:
        return Part("gradient norm + clip", "all"), None
    if DATA in names:
        return Part("data", "copies"), None
    node = next((span for span in one.stack if span["name"].startswith(BACKWARD)), None)
    way = "forward" if node is None else "backward"
    inner = next((span for span in one.stack if span["cat"] in SPANS), None)
    passes = inner is not None and inner["name"] in PASSES  # attention's backward has one inside
    attention = next((span for span in outermost if "attention" in span["name"].lower()), None)
    if not passes and (attention is not None or "attention" in one.name.lower()):
        return Part("attention", way), attention
    if node is None:
        place = _range(one.stack)
    else:
        place = origins.get(node.get("args", {}).get("Sequence number"), MODEL)
    place = (place or STEP).removeprefix(RANGE)
    if product is not None:
        return product_part(product, place, problem, backward=node is not None), product
    if "AccumulateGrad" in " ".join(names):
        return Part("norms + elementwise", "sums of gradients"), None
    if inner is not None and passes and place != "embedding":
        return Part("norms + elementwise", PASSES[inner["name"]]), inner
    fused = inner if inner is not None and inner["name"].startswith(("triton_", *PASSES)) else None
    if place == "head":
        return Part("head + loss", "rows"), fused
    if place == "embedding":
        return Part("embedding", way), fused
    if place in ("model", "norm"):
        return Part("norms + elementwise", "casts" if casts(one, problem) else way), fused
    return Part("other", "loss, counts"), fused


def product_part(operator: Event, place: str, problem: Problem, *, backward: bool) -> Part:
    """Which layer's product, told by its shape: y = x W^T, dx = dy W or dW = dy^T x, W [out, in].

    In backward a shape that fits dx is taken for dx, so with recomputation the second forward
    product of `up` counts as `down`, of the same size, and the other way round. A micro-batch of
    just as many tokens as a layer has outputs hides its dx in its dW.
    """
    sizes = product_sizes(operator)
    in_head = place == "head"  # which goes by chunks of tokens, and backward with forward
    if sizes is not None:
        _, m, k, n = sizes
        ways = {"dW": (k, (m, n)), "dx": (m, (k, n)), "y": (m, (n, k))}
        for way in ways if backward or in_head else ["y"]:
            tokens, shape = ways[way]
            for name, weight in problem.weights.items():
                fits = name == "head" if in_head else tokens == problem.tokens
                if fits and shape == weight:
                    return Part(LAYERS.get(name, "MLP"), f"{name}: {way}")
    return Part("head + loss", "rows") if place == "head" else Part("other", "products")


def casts(one: Activity, problem: Problem) -> bool:
    """Whether the largest tensor that a kernel touches is a weight or its gradient."""
    arguments = (span.get("args", {}).get("Input Dims") for span in one.stack)
    tensors: list[list[int]] = [
        dims  # a list of tensors has a list of lists
        for dims in next(filter(None, arguments), [])
        if dims and all(isinstance(size, int) for size in dims)
    ]
    largest = max(tensors, key=math.prod, default=[])
    return sorted(largest) in [sorted(weight) for weight in problem.weights.values()]


def spend(gaps: Gaps, own: list[tuple[float, float, Part]], totals: dict[Part, Total]) -> Gaps:
    """Give each of `own`, sorted by start, what it covers of the gaps; what is left of them."""
    queue, left = deque(gaps), []
    for start, stop, part in own:
        while queue and queue[0][1] <= start:
            left.append(queue.popleft())
        while queue and queue[0][0] < stop:
            low, high = queue.popleft()
            if low < start:
                left.append((low, start))
                low = start
            totals[part].time += min(high, stop) - low
            if stop < high:
                queue.appendleft((stop, high))
                break
    return [*left, *queue]
