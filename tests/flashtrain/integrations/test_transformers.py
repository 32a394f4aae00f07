"""Hugging Face models on flashtrain's attention: against eager, by the accuracy rule."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'flashtrain[dev]'")

import transformers
from transformers import CLIPModel, PreTrainedModel

from scripts.parts.huggingface_compare import Float64
from tests.accuracy import assert_as_accurate
from tests.flashtrain.integrations.models import FAMILIES, TOKENS, Family, inputs, make

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
WRITERS = {name: family for name, family in FAMILIES.items() if family.model is not CLIPModel}


def results(model: PreTrainedModel, family: Family, batch: dict[str, Tensor]) -> Tensor:
    """What the model says of the tokens, not the padding: [places, values]."""
    dtype = dtype_of(model)
    batch = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
    output = model(**batch)
    if isinstance(model, CLIPModel):
        seen = batch["attention_mask"].bool()
        text = output.text_model_output.last_hidden_state[seen]
        image = output.vision_model_output.last_hidden_state
        return torch.cat((text.flatten(), image.flatten()))[:, None]
    logits: Tensor = output.logits
    return logits.flatten(0, 1) if family.encoder_decoder else logits[batch["attention_mask"] > 0]


@pytest.mark.parametrize("padding", ["", "left", "right"])
@EVERY
def test_as_accurate_as_eager(family: Family, padding: str) -> None:
    ours, eager, exact = make(family, "flashtrain", "eager", "eager")
    batch = inputs(family, padding)
    outputs = [results(model, family, batch) for model in (ours, eager)]
    with Float64():
        outputs.append(results(exact.double(), family, batch))
    assert_as_accurate(*outputs, name="logits")

    weight = torch.randn(outputs[0].shape)
    for output in outputs:
        (output * weight).sum().backward()
    # dS = P (dP - delta): both terms are many times as large as what is left of them
    assert_as_accurate(*gradients(ours, eager, exact), name="gradients", terms=16)


def gradients(*models: PreTrainedModel) -> list[Tensor]:
    """All gradients of each model in one vector, each parameter's in units of its largest.

    The units are the last model's. Left out are gradients that are what others leave when they
    cancel: those of the biases of keys, which move all scores of a query alike, are 0 in exact
    arithmetic, and those of routers are differences between experts.
    """
    cancel = (".k_proj.bias", ".key.bias", "router.weight", "router.bias")
    names, units = [], {}
    for name, parameter in models[-1].named_parameters():
        if parameter.grad is not None and not name.endswith(cancel):
            unit = parameter.grad.abs().max()
            if unit > 1e-12:  # CLIP without its loss trains no projection
                names.append(name)
                units[name] = unit.item()
    return [
        torch.cat([(model.get_parameter(n).grad / units[n]).flatten() for n in names])
        for model in models
    ]


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    return next(model.parameters()).dtype


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["", "left", "right"])
@EVERY
def test_as_accurate_as_eager_on_a_gpu(family: Family, padding: str) -> None:
    """In bf16, and the Q-Former of BLIP-2 in float32."""
    models = [model.to("cuda", torch.bfloat16) for model in make(family, "flashtrain", "eager")]
    exact = copy.deepcopy(models[1]).double()
    batch = inputs(family, padding, "cuda")
    for model in models:
        if hasattr(model, "qformer"):
            model.qformer.float()
            model.query_tokens.data = model.query_tokens.data.float()
    outputs = [results(model, family, batch) for model in models]
    with Float64():
        outputs.append(results(exact, family, batch))
    assert_as_accurate(*outputs, name="logits")
    weight = torch.randn(outputs[0].shape, device="cuda")
    for output in outputs:
        (output * weight.to(output.dtype)).sum().backward()
    ours, eager, truth = gradients(*models, exact)
    # dS = P (dP - delta), and delta is made of an output that was rounded to bf16
    assert_as_accurate(ours.bfloat16(), eager, truth, name="gradients", factor=4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", WRITERS.values(), ids=WRITERS.keys())
def test_generates_the_tokens_of_eager(family: Family, cache: str) -> None:
    ours, eager = make(family, "flashtrain", "eager")
    batch = inputs(family, "left")
    batch.pop("decoder_input_ids", None)
    options = dict(do_sample=False, max_new_tokens=9, min_new_tokens=9, cache_implementation=cache)
    told, expected = (model.generate(**batch, **options) for model in (ours, eager))
    assert told.shape[1] >= 9
    assert torch.equal(told, expected)


def text_model(name: str = "llama", **options: Any) -> list[PreTrainedModel]:
    """Ours and eager, of one family, with options set in the config."""
    family = FAMILIES[name]

    def config() -> Any:
        made = family.config()
        made.update(options)
        return made

    return make(replace(family, config=config), "flashtrain", "eager")


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_packed_sequences(name: str) -> None:
    """Places that start again mean another sequence, when there is neither mask nor cache."""
    ours, eager = text_model(name)
    ids = torch.randint(2, TOKENS, (2, 16))
    places = torch.tensor([[*range(7), *range(1), *range(8)], [*range(3), *range(13)]])
    options = dict(input_ids=ids, position_ids=places, use_cache=False)
    packed = ours(**options).logits
    torch.testing.assert_close(packed, eager(**options).logits)
    alone = eager(input_ids=ids[:1, 8:]).logits
    torch.testing.assert_close(packed[:1, 8:], alone)


def test_cu_seqlens_of_a_padding_free_batch() -> None:
    ours, eager = text_model()
    ids = torch.randint(2, TOKENS, (1, 12))
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    places = torch.tensor([[*range(5), *range(7)]])
    packed = ours(
        input_ids=ids, position_ids=places, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
        max_length_q=7, max_length_k=7,
    ).logits  # fmt: skip
    torch.testing.assert_close(packed[:, 5:], eager(input_ids=ids[:, 5:]).logits)


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_prefill_in_pieces_into_a_static_cache(name: str) -> None:
    """Queries that are not the last of the keys: the cache is longer than what it holds."""
    ours, eager = text_model(name)
    batch = inputs(FAMILIES[name], "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = eager(**batch).logits
    cache = transformers.StaticCache(config=ours.config, max_cache_len=20)
    first = ours(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache).logits
    rest = ours(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, rest), 1)[mask > 0], whole[mask > 0])


def test_compiles_in_one_graph() -> None:
    name = "mistral, window"
    ours, eager = text_model(name)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    batch = inputs(FAMILIES[name], "left")
    seen = batch["attention_mask"] > 0
    for case in (batch, {"input_ids": batch["input_ids"]}):
        torch.testing.assert_close(
            compiled(**case, use_cache=False).logits[seen], eager(**case).logits[seen]
        )


def test_dropout_only_in_training_and_the_same_when_checkpointed() -> None:
    model, _ = text_model(attention_dropout=0.4)
    batch = inputs(FAMILIES["llama"], "right")

    def run() -> Tensor:
        torch.manual_seed(7)
        model.zero_grad()
        logits: Tensor = model(**batch, use_cache=False).logits
        logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    still = run()
    model.train()
    dropped = run()
    assert not torch.allclose(still, dropped, rtol=0.1)
    assert torch.equal(run(), dropped)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(run(), dropped)


def test_autocast() -> None:
    ours, eager = text_model()
    batch = inputs(FAMILIES["llama"], "left")
    seen = batch["attention_mask"] > 0
    with torch.autocast("cpu", torch.bfloat16):
        told, expected = (model(**batch).logits[seen] for model in (ours, eager))
    torch.testing.assert_close(told, expected, rtol=0.05, atol=0.05)


def test_block_masks_and_masks_of_the_user() -> None:
    ours, eager = text_model()
    ids = torch.randint(2, TOKENS, (2, 11))
    mask = torch.rand(2, 1, 11, 11) < 0.5
    mask |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = eager(input_ids=ids, attention_mask=added).logits
    for given in (mask, added):
        torch.testing.assert_close(ours(input_ids=ids, attention_mask=given).logits, expected)


def test_loads_a_checkpoint_with_the_q_former_in_float32(tmp_path: Path) -> None:
    (saved,) = make(FAMILIES["blip-2 with opt"], "eager")
    saved.save_pretrained(tmp_path)
    model = saved.from_pretrained(
        tmp_path, attn_implementation="flashtrain", dtype=torch.float16
    ).eval()
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    assert {p.dtype for p in model.language_model.parameters()} == {torch.float16}
    implementations = {
        m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
    }
    assert implementations == {"flashtrain"}
    batch = inputs(FAMILIES["blip-2 with opt"], "left")
    eager = saved.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float16)
    with Float64():
        exact = results(saved.double(), FAMILIES["blip-2 with opt"], batch)
    told, expected = (results(m, FAMILIES["blip-2 with opt"], batch) for m in (model, eager.eval()))
    assert_as_accurate(told, expected, exact)


def test_set_on_a_loaded_model() -> None:
    _, eager = text_model()
    ids = torch.randint(2, TOKENS, (1, 8))
    expected = eager(input_ids=ids).logits
    eager.set_attn_implementation("flashtrain")
    assert eager.config._attn_implementation == "flashtrain"
    torch.testing.assert_close(eager(input_ids=ids).logits, expected)


def test_refusals() -> None:
    ours, _ = text_model()
    ids = torch.randint(2, TOKENS, (1, 8))
    with pytest.raises(ValueError, match="output_attentions"):
        ours(input_ids=ids, output_attentions=True)
    bloom = transformers.BloomConfig(vocab_size=TOKENS, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"BloomForCausalLM .* computes attention itself"):
        transformers.BloomForCausalLM._from_config(bloom, attn_implementation="flashtrain")
