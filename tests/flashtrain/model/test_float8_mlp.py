"""An MLP in fp8 as one: no further from exact than as two layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtrain.config import Mlp, ModelConfig
from flashtrain.model.float8 import refresh_weights
from flashtrain.model.float8_mlp import float8_mlp, norm_float8_mlp, takes
from flashtrain.model.float8_product import Float8Product, Recipe
from flashtrain.model.linear import Linear
from flashtrain.model.mlp import build_mlp
from flashtrain.model.norm import build_norm
from kernels.linear import swiglu

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def layers_of(
    gated: bool, bias: bool, device: str, recipe: Recipe | None = None, **options: Any
) -> tuple[Linear, Linear]:
    torch.manual_seed(1)
    K, hidden = (48, 80) if device == "cpu" else (768, 2048)
    made = []
    for name, inputs, outputs in (("up", K, hidden * (2 if gated else 1)), ("down", hidden, K)):
        layer = Linear(inputs, outputs, bias)
        layer.weight = nn.Parameter(torch.randn(outputs, inputs, device=device) * 0.2)
        if bias:
            layer.bias = nn.Parameter(torch.randn(outputs, device=device) * 0.5)
        layer.product = Float8Product(name, recipe or Recipe(), **options)
        made.append(layer)
    if options.get("keeps_weight", True):
        refresh_weights(made)
    return made[0], made[1]


def gradients(run: Any, layers: tuple[Linear, Linear], device: str) -> list[Tensor]:
    """Output, then gradients of x and of all parameters."""
    torch.manual_seed(2)
    K = layers[0].in_features
    x = torch.randn(64, K, device=device).bfloat16().requires_grad_()
    dy = torch.randn(64, K, device=device).bfloat16()
    parameters = [p for layer in layers for p in layer.parameters()]
    y = run(x, *layers)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]


def as_two(x: Tensor, up: Linear, down: Linear, gated: bool) -> Tensor:
    z = up(x)
    y: Tensor = down(swiglu(z) if gated else F.gelu(z, approximate="tanh"))
    return y


def exactly(x: Tensor, up: Linear, down: Linear, gated: bool) -> Tensor:
    w = [p.double() for p in up.parameters()], [p.double() for p in down.parameters()]
    z = F.linear(x.double(), *w[0])
    if gated:
        g, u = z.chunk(2, -1)
        a = F.silu(g) * u
    else:
        a = F.gelu(z, approximate="tanh")
    return F.linear(a, *w[1])


@DEVICES
@GATED
@BIAS
def test_as_close_as_two_layers(gated: bool, bias: bool, device: str) -> None:
    layers = layers_of(gated, bias, device)
    right = gradients(lambda *a: exactly(*a, gated), layers, device)
    two = gradients(lambda *a: as_two(*a, gated), layers, device)
    one = gradients(lambda *a: float8_mlp(*a, gated=gated), layers, device)
    assert len(one) == 2 + (4 if bias else 2)
    for ours, theirs, exact in zip(one, two, right, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, usual = ((t.double() - exact.double()).norm() for t in (ours, theirs))
        # a sum of d_out itself is exact but for its fp32 additions
        assert error <= 1.1 * usual + 1e-5 * exact.double().norm(), (error, usual)
        assert error < 0.2 * exact.double().norm()


@DEVICES
@GATED
@BIAS
def test_with_its_norm_and_the_stream(gated: bool, bias: bool, device: str) -> None:
    """x + mlp(norm(x)) as close to exact as where the norm's output is written and x added."""
    layers = layers_of(gated, bias, device)
    width = layers[0].in_features
    norm = build_norm(ModelConfig(d_model=width, bias=bias))
    for parameter in norm.parameters():
        parameter.data = 1 + 0.3 * torch.randn(width, device=device)
    parameters = [*norm.parameters(), *(p for layer in layers for p in layer.parameters())]
    x = torch.randn(64, width, device=device).bfloat16().requires_grad_()
    dy = torch.randn(64, width, device=device).bfloat16()

    def results(run: Any) -> list[Tensor]:
        y = run()
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]

    one = results(lambda: norm_float8_mlp(norm, x, *layers, gated=gated))
    two = results(lambda: x + float8_mlp(norm(x), *layers, gated=gated))
    right = results(lambda: x.double() + exactly(norm(x.double()), *layers, gated))
    for ours, theirs, exact in zip(one, two, right, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, usual = ((t.double() - exact.double()).norm() for t in (ours, theirs))
        # errors of a vector's few numbers scatter
        more = 1.5 if ours.dim() == 1 else 1.1
        assert error <= more * usual + 1e-5 * exact.double().norm(), (error, usual)
        assert error < 0.2 * exact.double().norm()


@DEVICES
@GATED
def test_weights_cast_on_the_way_give_the_same(gated: bool, device: str) -> None:
    """FSDP's, which are there for their use only."""

    def run(x: Tensor, up: Linear, down: Linear) -> Tensor:
        return float8_mlp(x, up, down, gated=gated)

    kept = gradients(run, layers_of(gated, True, device), device)
    cast = gradients(run, layers_of(gated, True, device, keeps_weight=False), device)
    for ours, theirs in zip(cast, kept, strict=True):
        assert torch.equal(ours, theirs)


@DEVICES
@GATED
def test_light_recomputation_forgets_what_a_pass_makes_again(gated: bool, device: str) -> None:
    kept: dict[bool, tuple[int, list[Tensor]]] = {}
    for remakes in (False, True):
        up, down = layers_of(gated, True, device)
        up.remakes = remakes
        bytes_: list[int] = []

        def note(tensor: Tensor, bytes_: list[int] = bytes_) -> Tensor:
            bytes_.append(tensor.untyped_storage().nbytes())
            return tensor

        def run(x: Tensor, up: Linear, down: Linear, note: Any = note) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return float8_mlp(x, up, down, gated=gated)

        made = gradients(run, (up, down), device)
        kept[remakes] = sum(bytes_), made
    (whole, all_), (less, same) = kept[False], kept[True]
    assert whole - less == 64 * down.in_features  # a byte a number of a
    for ours, theirs in zip(same, all_, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [Mlp.gelu, Mlp.swiglu])
def test_an_mlp_takes_it_wherever_it_can(kind: Mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(d_model=32, n_heads=2, n_kv_heads=2, d_ff=64, mlp=kind)
    torch.manual_seed(0)
    mlp, norm = build_mlp(model), build_norm(model)
    for p in (*mlp.parameters(), *norm.parameters()):
        nn.init.normal_(p, std=0.3)
    layers = [layer for layer in mlp.modules() if isinstance(layer, Linear)]
    for layer in layers:
        layer.product = Float8Product("layer", Recipe())
    refresh_weights(layers)
    x = torch.randn(2, 16, 32).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(Float8Product, "forward", None)
        patch.setattr(norm, "add", None)
        one = mlp(norm, x)
    for layer in layers:
        layer.fuses = False  # as recompute=selective wants it
    two = mlp(norm, x)
    assert x.dtype == one.dtype == two.dtype
    normed = norm(x.double())
    exact = x + exactly(normed, *layers, kind is Mlp.swiglu)
    error, usual = ((t.double() - exact).norm() for t in (one, two))
    assert 0 < error < 1.1 * usual < 0.1 * exact.norm()


def test_what_cannot_be_one() -> None:
    assert takes(*layers_of(False, True, "cpu"))
    assert not takes(*layers_of(False, True, "cpu", Recipe(rowwise=True)))
    up, down = layers_of(False, True, "cpu")
    down.weight.requires_grad_(False)
    assert not takes(up, down)
    assert not takes(up, Linear(80, 48))


def test_a_number_of_tokens_is_refused_with_its_layer() -> None:
    up, down = layers_of(False, False, "cpu")
    with pytest.raises(ValueError, match="up: fp8 products need a number of tokens that 16"):
        float8_mlp(torch.randn(5, 48).bfloat16(), up, down, gated=False)
    with torch.no_grad():
        assert float8_mlp(torch.randn(5, 48).bfloat16(), up, down, gated=False).shape == (5, 48)
