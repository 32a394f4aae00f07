"""Coordinate check: how far activations move in a few steps, over the width of the model.

    python scripts/coordinate_check.py                        # standard and muP, a table
    python scripts/coordinate_check.py --picture check.svg --widths 64,128,256,512,1024
    python scripts/coordinate_check.py optimizer=muon model.mlp=swiglu position=alibi

A parametrization lets a learning rate transfer over widths if every activation moves by as much at
any width (Yang et al. 2022, arXiv:2203.03466, appendix D.1): a slope near 0 on logarithmic axes.
Under the standard one, changes grow with the width (slopes towards 1), so that the best rate falls.

Each width trains on the same batch of random tokens. What counts is the root mean square of the
change of an activation since the start.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flashtrain.build import build_engine
from flashtrain.compose import load
from flashtrain.config import ConfigError
from flashtrain.data.loader import Batch
from flashtrain.engine.native import NativeEngine
from flashtrain.model.mlp import joined
from flashtrain.parallel.mesh import build_mesh
from flashtrain.tracking.charts import Curve, line_chart

KINDS = ("standard", "mup")
PARTS = ("embedding", "attention", "mlp", "logits")
HEAD = 32  # widths grow by heads of this size
CASE = [
    "experiment=null", "model=gpt_tiny", "model.n_layers=2", "model.vocabulary=256",
    "data=random", "data.sequence_length=32", "data.batch_size=16", "data.micro_batch_size=16",
    "precision=fp32", "schedule=constant", "trainer.compile=false", "parallel=data",
]  # fmt: skip


def changes(kind: str, width: int, base: int, steps: int, rate: float, *more: str) -> list[float]:
    """Root mean square of the change of each of PARTS after some steps."""
    mup = [f"model.base_width={base}"] if kind == "mup" else []
    overrides = [
        *CASE, f"model.d_model={width}", f"model.n_heads={max(1, width // HEAD)}",
        f"model.parametrization={kind}", *mup, f"optimizer.lr={rate}", *more,
    ]  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load(overrides)
    engine = build_engine(config, build_mesh(1), device)
    if not isinstance(engine, NativeEngine):
        raise ConfigError("engine=deepspeed: the coordinate check looks into native only")
    made = torch.Generator().manual_seed(0)
    assert config.model.vocabulary is not None
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    ids = torch.randint(config.model.vocabulary, shape, generator=made).to(device)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    before = activations(engine, batch.tokens)
    for _ in range(steps):
        engine.forward_backward([batch])
        engine.step(rate)
    after = activations(engine, batch.tokens)
    return [
        float((new - old).square().mean().sqrt()) for old, new in zip(before, after, strict=True)
    ]


@torch.no_grad()
def activations(engine: NativeEngine, tokens: Tensor) -> list[Tensor]:
    """What each of PARTS gives: what the last block's attention and MLP add to the stream stands
    for all of them."""
    model, seen = engine.model, {}
    last = model.blocks[-1]

    def attention(_module: object, given: Any, out: Any) -> None:  # (norm, x, ..) -> what it is now
        seen["attention"] = joined(*out) - given[1]

    def mlp(_module: object, given: Any, out: Tensor) -> None:  # (norm, x, branch)
        seen["mlp"] = out - joined(*given[1:])

    handles = [
        model.embedding.register_forward_hook(lambda _m, _x, out: seen.update(embedding=out)),
        last.attention.register_forward_hook(attention),
        last.mlp.register_forward_hook(mlp),
    ]
    seen["logits"] = model.logits(model(tokens))
    for handle in handles:
        handle.remove()
    return [seen[name].float() for name in PARTS]


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of the straight line through the values on logarithmic axes (least squares)."""
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return over / sum((a - middle) ** 2 for a in x)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="64,128,256,512", help=f"multiples of {HEAD}")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default 5)")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate (default 4e-3)")
    parser.add_argument("--picture", type=Path, help="also draw it into this .svg file")
    parser.add_argument("overrides", nargs="*", help="key=value for every model")
    arguments = parser.parse_args()
    try:
        widths = [int(width) for width in arguments.widths.split(",")]
        if len(set(widths)) < 2:
            raise ConfigError(f"--widths {arguments.widths}: name two or more, as in 64,128")
        table = {
            kind: [
                changes(
                    kind, width, widths[0], arguments.steps, arguments.rate, *arguments.overrides
                )
                for width in widths
            ]
            for kind in KINDS
        }
    except ValueError as error:  # a ConfigError among them
        print(f"coordinate_check: {error}", file=sys.stderr)
        return 2
    print(f"root mean square of changes after {arguments.steps} steps at rate {arguments.rate:g}\n")
    print(f"{'':<22}" + "".join(f"{width:>10}" for width in widths) + f"{'slope':>9}")
    for kind, rows in table.items():
        for index, part in enumerate(PARTS):
            values = [row[index] for row in rows]
            shown = "".join(f"{value:>10.4f}" for value in values)
            print(f"{kind:<10}{part:<12}{shown}{slope(widths, values):>9.2f}")
    if arguments.picture is not None:
        arguments.picture.write_text(draw(widths, table))
        print(f"\n{arguments.picture}")
    return 0


def draw(widths: list[int], table: dict[str, list[list[float]]]) -> str:
    curves = [
        Curve(
            [(width, row[index]) for width, row in zip(widths, rows, strict=True)],
            f"{kind} {part}",
            color=10 * (kind == "standard") + index,  # dashed
            dots=True,
        )
        for kind, rows in table.items()
        for index, part in enumerate(PARTS)
    ]
    return line_chart(curves, x="width", y="change of activations", log_x=True, log_y=True)


if __name__ == "__main__":
    sys.exit(main())
