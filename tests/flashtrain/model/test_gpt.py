import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from flashtrain.compose import resolve_model
from flashtrain.config import Mlp, ModelConfig, Norm, PositionConfig, PositionKind, Target
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from tests.flashtrain.model.plain_gpt import plain_hidden

Q, K, V, EMBEDDING = Target.q, Target.k, Target.v, Target.embedding
ROPE = PositionConfig(PositionKind.rope)
SOME_OF_QKV = [list(c) for n in (1, 2, 3) for c in itertools.combinations((Q, K, V), n)]
POSITIONS = [
    PositionConfig(PositionKind.none),
    PositionConfig(PositionKind.alibi),
    PositionConfig(PositionKind.rope, partial_rotary_factor=0.5),
    *(PositionConfig(PositionKind.rope, some) for some in SOME_OF_QKV),
    *(PositionConfig(PositionKind.learned, some) for some in [*SOME_OF_QKV, [EMBEDDING]]),
    *(PositionConfig(PositionKind.sinusoidal, some) for some in [*SOME_OF_QKV, [EMBEDDING]]),
]


def describe(position: PositionConfig) -> str:
    share = "" if position.partial_rotary_factor == 1 else "-partial"
    return position.kind.name + "-" + "".join(t.name[0] for t in position.applies_to) + share


def tiny(**settings: Any) -> ModelConfig:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "vocabulary": 48, "init_std": 0.2}
    return resolve_model(ModelConfig(**(sizes | settings)))


def build(model: ModelConfig, position: PositionConfig, **settings: Any) -> GPT:
    """A filled model, with norms and biases that are not ones and zeros."""
    gpt = GPT(model, position, max_length=16, **settings)
    init_weights(gpt, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return gpt


def some_tokens(B: int = 2, T: int = 11) -> Tensor:
    return torch.randint(0, 48, (B, T), generator=torch.Generator().manual_seed(0))


def assert_equals_plain(model: ModelConfig, position: PositionConfig) -> None:
    gpt, tokens = build(model, position), some_tokens()
    expected = plain_hidden(dict(gpt.named_parameters()), model, position, tokens)
    # fp32 sums of up to 128 terms, two blocks deep, values of size 1
    assert_close(gpt(tokens).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("position", POSITIONS, ids=describe)
def test_forward_equals_the_long_way_for_every_position(position: PositionConfig) -> None:
    assert_equals_plain(tiny(n_kv_heads=2, qk_norm=True), position)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("mlp", Mlp)
def test_forward_equals_the_long_way_for_every_norm_and_mlp(
    mlp: Mlp, norm: Norm, bias: bool
) -> None:
    assert_equals_plain(tiny(mlp=mlp, norm=norm, bias=bias), ROPE)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries_share_key_value_heads(kv_heads: int) -> None:
    assert_equals_plain(tiny(n_kv_heads=kv_heads, head_size=6), ROPE)


@pytest.mark.parametrize("position", POSITIONS, ids=describe)
def test_a_future_token_changes_nothing_before_it(position: PositionConfig) -> None:
    gpt, tokens = build(tiny(), position), some_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 48
    before, after = gpt(tokens), gpt(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("position", POSITIONS, ids=describe)
def test_every_parameter_trains(position: PositionConfig) -> None:
    gpt, tokens = build(tiny(bias=True, qk_norm=True), position), some_tokens(T=16)
    loss = next_token_loss(gpt, tokens)
    loss.backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None, name
        # the key bias shifts all of a query's scores alike, which QK-norm undoes in part
        assert parameter.grad.abs().max() > 1e-7, name
    with torch.no_grad():
        for parameter in gpt.parameters():
            assert parameter.grad is not None
            parameter -= 0.02 * parameter.grad
    assert next_token_loss(gpt, tokens) < loss


def next_token_loss(gpt: GPT, tokens: Tensor) -> Tensor:
    logits = gpt.logits(gpt(tokens))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_a_tied_head_adds_both_gradients_into_one_parameter() -> None:
    tied, untied = build(tiny(), ROPE), build(tiny(tied_head=False), ROPE)
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight})
    tokens = some_tokens()
    for gpt in (tied, untied):
        next_token_loss(gpt, tokens).backward()
    grads = [p.grad for p in (untied.embedding.weight, untied.head.weight, tied.embedding.weight)]
    assert all(grad is not None and grad.abs().max() > 1e-3 for grad in grads)
    assert_close(grads[2], grads[0] + grads[1], rtol=1e-5, atol=1e-7)


def test_softcap_bounds_logits_smoothly() -> None:
    model = tiny(logit_softcap=2.0)
    gpt = build(model, ROPE)
    hidden = gpt(some_tokens())
    raw = hidden @ gpt.embedding.weight.T
    assert raw.abs().max() > 2.5
    assert_close(gpt.logits(hidden), 2.0 * torch.tanh(raw / 2.0))


def test_compute_dtype_is_that_of_activations_while_weights_stay_fp32() -> None:
    model = tiny(bias=True, qk_norm=True, n_kv_heads=2)
    exact, rounded = build(model, ROPE), build(model, ROPE, dtype=torch.bfloat16)
    hidden = rounded(some_tokens())
    assert hidden.dtype == rounded.logits(hidden).dtype == torch.bfloat16
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    error = (hidden.float() - exact(some_tokens())).abs().max()
    assert 1e-4 < error < 0.1  # values of size 3, 8 bits of mantissa, two blocks
    hidden.float().square().sum().backward()
    assert {p.grad.dtype for p in rounded.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", PositionKind)
def test_blocks_compile_without_a_graph_break(kind: PositionKind) -> None:
    gpt = build(tiny(n_kv_heads=2, qk_norm=True), PositionConfig(kind))
    tokens = some_tokens()
    expected = gpt(tokens)
    torch.compiler.reset()
    for block in gpt.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(gpt(tokens), expected)
    next_token_loss(gpt, tokens).backward()


def test_a_model_built_on_meta_holds_no_values_of_its_own() -> None:
    with torch.device("meta"):
        gpt = GPT(tiny(), ROPE, max_length=16, backend="reference")
    assert {p.device.type for p in gpt.parameters()} == {"meta"}
    assert not list(gpt.buffers())
    gpt.to_empty(device="cpu")
    gpt.head.weight = gpt.embedding.weight  # to_empty unties
    init_weights(gpt, seed=3)
    whole = GPT(tiny(), ROPE, max_length=16, backend="reference")
    init_weights(whole, seed=3)
    assert torch.equal(gpt(some_tokens()), whole(some_tokens()))


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocabulary is not known"):
        GPT(tiny(vocabulary=None), ROPE, max_length=16)
