"""A product of fp8 operands that ends in the residual stream.

It has no gradient: what casts to fp8 says how its own backward goes.

Dims: N tokens, K input features, F output features.
"""

import torch
from torch import Tensor

from kernels.linear import products
from kernels.linear.op import check
from kernels.linear.products import resolve

TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def add_float8_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    stream: Tensor,
    fast: bool,
    backend: str = "auto",
) -> Tensor:
    """stream + a_scale b_scale (a b^T) + bias [N, F] in the stream's dtype.

    By cuBLASLt the sum is rounded once, elsewhere (`torch._scaled_mm`) the product before it, too.

    Args:
        a: [N, K]; b: [F, K]; both in fp8. Not both may be e5m2 on a GPU.
        a_scale, b_scale: 0-dim fp32, on a's device.
        bias: [F], cast to the stream's dtype, or None; stream: [N, F].
        fast: keep fewer bits of partial sums.
        backend: as in `linear`; `auto` is cublaslt on Hopper for a stream of 16 bits.

    Raises:
        ValueError: arguments that make no sense.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.dtype not in TYPES:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: it must be a matrix in fp8")
    check(a.shape[1], backend, b=b, bias=bias)
    # a kernel would read one number at their address, whatever they are
    for name, scale in (("a_scale", a_scale), ("b_scale", b_scale)):
        if scale.dim() or scale.dtype != torch.float32 or scale.device != a.device:
            raise ValueError(
                f"{name} is {scale.dtype} {list(scale.shape)} on {scale.device}: it must be "
                f"0-dim torch.float32 on {a.device}"
            )
    if stream.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"stream {list(stream.shape)} must be {[a.shape[0], b.shape[0]]}")
    bias = None if bias is None else bias.to(stream.dtype)
    return products.add_float8_product(
        a, b, a_scale, b_scale, bias, stream, fast, resolve(stream, backend)
    )
