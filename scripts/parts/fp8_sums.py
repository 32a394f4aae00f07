"""Ways to add an fp8 product to the residual stream, which bench_fp8.py times."""

from collections.abc import Callable, Iterator

import torch

from kernels.fp8_cast import E4M3
from kernels.linear import add_float8_product


def onto_stream(
    M: int, K: int, N: int, biased: bool
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Names and calls: a [M, K], b [N, K] -> [M, N] in bf16, fast accumulation as in forward.

    The sum that follows the product is a kernel of its own here; a compiler may join it with the
    norm that reads it, which then writes it all the same.
    """
    a, b = (torch.randn(shape, device="cuda").to(E4M3) for shape in ((M, K), (N, K)))
    stream = torch.randn(M, N, device="cuda").bfloat16()
    bias = torch.randn(N, device="cuda").bfloat16() if biased else None
    one = torch.ones((), device="cuda")

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=stream.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    yield "product", product
    yield "product, then sum", lambda: stream + product()
    yield "one product", lambda: add_float8_product(a, b, one, one, bias, stream, True)
