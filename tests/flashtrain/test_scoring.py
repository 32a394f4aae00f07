import copy
import math

import pytest
import torch

from flashtrain.build import build_model
from flashtrain.compose import load
from flashtrain.data.tokenizer import train_bpe
from flashtrain.engine.decoder import Decoder
from flashtrain.model.gpt import GPT
from flashtrain.parallel.mesh import SINGLE
from flashtrain.scoring import Score, Scorer, perplexity, windows

LENGTH = 16
TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def model() -> GPT:
    config = load(
        ["data=random", "precision=fp32", "model.vocabulary=384", "model.d_model=32",
         "model.n_layers=2", "model.init_std=0.3", f"data.sequence_length={LENGTH}"]
    )  # fmt: skip
    return build_model(config, SINGLE, torch.device("cpu"))


@torch.no_grad()
def plainly(model: GPT, context: list[int], continuation: list[int]) -> Score:
    """The definition: one sequence, all log-probabilities."""
    ids = torch.tensor([[*context, *continuation]])
    probabilities = model.logits(model(ids[:, :-1]))[0].double().log_softmax(-1)
    rows = probabilities[-len(continuation) :]
    own = rows.gather(1, torch.tensor(continuation)[:, None]).sum()
    return Score(float(own), rows.argmax(1).tolist() == continuation)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_are_sums_of_log_probabilities_in_the_order_asked(
    model: GPT, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashtrain.engine.decoder.LOGITS", 384 * 4 * 3)  # three rows at a time
    draw = torch.Generator().manual_seed(1)
    requests = []
    for context, continuation in ((1, 1), (5, 3), (9, 8), (1, 16), (12, 2), (3, 7)):
        ids = torch.randint(384, (context + continuation,), generator=draw).tolist()
        requests.append((ids[:context], ids[context:]))
    scores = Scorer(Decoder(model), LENGTH, batch_size).score(requests)
    for score, (context, continuation) in zip(scores, requests, strict=True):
        expected = plainly(model, context, continuation)
        assert score.log_probability == pytest.approx(expected.log_probability, rel=1e-5)
        assert score.greedy == expected.greedy


def test_what_the_model_would_say_itself_is_greedy(model: GPT) -> None:
    with torch.no_grad():
        best = int(model.logits(model(torch.tensor([[5, 6]])))[0, -1].argmax())
    scores = Scorer(Decoder(model), LENGTH).score([([5, 6], [best]), ([5, 6], [(best + 1) % 384])])
    assert [score.greedy for score in scores] == [True, False]


def test_a_long_context_loses_its_beginning(model: GPT) -> None:
    ids = list(range(40))
    scores = Scorer(Decoder(model), LENGTH).score([(ids[:37], ids[37:]), (ids[23:37], ids[37:])])
    assert scores[0] == scores[1]
    for context, continuation in (([], [1]), ([1], []), ([1], list(range(LENGTH + 1)))):
        with pytest.raises(ValueError, match="at most 16"):
            Scorer(Decoder(model), LENGTH).score([(context, continuation)])


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 50])
def test_windows_score_every_token_once_with_the_promised_context(n: int, stride: int) -> None:
    ids = list(range(n))
    found = list(windows(ids, LENGTH, stride))
    assert [token for _, part in found for token in part] == ids[1:]
    for context, part in found:
        assert context + part == ids[part[-1] + 1 - len(context + part) : part[-1] + 1]
        assert len(context + part) == min(part[-1] + 1, LENGTH + 1)
    for context, part in found[1:]:
        assert len(context) >= LENGTH + 1 - stride or part[-1] == n - 1
    with pytest.raises(ValueError, match="stride of 17"):
        list(windows(ids, LENGTH, 17))


def test_perplexity_is_that_of_the_mean_over_all_tokens(model: GPT) -> None:
    tokenizer = train_bpe([TEXT] * 20, 290)
    found = perplexity(Scorer(Decoder(model), LENGTH), tokenizer, TEXT * 4, stride=LENGTH)
    ids = [tokenizer.end_of_text, *tokenizer.encode(TEXT * 4)]
    pairs = list(windows(ids, LENGTH, LENGTH))
    total = sum(plainly(model, list(c), list(p)).log_probability for c, p in pairs)
    assert found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(-total / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(-total / math.log(2) / len(TEXT * 4), rel=1e-5)


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(model: GPT) -> None:
    here = copy.deepcopy(model).cuda()
    requests = [(list(range(n)), list(range(n, 12))) for n in (1, 5, 11)]
    found = Scorer(Decoder(here), LENGTH, 2).score(requests)
    for score, expected in zip(found, Scorer(Decoder(model), LENGTH).score(requests), strict=True):
        assert score.log_probability == pytest.approx(expected.log_probability, rel=1e-3)
