"""Hugging Face model folders in and out: safetensors, config.json, tokenizer.json; no pickle.

Importing makes a run folder with a checkpoint of step 0, which any layout loads. It holds the model
in fp32 in host memory once. Exporting reads a checkpoint of any layout tensor by tensor and holds
one file of at most FILE_BYTES.

Vocabularies. Rows are padded to a multiple of 128 on import, so that tensor ranks divide them, each
with the mean of the rows there are: by Jensen's inequality, exp(mean logit) <= mean of exp(logit),
such a token never gets more than its share 1/V of the probability, whatever the hidden state (rows
of zeros would, in GPT-2, whose logits lie around -100). Exporting trims to the tokenizer's size.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashtrain.checkpoint.huggingface_config import (
    FormatError,
    Tree,
    export_config,
    format_of,
    import_config,
)
from flashtrain.checkpoint.huggingface_names import BUFFERS, foreign_names, their_rows
from flashtrain.checkpoint.integrity import read_manifest
from flashtrain.checkpoint.state import State
from flashtrain.checkpoint.store import read_meta, save
from flashtrain.checkpoint.tensors import Reader, local_tensor, write_tensors
from flashtrain.compose import from_dict
from flashtrain.config import Config, to_dict
from flashtrain.data.shards import DataError
from flashtrain.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from flashtrain.model.dtypes import DTYPES
from flashtrain.model.gpt import GPT
from flashtrain.model.shard import whole

FILE_BYTES = 5 * 2**30
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def import_folder(source: Path, run: Path) -> Path:
    """Make the run folder `run` from a Hugging Face folder; returns its checkpoint.

    Raises FormatError or DataError for what cannot be imported, before anything is written.
    """
    if run.exists():
        raise FormatError(f"{run} is there already: name a folder that is not")
    tree = _read_json(source / "config.json")
    config = import_config(tree, str(run))
    tokenizer = None
    if (source / TOKENIZER_FILE).is_file():
        tokenizer = load_tokenizer(source)
        if tokenizer.size > tree["vocab_size"]:
            raise DataError(
                f"{source / TOKENIZER_FILE} has ids up to {tokenizer.size - 1} and config.json "
                f"vocab_size={tree['vocab_size']}"
            )
    tensors = {
        f"model/{name}": local_tensor(tensor, whole(tensor.shape))
        for name, tensor in _their_weights(source, tree, config)
    }
    meta = {"config": to_dict(config), "imported_from": source.name}
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    if tokenizer is not None:
        tokenizer.save(run / TOKENIZER_FILE)
    return save(run / "checkpoints", 0, State(tensors, {}), meta)


def parameter_shapes(config: Config) -> dict[str, torch.Size]:
    """Every parameter of the whole model, by name."""
    with torch.device("meta"):
        model = GPT(config.model, config.position, config.data.sequence_length)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _their_weights(source: Path, tree: Tree, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, fp32, from the files of `source`."""
    kind = tree["model_type"]
    files = _Files(source, "transformer." if kind == "gpt2" else "model.")
    table = foreign_names(kind, config.model)
    known = {name for foreign in table.values() for name in foreign.names} | {"lm_head.weight"}
    surplus = [name for name in files.names if name not in known and not name.endswith(BUFFERS)]
    if surplus:
        raise FormatError(f"{source}: {surplus[0]} is not part of a {kind} model as flashtrain's")
    optional = [".self_attn."] * (not tree.get("attention_bias"))
    optional += [".mlp."] * (not tree.get("mlp_bias"))
    for name, shape in parameter_shapes(config).items():
        foreign = table[name]
        theirs = foreign.names[0]
        if kind == "llama" and name.endswith("bias") and any(x in theirs for x in optional):
            yield name, torch.zeros(shape)
            continue
        parts = [files.read(theirs) for theirs in foreign.names]
        tensor = torch.cat([part.t() if foreign.transposed else part for part in parts])
        if name in ("embedding.weight", "head.weight"):
            missing = shape[0] - tensor.shape[0]
            mean = tensor.double().mean(0, keepdim=True).float()
            tensor = torch.cat([tensor, mean.expand(max(0, missing), -1)])
        if tensor.shape != shape:
            raise FormatError(
                f"{source}: {', '.join(foreign.names)} make {list(tensor.shape)}, and config.json "
                f"says {list(shape)}"
            )
        yield name, tensor.contiguous()


class _Files:
    """Tensors by name over the files of a folder, each mapped once."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """prefix: what the names of some files lack."""
        self.folder, self.open_files = folder, dict[str, Any]()
        if (folder / INDEX).is_file():
            places: dict[str, str] = _read_json(folder / INDEX)["weight_map"]
        elif (folder / WEIGHTS).is_file():
            places = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        else:
            raise FormatError(
                f"{folder} has no {WEIGHTS} and no {INDEX}: flashtrain reads safetensors only, "
                "because loading a pytorch_model.bin runs what it says"
            )
        self.names = {
            name if name.startswith((prefix, "lm_head.")) else prefix + name: (file, name)
            for name, file in places.items()
        }

    def read(self, name: str) -> Tensor:
        """fp32, on the CPU."""
        if name not in self.names:
            raise FormatError(f"{self.folder} has no tensor {name}")
        file, key = self.names[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{self.folder / file}: cannot read {key}: {error}") from error
        return tensor.float()

    def _open(self, file: str) -> Any:
        if Path(file).name != file:
            raise FormatError(f"{self.folder / INDEX}: {file} is not a file beside it")
        if file not in self.open_files:
            try:
                self.open_files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{self.folder / file} cannot be read: {error}") from error
        return self.open_files[file]


def export_folder(
    path: Path, target: Path, kind: str | None = None, dtype: torch.dtype | None = None
) -> Tree:
    """Write the weights of a checkpoint as a Hugging Face folder; returns its config.json.

    Args:
        path: a checkpoint; the tokenizer is taken from its run folder where there is one.
        target: a folder that does not exist yet; it appears when it is complete.
        kind: "gpt2" or "llama"; null: the one that the model's positions need.
        dtype: of the weights; null: what the run computes with.

    Raises FormatError for a model that the format cannot hold.
    """
    if target.exists():
        raise FormatError(f"{target} is there already: name a folder that is not")
    config = from_dict(read_meta(path)["config"])
    kind, dtype = kind or format_of(config), dtype or DTYPES[config.precision.compute]
    file = path.parent.parent / TOKENIZER_FILE
    tokenizer = load_tokenizer(file) if file.is_file() else None
    assert config.model.vocabulary is not None
    rows = config.model.vocabulary if tokenizer is None else tokenizer.size
    end = None if tokenizer is None else tokenizer.end_of_text
    tree = export_config(config, kind, rows, end)
    tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_weights(temporary, path, config, kind, rows, dtype)
    _write_json(temporary / "config.json", tree)
    ends = {key: tree[key] for key in ("bos_token_id", "eos_token_id") if tree[key] is not None}
    _write_json(temporary / "generation_config.json", ends)
    if tokenizer is not None:
        _write_tokenizer(temporary, tokenizer, config.data.sequence_length)
    os.rename(temporary, target)
    return tree


def _write_weights(
    folder: Path, path: Path, config: Config, kind: str, vocabulary: int, dtype: torch.dtype
) -> None:
    """Files of at most FILE_BYTES (a larger tensor has its own), and an index if several."""
    record, reader = read_manifest(path).tensors, Reader(path)
    shapes, table = parameter_shapes(config), foreign_names(kind, config.model)
    files: list[list[str]] = [[]]  # our names
    size = 0
    for name in table:
        taken = shapes[name].numel() * dtype.itemsize if name in shapes else 0
        if files[-1] and size + taken > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += taken
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        entries: list[tuple[str, Tensor]] = []
        for name in names:
            foreign = table[name]
            if name in shapes:
                tensor = torch.empty(shapes[name])
                reader.copy_into(local_tensor(tensor, whole(tensor.shape)), record[f"model/{name}"])
            else:  # GPT-2 has biases everywhere
                tensor = torch.zeros(shapes[name.removesuffix("bias") + "weight"][0])
            if name in ("embedding.weight", "head.weight"):
                tensor = tensor[:vocabulary]
            parts = [tensor]
            if len(foreign.names) > 1:
                parts = list(tensor.split(their_rows(name, tensor.shape[0], config.model)))
            for theirs, part in zip(foreign.names, parts, strict=True):
                turned = part.t() if foreign.transposed else part
                entries.append((theirs, turned.to(dtype).contiguous()))
        write_tensors(folder / file, entries)
        places |= {theirs: file for theirs, _ in entries}
        total += sum(tensor.numel() * tensor.element_size() for _, tensor in entries)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / INDEX, index)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    if isinstance(tokenizer, ByteTokenizer):
        _write_json(folder / TOKENIZER_FILE, _byte_tokenizer())
    else:
        tokenizer.save(folder / TOKENIZER_FILE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.decode([tokenizer.end_of_text]),
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _byte_tokenizer() -> Tree:
    """Bytes as ids, said as byte-level BPE without merges. Its letters for bytes are GPT-2's: the
    printable ones stand for themselves, the others for the letters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + n) for n in range(256))
    letters = {chr(b) if b in printable else next(others): b for b in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": 256, "content": END_OF_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [end | flags],
        "pre_tokenizer": level | {"use_regex": False},
        "decoder": level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": letters | {END_OF_TEXT: 256}, "merges": []},
    }


def _read_json(path: Path) -> Tree:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise FormatError(f"{path} is not a JSON object")
    return tree


def _write_json(path: Path, tree: Tree) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
