import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashtrain.config import PositionConfig, PositionKind, RopeScaling, RopeType, Target
from flashtrain.model.attention import Attention
from flashtrain.model.gpt import GPT
from flashtrain.model.init import init_weights
from flashtrain.model.norm import StreamNorm
from flashtrain.model.position import AlibiPosition, LearnedPosition, RotaryPosition, alibi_slopes
from flashtrain.model.rope import rope_frequencies
from kernels.attention import attention
from kernels.rope import rotate
from tests.flashtrain.model.test_gpt import build, some_tokens, tiny

CPU = torch.device("cpu")


def with_scaling(kind: RopeType, factor: float = 8.0, **settings: float) -> PositionConfig:
    scaling = RopeScaling(kind, factor, original_max_position_embeddings=8192, **settings)
    return PositionConfig(rope_theta=500000.0, scaling=scaling)


def test_rope_scores_depend_on_the_distance_only() -> None:
    table = RotaryPosition(64, 32, PositionConfig())(64, CPU)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    q_turned = rotate(q.expand(1, 64, 1, 32), table)[0, :, 0].double()
    k_turned = rotate(k.expand(1, 64, 1, 32), table)[0, :, 0].double()
    scores = q_turned @ k_turned.T
    for distance in (0, 1, 7, 40):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1  # and on the distance it does depend


def test_rope_keeps_lengths_and_the_first_token() -> None:
    table = RotaryPosition(16, 32, PositionConfig())(16, CPU)
    x = torch.randn(2, 16, 3, 32, generator=torch.Generator().manual_seed(0))
    y = rotate(x, table)
    assert torch.equal(y[:, 0], x[:, 0])
    assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert (y[:, 1:] - x[:, 1:]).abs().amax(-1).min() > 0.1


def test_partial_rope_leaves_the_other_dims_alone() -> None:
    position = PositionConfig(partial_rotary_factor=0.25)
    table = RotaryPosition(16, 32, position)(16, CPU)
    assert table.shape == (16, 8)
    x = torch.randn(1, 16, 2, 32)
    assert torch.equal(rotate(x, table)[..., 8:], x[..., 8:])


def test_default_frequencies_fall_from_one_by_theta() -> None:
    frequencies, magnitude = rope_frequencies(PositionConfig(rope_theta=100.0), 4)
    assert_close(frequencies, torch.tensor([1.0, 0.1], dtype=torch.float64))
    assert magnitude == 1.0


def test_linear_scaling_divides_positions() -> None:
    plain, _ = rope_frequencies(PositionConfig(rope_theta=500000.0), 128)
    scaled, magnitude = rope_frequencies(with_scaling(RopeType.linear, 4.0), 128)
    assert_close(scaled, plain / 4)
    assert magnitude == 1.0


def test_ntk_scaling_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor() -> None:
    plain, _ = rope_frequencies(PositionConfig(rope_theta=500000.0), 128)
    scaled, magnitude = rope_frequencies(with_scaling(RopeType.ntk, 4.0), 128)
    assert scaled[0] == plain[0] == 1.0
    assert_close(scaled[-1], plain[-1] / 4)
    assert magnitude == 1.0


def test_llama3_scaling_equals_its_formula_by_wavelength() -> None:
    """As `_compute_llama3_parameters` of Hugging Face: three bands by wavelength."""
    scaled, magnitude = rope_frequencies(with_scaling(RopeType.llama3), 128)
    bands = {"fast": 0, "middle": 0, "slow": 0}
    for pair, ours in enumerate(scaled.tolist()):
        frequency = 500000.0 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            bands["fast"] += 1
            expected = frequency
        elif wavelength > 8192 / 1.0:
            bands["slow"] += 1
            expected = frequency / 8.0
        else:
            bands["middle"] += 1
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * frequency / 8.0 + smooth * frequency
        assert ours == pytest.approx(expected, rel=1e-12)
    assert min(bands.values()) > 3
    assert magnitude == 1.0


def test_yarn_scaling_equals_its_formula_by_dimension() -> None:
    """As `_compute_yarn_parameters` of Hugging Face, with its ramp cut to whole dims."""
    scaled, magnitude = rope_frequencies(with_scaling(RopeType.yarn), 128)

    def correction(turns: float) -> float:
        return 128 * math.log(8192 / (turns * 2 * math.pi)) / (2 * math.log(500000.0))

    low, high = math.floor(correction(32)), math.ceil(correction(1))
    assert 0 < low < high < 64
    for pair, ours in enumerate(scaled.tolist()):
        frequency = 500000.0 ** (-2 * pair / 128)
        extrapolated = 1 - min(max((pair - low) / (high - low), 0), 1)
        expected = frequency / 8 * (1 - extrapolated) + frequency * extrapolated
        assert ours == pytest.approx(expected, rel=1e-12)
    assert magnitude == pytest.approx(0.1 * math.log(8) + 1)
    _, named = rope_frequencies(with_scaling(RopeType.yarn, attention_factor=1.5), 128)
    assert named == 1.5


def test_yarn_magnitude_scales_the_rotation() -> None:
    table = RotaryPosition(4, 32, with_scaling(RopeType.yarn, attention_factor=1.5))(4, CPU)
    x = torch.randn(1, 4, 1, 32)
    assert_close(rotate(x, table).norm(dim=-1), 1.5 * x.norm(dim=-1))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    # 12 heads: the 8 above, then every second of the 16-head slopes
    assert alibi_slopes(12) == pytest.approx(
        [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    )
    for n_heads in range(1, 130):
        assert len(set(alibi_slopes(n_heads))) == n_heads


def test_alibi_equals_an_explicit_bias_on_the_scores() -> None:
    q, k, v = torch.randn(3, 2, 9, 6, 8, generator=torch.Generator().manual_seed(0))
    slopes = AlibiPosition(6)(9, CPU)
    ours = attention(q, k, v, causal=True, alibi_slopes=slopes, backend="torch")
    steps = torch.arange(9)
    bias = slopes[:, None, None] * (steps - steps[:, None])  # [H, T, T], below 0 in the past
    bias = bias.masked_fill(steps > steps[:, None], -math.inf)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8) + bias
    assert_close(ours, torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v))


class NoNorm(StreamNorm):
    """Hands over what it gets."""

    def __init__(self) -> None:
        super().__init__(32, 1e-5, centers=False)

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        assert branch is None
        return x, x


def added(attended: Attention, x: Tensor, position: Tensor | None) -> Tensor:
    """What attention adds to the stream x, which is not normed."""
    attended.qkv.fuses = attended.out.fuses = False
    stream, branch = attended(NoNorm(), x, position)
    assert branch is not None
    assert torch.equal(stream, x)
    return branch


def test_a_shard_of_heads_takes_its_own_slopes() -> None:
    model, position = tiny(), PositionConfig(PositionKind.alibi)
    whole = build(model, position)
    attended = whole.blocks[0].attention
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    slopes = whole.position(9, CPU)
    total = torch.zeros_like(x)
    for first in (0, 2):  # two ranks of two heads each
        part = Attention(tiny(n_heads=2, head_size=8), position, "reference")
        rows = slice(first * 8, (first + 2) * 8)
        q, k, v = attended.qkv.weight.detach().chunk(3)
        part.qkv.weight.data = torch.cat((q[rows], k[rows], v[rows]))
        part.out.weight.data = attended.out.weight.detach()[:, rows]
        part.first_head = first
        total = total + added(part, x, slopes)
    assert_close(total, added(attended, x, slopes))


@pytest.mark.parametrize("kind", [PositionKind.learned, PositionKind.sinusoidal])
def test_vectors_on_q_k_v_equal_projecting_their_sum_with_x(kind: PositionKind) -> None:
    gpt = build(tiny(bias=True), PositionConfig(kind, [Target.q, Target.k, Target.v]))
    tokens = some_tokens()
    gpt.position_on_embedding = False
    attended = gpt.blocks[0].attention
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    vectors = gpt.position(tokens.shape[1], CPU)
    assert_close(added(attended, x, vectors), added(attended, x + vectors, None))


def test_learned_positions_share_one_table_over_layers_and_grow_no_gradient_beyond_t() -> None:
    gpt = build(tiny(n_layers=3), PositionConfig(PositionKind.learned))
    assert [name for name, _ in gpt.named_parameters() if "position" in name] == ["position.weight"]
    gpt.logits(gpt(some_tokens(T=11))).square().sum().backward()
    grad = gpt.get_parameter("position.weight").grad
    assert grad is not None
    assert grad[:11].abs().amax(-1).min() > 0
    assert grad[11:].abs().max() == 0


def test_more_tokens_than_learned_positions_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="17 tokens is longer than the 16 learned positions"):
        build(tiny(), PositionConfig(PositionKind.learned))(some_tokens(T=17))


@pytest.mark.parametrize(
    "kind", [PositionKind.sinusoidal, PositionKind.rope, PositionKind.alibi, PositionKind.none]
)
def test_other_positions_go_beyond_the_training_length(kind: PositionKind) -> None:
    gpt = build(tiny(), PositionConfig(kind))
    tokens = some_tokens(T=40)
    short = gpt(tokens[:, :16])
    assert_close(gpt(tokens)[:, :16], short)


def test_a_table_made_in_inference_mode_still_trains() -> None:
    gpt = build(tiny(), PositionConfig())
    with torch.inference_mode():
        gpt(some_tokens())
    gpt(some_tokens()).sum().backward()


def test_a_wrapper_can_stand_in_for_position_and_hand_out_a_part_of_the_rows() -> None:
    """What a parallel plan does with a residual stream that holds a part of the sequence."""

    class Second(torch.nn.Module):
        def __init__(self, whole: LearnedPosition) -> None:
            super().__init__()
            self.weight, self.whole = whole.weight, [whole]

        def forward(self, T: int, device: torch.device) -> Tensor:
            rows: Tensor = self.whole[0](T, device)
            return rows.chunk(2)[1]

    gpt = GPT(tiny(n_layers=1), PositionConfig(PositionKind.learned, [Target.embedding]), 16)
    init_weights(gpt, 0)
    before = dict(gpt.named_parameters())
    vectors = gpt.position(8, CPU)
    gpt.set_submodule("position", Second(gpt.position))
    assert dict(gpt.named_parameters()).keys() == before.keys()
    assert torch.equal(gpt.position(8, CPU), vectors[4:])
