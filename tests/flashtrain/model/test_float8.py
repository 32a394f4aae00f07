"""fp8 linear layers: how far from exact, what reaches the weights, and a GPT that learns with them.

On the CPU `torch._scaled_mm` multiplies the same fp8 numbers, so only speed is a GPU's.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from flashtrain.config import (
    LinearKind,
    Mlp,
    ModelConfig,
    Moments,
    OptimizerConfig,
    PositionConfig,
    PrecisionConfig,
)
from flashtrain.model import float8_mlp, float8_product
from flashtrain.model.float8 import refresh_weights, use_float8
from flashtrain.model.float8_product import Float8Product, Recipe
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.model.linear import Linear, behind_norm, onto_stream
from flashtrain.model.norm import StreamNorm
from flashtrain.optim.adamw import build_adamw

TENSORWISE, ROWWISE = Recipe(), Recipe(rowwise=True)
RECIPES = pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=["tensorwise", "rowwise"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# relative rounding errors u / (1 + u) and half the smallest number, in units of the largest
E4M3, E5M2 = (1 / 17, 2.0**-10 / 448), (1 / 9, 2.0**-17 / 57344)
BF16 = (2.0**-8, 0.0)
FP32 = 2.0**-23
# fast accumulation keeps 14 bits of each partial sum of 32 products (Hopper)
FAST = 2.0**-13


def layer_of(K: int, N: int, recipe: Recipe | None, device: str = "cpu", **options: Any) -> Linear:
    torch.manual_seed(1)
    layer = Linear(K, N, bias=options.pop("bias", False))
    layer.weight = nn.Parameter(torch.randn(N, K, device=device) * 0.02)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.randn(N, device=device))
    if recipe is not None:
        layer.product = Float8Product("layer", recipe, **options)
        if options.get("keeps_weight", True):
            refresh_weights([layer])
    return layer


def operands(M: int, K: int, N: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x = torch.randn(M, K, device=device) * torch.randn(M, 1, device=device).exp()
    return x.bfloat16().requires_grad_(), torch.randn(M, N, device=device).bfloat16()


def bound(a: Tensor, b: Tensor, u_a: Any, u_b: Any, rowwise: bool, out: float) -> Tensor:
    """How far a product [m, n] of casts of a [m, k] and b [n, k] may be from a b^T; float64.

    A cast number is x (1 + e) + s with |e| <= u / (1 + u), and |s| half the smallest number, which
    is `small` of the largest number A of what shares the scale. So per term of the sum, with |a|,
    |b| and the sizes a' = small A_a, b' = small A_b:

        |q_a q_b - a b| <= (|a| (1 + u_a) + a') (|b| (1 + u_b) + b') - |a| |b|

    summed over k; then the sum in fp32 (k roundings at most, more where accumulation is fast), and
    the result rounded to its dtype. The scales are rounded to fp32: 4 roundings.
    """
    a, b = a.detach().double().abs(), b.detach().double().abs()

    def larger(x: Tensor, u: tuple[float, float]) -> Tensor:
        most = x.amax(1, keepdim=True) if rowwise else x.amax()
        return x * (1 + u[0]) + u[1] * most

    exact, wide = a @ b.t(), larger(a, u_a) @ larger(b, u_b).t()
    sums = (a.size(1) + 4) * FP32 + (FAST if a.is_cuda else 0.0)
    return (wide - exact) + (sums + out) * wide


@DEVICES
@RECIPES
@pytest.mark.parametrize("keeps_weight", [True, False])
def test_within_the_bound_of_fp8(recipe: Recipe, keeps_weight: bool, device: str) -> None:
    M, K, N = (48, 64, 80) if device == "cpu" else (512, 768, 1024)
    layer = layer_of(K, N, recipe, device, keeps_weight=keeps_weight)
    x, grad = operands(M, K, N, device)
    y = layer(x)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], grad)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    w, of_grad = layer.weight, E4M3 if recipe.rowwise else E5M2
    of_dw = ((BF16, BF16), 2.0**-8) if recipe.rowwise else ((E5M2, E4M3), 0.0)
    for name, ours, (a, b), (u_a, u_b), out in (
        ("y", y, (x, w), (E4M3, E4M3), 2.0**-8),
        ("dx", dx, (grad, w.t()), (of_grad, E4M3), 2.0**-8),
        ("dw", dw, (grad.t(), x.t()), *of_dw),
    ):
        exact = a.detach().double() @ b.detach().double().t()
        error = (ours.double() - exact).abs()
        limit = bound(a, b, u_a, u_b, recipe.rowwise, out)
        assert (error <= limit).all(), f"{name}: {(error / limit).max():.3f} of the bound"
        # roundings of both signs: a result without them would be as far as its terms are many
        assert error.mean() < 0.3 * limit.mean(), name
        assert error.mean() > 0, name


@DEVICES
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("keeps_weight", [True, False])
def test_behind_its_norm(keeps_weight: bool, bias: bool, device: str) -> None:
    """layer(norm(x)) with the stream's own gradient, as close to exact as where the norm's output
    is written."""
    K, N = (64, 80) if device == "cpu" else (768, 1024)
    layer = layer_of(K, N, TENSORWISE, device, bias=bias, keeps_weight=keeps_weight)
    norm = StreamNorm(K, 1e-5, centers=True, bias=bias)
    for parameter in norm.parameters():
        parameter.data = 1 + 0.3 * torch.randn(K, device=device)
    x, dy = operands(64, K, N, device)
    ds = torch.randn_like(x)
    leaves = [x, *norm.parameters(), *layer.parameters()]

    def results(y: Tensor, stream: Tensor) -> list[Tensor]:
        total = (y * dy).sum(dtype=torch.float64) + (stream * ds).sum(dtype=torch.float64)
        return [y, *torch.autograd.grad(total, leaves)]

    one = results(*behind_norm(layer, norm, x))
    two = results(layer(norm(x)), x)
    wide = x.double()
    product = F.linear(norm(wide), *(p.double() for p in layer.parameters()))
    for ours, theirs, exact in zip(one, two, results(product, wide), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, usual = ((t.double() - exact.double()).norm() for t in (ours, theirs))
        more = 1.5 if ours.dim() == 1 else 1.1  # errors of a vector's few numbers scatter
        assert error <= more * usual + 1e-5 * exact.double().norm(), (error, usual)
        assert error < 0.1 * exact.double().norm()


@DEVICES
@RECIPES
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_onto_the_stream(bias: bool, recipe: Recipe, device: str) -> None:
    layer = layer_of(64, 80, recipe, device, bias=bias)
    x, dy = operands(48, 64, 80, device)
    stream = torch.randn_like(dy).requires_grad_()
    made, branch = onto_stream(layer, x, stream)
    made = made if branch is None else made + branch
    leaves = [stream, x, *layer.parameters()]
    ours = [made, *torch.autograd.grad(made, leaves, dy)]
    plain = stream + layer(x)
    theirs = [plain, *torch.autograd.grad(plain, leaves, dy)]
    # the sum is rounded once or twice
    torch.testing.assert_close(ours[0], theirs[0], rtol=2.0**-7, atol=2.0**-6)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


@RECIPES
def test_the_weight_is_cast_when_it_changed_and_only_then(recipe: Recipe) -> None:
    layer = layer_of(32, 48, recipe)
    x, _ = operands(16, 32, 48)
    before, rows = layer(x), layer.product.rows
    refresh_weights([layer])
    assert layer.product.rows is rows
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(layer(x), before)
    refresh_weights([layer])
    assert torch.equal(layer(x), -before)


@pytest.mark.parametrize("moments", Moments)
@pytest.mark.parametrize("fused", [None, True])
def test_an_optimizer_step_is_a_change(fused: bool | None, moments: Moments) -> None:
    """PyTorch's fused kernels leave the version number of what they write as it was."""
    layer = layer_of(32, 48, TENSORWISE)
    layer.weight.grad = torch.ones_like(layer.weight)
    rows = layer.product.rows
    optimizer = build_adamw({"weight": layer.weight}, OptimizerConfig(moments=moments), MODEL)
    for group in optimizer.param_groups:
        group["fused"] = fused
    optimizer.step()
    refresh_weights([layer])
    assert layer.product.rows is not rows


@RECIPES
def test_a_weight_that_is_not_kept_leaves_nothing_behind(recipe: Recipe) -> None:
    """Of the weight, autograd saves the parameter itself, which FSDP frees and gathers."""
    layer = layer_of(32, 48, recipe, keeps_weight=False)
    x, grad = operands(16, 32, 48)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    of_weight = [t for t in saved if t.shape in ((48, 32), (32, 48))]
    assert len(of_weight) == 1
    assert of_weight[0].data_ptr() == layer.weight.data_ptr()
    kept = layer_of(32, 48, recipe)
    for ours, theirs in zip(
        torch.autograd.grad(y, [x, layer.weight], grad),
        torch.autograd.grad(kept(x), [x, kept.weight], grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_tensorwise_keeps_one_byte_a_number_of_the_input() -> None:
    layer = layer_of(64, 48, TENSORWISE)
    x, _ = operands(32, 64, 48)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(t.nbytes for t in saved) == 32 * 64 + 64 * 48 + 2 * 4


@RECIPES
def test_zeros_and_what_is_not_finite(recipe: Recipe) -> None:
    layer = layer_of(32, 48, recipe)
    x, grad = operands(16, 32, 48)
    y = layer(torch.zeros_like(x))
    assert y.count_nonzero() == 0
    assert torch.autograd.grad(y, layer.weight, grad)[0].count_nonzero() == 0
    for bad in (float("nan"), float("inf")):
        broken = x.detach().clone()
        broken[3, 5] = bad
        y = layer(broken)
        assert not y[3].isfinite().any()
        dw = torch.autograd.grad(y, layer.weight, grad)[0]
        assert not dw.isfinite().all()  # so the norm of the gradient is not, and the step is none
        wrong = grad.clone()
        wrong[3, 5] = bad
        x_grad, dw = torch.autograd.grad(layer(x), [x, layer.weight], wrong)
        assert not x_grad[3].isfinite().any()
        assert not dw.isfinite().all()


@RECIPES
def test_bias_batches_and_one_token(recipe: Recipe) -> None:
    layer = layer_of(32, 48, recipe, bias=True)
    x, _ = operands(32, 32, 48)
    flat = layer(x)
    assert torch.equal(layer(x.view(2, 4, 4, 32)), flat.view(2, 4, 4, 48))
    without = layer_of(32, 48, recipe)(x)
    assert layer.bias is not None
    # one rounding where the sum of the two has three
    rounding = 2.0**-8 * (without.abs() + layer.bias.abs() + flat.abs())
    assert (flat - (without.float() + layer.bias)).abs().le(rounding).all()
    assert not torch.equal(flat, without)
    flat.sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((48,), 32.0))
    with torch.no_grad():  # decoding: any number of tokens
        one = layer(x[:1])
    assert one.shape == (1, 48)
    if recipe.rowwise:  # no other token has a say in its scale
        assert torch.equal(one, flat[:1])


def test_tokens_that_16_does_not_divide_are_refused_in_training() -> None:
    layer = layer_of(32, 48, TENSORWISE)
    x, _ = operands(24, 32, 48)
    with pytest.raises(ValueError, match=r"layer: fp8 products need .* that 16 divides, not 24"):
        layer(x)


@RECIPES
def test_one_graph_under_compile(recipe: Recipe) -> None:
    layer = layer_of(32, 48, recipe)
    x, grad = operands(16, 32, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for call in (layer, compiled):
        y = call(x)
        results.append((y, *torch.autograd.grad(y, [x, layer.weight], grad)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        layer.weight.mul_(-1)
    refresh_weights([layer])
    assert torch.equal(compiled(x), -results[0][0])  # what was cast anew is not a constant


MODEL = ModelConfig(
    n_layers=3, n_heads=2, d_model=32, n_kv_heads=2, head_size=16, d_ff=64, vocabulary=64,
    mlp=Mlp.gelu,
)  # fmt: skip


def gpt(kind: LinearKind, keep_blocks: int = 0, device: str = "cpu", **changes: Any) -> GPT:
    model = ModelConfig(**{**vars(MODEL), **changes})
    made = GPT(model, PositionConfig(), max_length=32, dtype=torch.bfloat16).to(device)
    init_weights(made, 0)
    if kind is not LinearKind.compute:
        use_float8(made, PrecisionConfig(linear=kind, keep_blocks=keep_blocks))
    return made


def layers_in_fp8(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, Float8Product):
            yield name.removesuffix(".product")


def test_which_layers_are_in_fp8() -> None:
    model = gpt(LinearKind.fp8_tensorwise, keep_blocks=1)
    assert list(layers_in_fp8(model)) == [
        f"blocks.1.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert len(list(layers_in_fp8(gpt(LinearKind.fp8_rowwise)))) == 12


@pytest.mark.parametrize("fast", [False, True])
def test_only_products_of_backward_ask_for_what_the_config_says(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    multiply = float8_product.multiply

    def note(*operands: Any, fast: bool, **rest: Any) -> Tensor:
        asked.append(fast)
        return multiply(*operands, fast=fast, **rest)

    for module in (float8_product, float8_mlp):
        monkeypatch.setattr(module, "multiply", note)
    model = gpt(LinearKind.compute)
    use_float8(model, PrecisionConfig(linear=LinearKind.fp8_tensorwise, fast_backward=fast))
    loss = model(torch.randint(64, (2, 16))).float().square().mean()
    assert asked == [True] * 12
    loss.backward()
    assert asked == [True] * 12 + [fast] * 24


@pytest.mark.parametrize("mlp", [Mlp.gelu, Mlp.swiglu])
def test_only_a_weight_before_a_gelu_is_measured(mlp: Mlp) -> None:
    model = gpt(LinearKind.fp8_tensorwise, mlp=mlp)
    model(torch.zeros(2, 16, dtype=torch.int64))
    for name, layer in model.blocks.named_modules():
        if hasattr(layer, "product"):
            reach = layer.product.reach
            assert (reach is not None) == name.endswith("mlp.up"), name
            if reach is not None:
                torch.testing.assert_close(reach, layer.weight.norm(dim=1).max())


def test_names_of_parameters_and_checkpoints_stay() -> None:
    plain, fp8 = (gpt(kind) for kind in (LinearKind.compute, LinearKind.fp8_tensorwise))
    tokens = torch.randint(64, (2, 16))
    fp8(tokens)
    assert list(plain.state_dict()) == list(fp8.state_dict())
    assert {p.dtype for p in fp8.parameters()} == {torch.float32}
    assert not list(fp8.buffers())


def test_sampling_does_not_spoil_training() -> None:
    """A weight that is first cast under inference_mode."""
    model = gpt(LinearKind.fp8_tensorwise)
    tokens = torch.randint(64, (2, 16))
    with torch.inference_mode():
        model(tokens)
    model(tokens).float().square().mean().backward()
    assert all(p.grad is not None for name, p in model.blocks.named_parameters())


def test_sizes_are_refused_with_their_layer() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up has 72 output features on this rank"):
        gpt(LinearKind.fp8_tensorwise, d_ff=72)
    with pytest.raises(ValueError, match="2 blocks kept at either end leave none of 3"):
        gpt(LinearKind.fp8_tensorwise, keep_blocks=2)


def train(kind: LinearKind, device: str, compiled: bool = False) -> list[float]:
    """Losses of 60 steps on sequences that count upwards from a random start."""
    torch.manual_seed(0)
    model = gpt(kind, device=device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        start = torch.randint(64, (8, 1), device=device)
        tokens = (start + torch.arange(17, device=device)) % 64
        logits = model.logits(model(tokens[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("device", "compiled"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
def test_a_gpt_learns_as_in_bf16(device: str, compiled: bool) -> None:
    plain = train(LinearKind.compute, device)
    assert plain[-1] < 0.3 * plain[0]
    for kind in (LinearKind.fp8_tensorwise, LinearKind.fp8_rowwise):
        losses = train(kind, device, compiled)
        assert losses[-1] < 0.3 * losses[0], kind
        # the same data: what differs is rounding, which a few steps do not amplify
        early = [abs(a - b) / b for a, b in zip(losses[:20], plain[:20], strict=True)]
        assert max(early) < 0.02, (kind, max(early))
        assert any(a != b for a, b in pairwise(early)), kind


def test_one_graph_serves_all_blocks_and_steps() -> None:
    """Weights that are cast anew are not a reason to compile again."""
    model, counter = gpt(LinearKind.fp8_tensorwise), CompileCounter()
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    optimizer = build_adamw(dict(model.named_parameters()), OptimizerConfig(), MODEL)
    for _ in range(2):
        model(torch.randint(64, (2, 16))).float().square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
