"""Models to and from Hugging Face's folders, against transformers itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtrain import checkpoint
from flashtrain.build import build_model
from flashtrain.checkpoint.huggingface import export_folder, import_folder
from flashtrain.checkpoint.huggingface_config import FormatError, export_config
from flashtrain.compose import from_dict, resolve
from flashtrain.config import (
    Config,
    DataConfig,
    Mlp,
    ModelConfig,
    Norm,
    PositionConfig,
    PositionKind,
    RopeScaling,
    RopeType,
    Source,
    Target,
    TrainerConfig,
    to_dict,
)  # fmt: skip
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.tokenizer import ByteTokenizer, train_bpe
from flashtrain.engine.decoder import Decoder
from flashtrain.model.generate import complete
from flashtrain.model.sampling import Sampling
from flashtrain.parallel.collectives import all_gather
from flashtrain.parallel.mesh import SINGLE, build_mesh
from flashtrain.train import train
from tests.harness import run_ranks
from tests.test_layering import offenders

TEXT = "the quick brown fox jumps over the lazy dog and naps until the morning comes " * 40
GPT2 = dict(vocab_size=270, n_positions=32, n_embd=32, n_layer=2, n_head=4)
LLAMA = dict(
    vocab_size=270, max_position_embeddings=32, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
SCALED = dict(factor=2.0, original_max_position_embeddings=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=96)),
    "llama": ("Llama", LLAMA),
    "llama tied, heads of 16, biases": (
        "Llama",
        LLAMA | dict(head_dim=16, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-5),
    ),
    "llama linear": ("Llama", LLAMA | {"rope_parameters": dict(rope_type="linear", factor=2.0)}),
    "llama llama3": (
        "Llama",
        LLAMA
        | {"rope_parameters": SCALED
           | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)},
    ),
    "llama yarn": ("Llama", LLAMA | {"rope_parameters": SCALED | dict(rope_type="yarn")}),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library; where it is absent, what needs it is skipped with a reason."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


def make(transformers: Any, name: str, folder: Path) -> Any:
    """A random model of transformers and its folder, with a tokenizer of fewer ids than rows."""
    kind, settings = MODELS[name]
    settings = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    if "rope_parameters" in settings:
        settings["rope_parameters"]["rope_theta"] = 500.0
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**settings, initializer_range=0.2)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")(
        config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(folder)
    train_bpe([TEXT], 265).save(folder / "tokenizer.json")
    return model


def some_tokens() -> Tensor:
    return torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def theirs(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(some_tokens()).logits
    return logits


def ours(path: Path) -> Tensor:
    """Logits of a checkpoint, on the tensor ranks there are."""
    config = from_dict(checkpoint.read_meta(path)["config"])
    axis = build_mesh(dist.get_world_size()).tensor if dist.is_initialized() else SINGLE
    model = build_model(config, axis, torch.device("cpu"))
    checkpoint.load(path, checkpoint.collect(model))
    with torch.no_grad():
        logits = model.logits(model(some_tokens()))
    if axis.group is None:
        return logits
    return torch.cat(all_gather(logits, axis.size, axis.name).unbind(), -1)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    rows = min(ours.shape[-1], theirs.shape[-1])
    scale = theirs.abs().max()
    assert scale > 0.5  # else a model of zeros would pass
    torch.testing.assert_close(ours[..., :rows], theirs[..., :rows], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_imported_and_exported_logits_are_transformers_own(
    name: str, tmp_path: Path, transformers: Any
) -> None:
    model = make(transformers, name, tmp_path / "theirs")
    path = import_folder(tmp_path / "theirs", tmp_path / "run")
    expected = theirs(model)
    assert_equal(ours(path), expected)
    export_folder(path, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.float32
    assert back.config.vocab_size == train_bpe([TEXT], 265).size  # trimmed to the tokenizer's
    assert_equal(theirs(back), expected)
    words, own = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "back"),
        train_bpe([TEXT], 265),
    )
    assert words(TEXT[:90]).input_ids == own.encode(TEXT[:90])
    assert words.eos_token_id == back.generation_config.eos_token_id == own.end_of_text
    made = back.generate(torch.tensor([[5, 6]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert made.shape == (1, 5)
    # the exported folder is a source itself
    again = ours(import_folder(tmp_path / "back", tmp_path / "again"))
    assert_equal(again[..., : back.config.vocab_size], expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_text_is_transformers_own(name: str, tmp_path: Path, transformers: Any) -> None:
    model = make(transformers, name, tmp_path / "theirs")
    path = import_folder(tmp_path / "theirs", tmp_path / "run")
    config = from_dict(checkpoint.read_meta(path)["config"])
    own = build_model(config, SINGLE, torch.device("cpu"))
    checkpoint.load(path, checkpoint.collect(own))
    greedy = Sampling(temperature=0.0)
    (found,) = complete(Decoder(own), [[5, 6, 7]], 20, max_length=32, sampling=greedy, n_ids=270)
    expected = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert found == expected[0, 3:].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_round_trip_over_two_tensor_ranks_and_training(
    name: str, tmp_path: Path, transformers: Any
) -> None:
    model = make(transformers, name, tmp_path / "theirs")
    path = import_folder(tmp_path / "theirs", tmp_path / "imported")
    for degree in (2, 4):  # four ranks share the two key/value heads of the Llama
        run_ranks(check_logits, degree, tmp_path, path, theirs(model))

    (tmp_path / "text.txt").write_text(TEXT * 4)
    recipe = Recipe(str(tmp_path / "imported" / "tokenizer.json"))
    prepare([tmp_path / "text.txt"], tmp_path / "data", recipe)
    config = from_dict(checkpoint.read_meta(path)["config"])
    config.run_dir, config.model.weights = str(tmp_path / "run"), str(tmp_path / "imported")
    config.data = DataConfig(path=str(tmp_path / "data"), sequence_length=32, batch_size=4)
    config.trainer = TrainerConfig(
        steps=5, log_every=1, evaluate_sequences=2, sample_tokens=4, compile=False
    )
    config.parallel.tensor, config.optimizer.lr = 2, 1e-2
    config.schedule.warmup_steps = 1
    config.tracking.console, config.tracking.wandb.mode = (
        False,
        type(config.tracking.wandb.mode).disabled,
    )
    for stop in (3, None):  # the second start goes on, not from the imported weights again
        config.trainer.stop_at = stop
        run_ranks(check_trains, 2, tmp_path, to_dict(config))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert losses[4] < losses[0]

    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000003", "step-00000005"]
    trained = saved[-1]
    export_folder(trained, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_equal(theirs(back), ours(trained))
    assert (theirs(back) - theirs(model)[..., : back.config.vocab_size]).abs().max() > 0.01


def check_logits(path: Path, expected: Tensor) -> None:
    assert_equal(ours(path), expected)


def check_trains(tree: dict[str, Any]) -> None:
    train(resolve(from_dict(tree), 2), torch.device("cpu"))


def small(**changes: Any) -> Config:
    """A configuration that exports as GPT-2."""
    model = dict(n_layers=1, n_heads=2, d_model=16, vocabulary=300, bias=True)
    config = Config(
        model=ModelConfig(**(model | changes)),
        position=PositionConfig(PositionKind.learned, [Target.embedding]),
        data=DataConfig(source=Source.random, sequence_length=8, batch_size=1),
        trainer=TrainerConfig(steps=1),
    )
    return resolve(config, 1)


def test_files_of_a_hub_without_prefix_and_in_parts_are_read(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "run")
    export_folder(path, tmp_path / "one", dtype=torch.float32)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask that old files hold
    names = sorted(bare)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    places = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: bare[n].clone() for n in names if places[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(weights(import_folder(parts, tmp_path / "a")), weights(path))


def test_large_models_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(small(n_layers=3), tmp_path / "run")
    monkeypatch.setattr("flashtrain.checkpoint.huggingface.FILE_BYTES", 9000)
    export_folder(path, tmp_path / "parts", dtype=torch.float32)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert torch.equal(weights(import_folder(tmp_path / "parts", tmp_path / "a")), weights(path))


def saved(config: Config, run: Path) -> Path:
    model = build_model(config, SINGLE, torch.device("cpu"))
    meta = {"config": to_dict(config)}
    return checkpoint.save(run / "checkpoints", 1, checkpoint.collect(model), meta)


def weights(path: Path) -> Tensor:
    config = from_dict(checkpoint.read_meta(path)["config"])
    model = build_model(config, SINGLE, torch.device("cpu"))
    checkpoint.load(path, checkpoint.collect(model))
    tensors = [p[:300] if "embedding" in name else p for name, p in model.named_parameters()]
    return torch.cat([p.detach().flatten() for p in tensors])


def test_a_model_without_biases_becomes_gpt2_with_zeros(tmp_path: Path) -> None:
    path = saved(small(bias=False), tmp_path / "run")
    export_folder(path, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    biases = [tensor for name, tensor in tensors.items() if name.endswith("bias")]
    assert len(biases) == 7
    assert not any(tensor.any() for tensor in biases)


def test_padding_of_the_vocabulary_gets_no_more_than_its_share(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "run")
    export_folder(path, tmp_path / "out")
    imported = import_folder(tmp_path / "out", tmp_path / "imported")
    config = from_dict(checkpoint.read_meta(imported)["config"])
    assert config.model.vocabulary == 384
    model = build_model(config, SINGLE, torch.device("cpu"))
    checkpoint.load(imported, checkpoint.collect(model))
    hidden = 30 * torch.randn(1, 50, 16)  # far from uniform
    shares = model.logits(hidden).double().softmax(-1)
    assert shares[..., 300:].max() <= 1 / 300
    rise = -shares[..., :300].sum(-1).log()
    assert rise.max() <= np.log(384 / 300) + 1e-9


def test_bytes_are_a_tokenizer_of_hugging_face_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = saved(small(), tmp_path / "run")
    ByteTokenizer().save(tmp_path / "run" / "tokenizer.json")
    tree = export_folder(path, tmp_path / "out")
    assert (tree["vocab_size"], tree["eos_token_id"]) == (257, 256)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "".join(map(chr, range(1, 700))) + "日本 🙂\n\n  a"
    assert inner.encode(text).ids == ByteTokenizer().encode(text)
    assert inner.decode(ByteTokenizer().encode(text)) == text
    assert inner.encode("<|endoftext|>").ids == [256]


ROPE = PositionConfig(PositionKind.rope)
LLAMA_MODEL = dict(norm=Norm.rmsnorm, mlp=Mlp.swiglu, bias=False)


@pytest.mark.parametrize(
    ("changes", "position", "sentence"),
    [
        ({}, PositionConfig(PositionKind.alibi), r"position\.kind=alibi .* GPT-2 .* has learned"),
        ({}, PositionConfig(PositionKind.learned, [Target.q]), r"position\.applies_to=\[q\]"),
        ({"mlp": Mlp.relu2}, None, r"model\.mlp=relu2"),
        ({"qk_norm": True}, None, r"model\.qk_norm=true .* has false"),
        ({"logit_softcap": 30.0}, None, r"model\.logit_softcap=30\.0 .* has null"),
        ({"n_kv_heads": 1}, None, r"model\.n_kv_heads=1 .* has 2"),
        (LLAMA_MODEL, PositionConfig(PositionKind.rope, [Target.q, Target.k, Target.v]),
         r"position\.applies_to=\[k,q,v\] .* Llama"),
        (LLAMA_MODEL, PositionConfig(PositionKind.rope, partial_rotary_factor=0.5),
         r"position\.partial_rotary_factor=0\.5 .* has 1\.0"),
        ({"mlp": Mlp.swiglu}, ROPE, r"model\.norm=layernorm"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_by_name(
    changes: dict[str, Any], position: PositionConfig | None, sentence: str, tmp_path: Path
) -> None:
    config = small(**changes)
    config.position = position or config.position
    path = saved(config, tmp_path / "run")
    with pytest.raises(FormatError, match=sentence):
        export_folder(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ntk_scaling_is_a_larger_theta() -> None:
    config = small(**LLAMA_MODEL)
    config.position = dataclasses.replace(ROPE, scaling=RopeScaling(RopeType.ntk, factor=4.0))
    tree = export_config(config, "llama", 300, None)
    assert tree["rope_theta"] == pytest.approx(10000 * 4 ** (8 / 6))
    assert tree["rope_scaling"] is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mistral"}, "model_type=mistral"),
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_positions": 9}, r"make \[8, 16\], and config.json says \[9, 16\]"),
        ({"n_layer": 2}, "has no tensor transformer.h.1"),
        ({"n_layer": 0}, "n_layers=0"),
    ],
)
def test_what_flashtrain_cannot_run_is_refused_by_name(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    export_folder(saved(small(), tmp_path / "run"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=sentence):
        import_folder(tmp_path / "out", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_pickled_model_and_a_surplus_tensor_are_refused(tmp_path: Path) -> None:
    export_folder(saved(small(), tmp_path / "run"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.adapter.weight": torch.ones(2)}, file)
    with pytest.raises(FormatError, match="adapter"):
        import_folder(tmp_path / "out", tmp_path / "imported")
    file.rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(FormatError, match="safetensors only"):
        import_folder(tmp_path / "out", tmp_path / "imported")


def test_conversion_needs_no_library_of_hugging_face_but_safetensors() -> None:
    libraries = ("transformers", "huggingface_hub", "accelerate")
    assert not offenders("flashtrain/checkpoint", *libraries)
