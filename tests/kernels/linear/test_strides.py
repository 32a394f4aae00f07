"""Any strides will do, though the library and the passes are told no more of a tensor than where it
starts and how large it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear import linear, norm_gelu_mlp, products
from kernels.linear.cublaslt import Epilogue
from tests.kernels.linear.conftest import Place


def spread(x: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return torch.stack([x, torch.full_like(x, 9)], -1).flatten(-2)[..., ::2]


class AsItLies:
    """A plan that reads memory as cuBLASLt does."""

    def __init__(self, *about: Any) -> None:
        self.epilogue = about[3]

    def run(
        self, a: Tensor, b: Tensor, d: Tensor, *,
        c: Tensor | None = None, aux: Tensor | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        a, b = (torch.as_strided(t, t.shape, (t.shape[1], 1)) for t in (a, b))
        y = b @ a.t()
        for more in (c, bias):
            y = (
                y
                if more is None
                else y + torch.as_strided(more, more.shape, d.stride()[-more.dim() :])
            )
        if self.epilogue in (Epilogue.gelu_aux, Epilogue.gelu_aux_bias):
            assert aux is not None
            aux.copy_(y)
            y = torch.nn.functional.gelu(y, approximate="tanh")
        d.copy_(y)


@pytest.mark.parametrize("strided", ["x", "weight", "bias", "stream"])
def test_the_library_multiplies_what_is_meant(
    strided: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_takes_cublaslt", lambda x, backend: backend == "cublaslt")
    monkeypatch.setattr(products, "_plan", AsItLies)
    shapes = {"x": (5, 16), "weight": (8, 16), "bias": (8,), "stream": (5, 8)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    expected = linear(**given, backend="torch")
    given[strided] = spread(given[strided])
    with torch.no_grad():
        torch.testing.assert_close(linear(**given, backend="cublaslt"), expected)
        if strided != "stream":
            _, a = products.gelu_product(given["x"], given["weight"], given["bias"], "cublaslt")
            z = expected - given["stream"]
            torch.testing.assert_close(a, torch.nn.functional.gelu(z, approximate="tanh"))


def test_parameters_may_be_parts_of_others(place: Place) -> None:
    sizes = {"norm_weight": (16,), "norm_bias": (16,), "up": (24, 16), "up_bias": (24,)}
    sizes |= {"down": (16, 24), "down_bias": (16,)}
    given = {name: torch.randn(shape, device=place.device) for name, shape in sizes.items()}
    x = torch.randn(3, 7, 16, device=place.device).to(place.dtype)

    def results(x: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        named = dict(zip(parameters, leaves[1:], strict=True))
        y = norm_gelu_mlp(leaves[0], **named, eps=1e-5, centers=True, backend=place.backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    plain = results(x, given)
    other = results(spread(x), {name: spread(t) for name, t in given.items()})
    for a, b in zip(other, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(b.detach().abs().max()))
