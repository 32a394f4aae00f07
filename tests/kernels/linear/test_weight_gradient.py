"""Gradients of weights: fp32 out of their products, or rounded on the way where that is faster."""

import pytest
import torch

from kernels.linear import products, tiles
from kernels.linear.products import HOPPER


@pytest.mark.parametrize(
    ("width", "rounds"),
    [(768, ("qkv", "out", "up")), (1024, ("qkv", "out", "up")), (2048, ("out",))],
)
def test_weights_of_few_tiles_are_rounded(
    width: int, rounds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    for name, features in (("qkv", 3 * width), ("out", width), ("up", 4 * width)):
        found = tiles.rounds_gradient(features, width, torch.device("cuda"))
        assert found == (name in rounds), name
        assert not tiles.rounds_gradient(features, width, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "triton"])
@pytest.mark.parametrize(("features", "inputs"), [(768, 768), (4096, 4096)])
def test_as_close_as_its_way_allows(features: int, inputs: int, backend: str) -> None:
    if backend == "cublaslt" and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("cuBLASLt's products are for Hopper")
    dy, x = (torch.randn(512, n, device="cuda").bfloat16() for n in (features, inputs))
    dw = products.weight_gradient(dy, x, torch.float32, backend)
    assert dw.dtype == torch.float32
    rounded = tiles.rounds_gradient(features, inputs, dw.device)
    assert torch.equal(dw, dw.bfloat16().float()) == rounded
    if rounded:  # PyTorch's product, whose library may round parts of a sum, too
        assert torch.equal(dw, (dy.t() @ x).float())
        return
    exact, sizes = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    assert ((dw.double() - exact).abs() <= 512 * 2.0**-23 * sizes).all()
