"""What the operators of a trace do: products with their sizes, passes over memory with their bytes.

Used by step_parts.py. Of arguments a trace has shapes and types, of scalars their values.
"""

import math
from typing import Any

Event = dict[str, Any]  # of a Chrome trace; times in microseconds

# operator -> which argument is its first factor
PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::_scaled_mm": 0,
    "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1,
    "flashtrain_linear::gelu_product": 0, "flashtrain_linear::add_product": 0,
    "flashtrain_linear::weight_gradient": 0,
}  # fmt: skip
# operators of kernels/ -> what the table calls their passes; a product inside counts for itself
PASSES = {
    "flashtrain_norm::forward": "norms: forward", "flashtrain_norm::backward": "norms: backward",
    "flashtrain_linear::gelu_gradient": "GELU: backward",
    "flashtrain_linear::swiglu_gradient": "SwiGLU: backward",
    "flashtrain_linear::column_sums": "sums over tokens", "flashtrain_linear::cast": "casts",
    "flashtrain_embedding::gather": "forward", "flashtrain_embedding::gradient": "backward",
    "flashtrain_rope::rotate_heads_": "rotations", "flashtrain_rope::rotate_heads": "rotations",
    "flashtrain_fp8::absolute_maximum": "fp8: maxima",
    "flashtrain_fp8::largest": "fp8: maxima", "flashtrain_fp8::gated_maxima": "fp8: maxima",
    "flashtrain_fp8::cast_hidden": "fp8: casts", "flashtrain_fp8::cast_tensorwise": "fp8: casts",
    "flashtrain_fp8::cast_rowwise": "fp8: casts", "flashtrain_fp8::cast_columnwise": "fp8: casts",
}  # fmt: skip
BYTES = {
    "double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1, "long int": 8, "int": 4, "bool": 1, "unsigned char": 1,
}  # fmt: skip


def product_sizes(operator: Event) -> tuple[int, ...] | None:
    """(batch, m, k, n) of [.., m, k] x [k, n]; None for what is no product of known shapes."""
    shapes = operator.get("args", {}).get("Input Dims", [])
    first = PRODUCTS.get(operator["name"])
    if first is None or len(shapes) < first + 2 or min(map(len, shapes[first : first + 2])) < 2:
        return None
    *batch, m, k = shapes[first]
    rows, columns = shapes[first + 1][-2:]
    match operator["name"]:
        case "flashtrain_linear::gelu_product" | "flashtrain_linear::add_product":  # x W^T
            return 1, m, k, rows
        case "flashtrain_linear::weight_gradient":  # dy^T x
            return 1, k, m, columns
    return math.prod(batch), m, k, columns


def bytes_moved(operator: Event) -> float | None:
    """What a pass reads and writes at least; None for what is none.

    A kernel of the compiler names all it touches. Results of ours are no arguments.
    """
    name, arguments = operator["name"], operator.get("args", {})
    shapes, kinds = arguments.get("Input Dims", []), arguments.get("Input type", [])
    if not name.startswith("triton_") and (name not in PASSES or not shapes):
        return None
    given = [
        math.prod(dims) * BYTES.get(kind, 0) if dims else 0
        for dims, kind in zip(shapes, kinds, strict=False)
    ]
    values = arguments.get("Concrete Inputs") or [""] * len(shapes)
    match name.partition("::")[2]:
        case "forward":  # the norm, and the sum where there is a branch
            return sum(given) + given[0] * (2 if given[1] else 1)
        case "backward":
            return sum(given) + given[0] * (1 + (values[8] == "True"))  # the norm once more
        case "gelu_gradient":  # beside its product
            return given[2] * (3 + (values[4] == "True"))  # GELU once more
        case "swiglu_gradient":  # a tensor as wide as z, and SwiGLU once more
            return given[0] * (1 + (values[3] == "True")) + 2 * given[1]
        case "cast":  # fp32 to 16 bits
            return sum(given[:2]) * 1.5
        case "gather":  # the rows, not the table, and in 16 bits
            return given[0] + 6.0 * shapes[0][0] * shapes[1][1]
        case "gradient":
            return sum(given[:2]) + 4.0 * int(values[2] or 0) * shapes[1][1]
        case "rotate_heads_":  # of some heads, in fp32 tables
            turned = given[0] / shapes[0][2] * int(values[2] or shapes[0][2])
            return given[1] + 2 * turned * shapes[1][-1] / shapes[0][3]
        case "rotate_heads":
            return given[1] + 2 * given[0]
        case "cast_tensorwise" | "cast_rowwise" | "cast_columnwise":
            layouts = 2 if name.endswith("tensorwise") else 1
            return sum(given) + layouts * float(math.prod(shapes[0]))
        case "cast_hidden":  # half as wide as z where it is what a gated MLP makes of it
            half = 2 if values[3] == "True" and not given[1] else 1
            return sum(given) + (1 + (values[4] == "True")) * math.prod(shapes[0]) / half
    return sum(given)
