"""The tokens a config names: made here where they can be, opened, and held against the config."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from flashtrain.config import (
    Config,
    ConfigError,
    MixSource,
    Packing,
    Source,
    TokenizerKind,
)
from flashtrain.data.dataset import Part, RandomTokens
from flashtrain.data.foreign import foreign_files
from flashtrain.data.loader import DataLoader, check_batch
from flashtrain.data.manifest import Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.mixture import Mix, phases
from flashtrain.data.packing import PackedDocuments, open_plan
from flashtrain.data.paths import folder_of, is_own, open_held_out, open_split
from flashtrain.data.prepare import prepare_shakespeare
from flashtrain.data.published import find_tokenizer
from flashtrain.data.ramp import Ramp
from flashtrain.data.remote import is_remote
from flashtrain.data.remote_source import admit_remote, check_room
from flashtrain.data.sampler import derived_seed
from flashtrain.data.samples import Blocks, Mixture, Samples, Shuffled
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer
from flashtrain.data.unchanged import Unchanged
from flashtrain.data.windows import SectionSamples, WindowShuffled
from flashtrain.layout import check_layout, check_sequence, data_ranks
from flashtrain.pipelining import check_micro_batches

VOCABULARY_STEP = 128  # a head whose width is a multiple of 128 fills the matrix units' tiles


@dataclass(frozen=True)
class Ids:
    """What token ids mean; None where nothing says it."""

    size: int | None
    end_of_text: int | None


def prepare_source(config: Config, world_size: int) -> Config:
    """The config with `data.path` and `model.vocabulary` known; makes the embedded text's shards.

    Called once, on one process. Raises ConfigError or DataError before anything else is touched.
    """
    data, model = config.data, config.model
    _check_ramp(config)
    if data.source is Source.random:
        return config
    if data.source is Source.shakespeare and data.path is None:
        size = f"-{data.tokenizer_vocabulary}" if data.tokenizer is TokenizerKind.bpe else ""
        data = dataclasses.replace(data, path=f"data/shakespeare-{data.tokenizer.name}{size}")
        assert data.path is not None
        prepare_shakespeare(data.path, data.tokenizer.name, data.tokenizer_vocabulary)
        config = dataclasses.replace(config, data=data)
    admit_remote(config, _sources(config).values())
    size_of_ids = read_ids(config).size
    if size_of_ids is None and model.vocabulary is None:
        raise ConfigError(
            f"nothing says what the ids of {_spoken(config)} are: name their tokenizer with "
            "data.tokenizer_path, or set model.vocabulary (then no samples are written)"
        )
    vocabulary = model.vocabulary
    if vocabulary is None:
        assert size_of_ids is not None
        vocabulary = -(-size_of_ids // VOCABULARY_STEP) * VOCABULARY_STEP
    if vocabulary < (size_of_ids or 0):
        raise ConfigError(
            f"model.vocabulary={vocabulary} is smaller than the {size_of_ids} tokens of "
            f"{_spoken(config)}: raise it to {size_of_ids} or more, or leave it null"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(model, vocabulary=vocabulary))
    _, validation = open_samples(config)
    if config.trainer.evaluate_sequences > validation.n_samples:
        raise ConfigError(
            f"trainer.evaluate_sequences={config.trainer.evaluate_sequences} is more than the "
            f"{validation.n_samples} held-out sequences of {data.sequence_length} tokens in "
            f"{_spoken(config)}: lower it or prepare more text"
        )
    check_room(config, _sources(config).values())
    check_layout(config, world_size)
    return config


def open_loader(config: Config, data_rank: int, data_size: int, device: torch.device) -> DataLoader:
    """The batches of one data-parallel rank, training and held-out, after `prepare_source`."""
    assert config.data.micro_batch_size is not None
    train, validation = open_samples(config)
    return DataLoader(
        train,
        batch_size=config.data.batch_size,
        micro_batch_size=config.data.micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        device=device,
        validation=validation,
        ramp=_ramp(config),
    )


def open_tokenizer(config: Config) -> Tokenizer | None:
    """What turns the ids of `config`'s data into text; None where nothing says what they mean."""
    if config.data.source is Source.random:
        return None
    if config.data.tokenizer_path is not None:
        return find_tokenizer(config.data.tokenizer_path)
    own = [
        folder_of(source.path, config.data)
        for source in _sources(config).values()
        if is_own(source)
    ]
    return load_tokenizer(own[0]) if own else None


def open_samples(config: Config) -> tuple[Samples, Samples]:
    """Training sequences in their endless order, and held-out ones; `model.vocabulary` is known.

    Where to pack documents best is worked out on the first call and kept in the run's folder.
    Held-out documents are not packed best, only kept apart: they are few.
    """
    data, vocabulary = config.data, config.model.vocabulary
    assert vocabulary is not None
    T = data.sequence_length
    if data.source is Source.random:
        made = [Blocks(RandomTokens(vocabulary, config.seed + i), T) for i in range(2)]
        return Shuffled(made[0], config.seed), made[1]
    ids = read_ids(config)
    limit = ids.size or vocabulary
    end = None
    if data.packing is not Packing.none:
        if ids.end_of_text is None:
            raise ConfigError(
                f"data.packing={data.packing.name} needs the id that ends a document: name the "
                f"tokenizer of {_spoken(config)} with data.tokenizer_path"
            )
        end = ids.end_of_text
    sources = _sources(config)
    train: dict[str, Samples] = {}
    held_out: dict[str, Samples] = {}
    for name, source in sources.items():
        tokens = open_split(source, "train", limit, data)
        if data.validation_tokens is not None:
            kept = tokens.tokens - data.validation_tokens
            held_out[name] = Blocks(Part(tokens, kept, tokens.tokens), T, end)
            tokens = Part(tokens, 0, kept)
        elif data.validation_path is None:
            held_out[name] = Blocks(open_split(source, "validation", limit, data), T, end)
        # by its name, so that adding a source leaves the order of the others as it was
        seed = derived_seed(config.seed, name) if data.sources else config.seed
        sections = None if data.shuffle_shards is None else tokens.sections
        blocks: SectionSamples = Blocks(tokens, T, end, sections)
        if data.packing is Packing.best_fit:
            assert end is not None and config.run_dir is not None
            plan = open_plan(tokens, T, end, Path(config.run_dir) / "packing", sections)
            blocks = PackedDocuments(tokens, T, end, plan)
        train[name] = (
            Shuffled(blocks, seed)
            if data.shuffle_shards is None
            else WindowShuffled(blocks, tokens, seed, data.shuffle_shards)
        )
    if data.validation_path is not None:
        return _mixed(config, train), Blocks(open_held_out(data, limit), T, end)
    return _mixed(config, train), _mixed(config, held_out, endless=False)


def read_ids(config: Config) -> Ids:
    """Of the tokenizer that all sources share; DataError where they do not, or where the data to
    evaluate on have another one."""
    sizes: dict[str, Ids] = {}  # by fingerprint
    told: dict[str, str] = {}
    if config.data.tokenizer_path is not None:
        tokenizer = find_tokenizer(config.data.tokenizer_path)
        sizes[tokenizer.fingerprint] = Ids(tokenizer.size, tokenizer.end_of_text)
        told[tokenizer.fingerprint] = f"data.tokenizer_path={config.data.tokenizer_path}"
    for source in _sources(config).values():
        if is_own(source):
            manifest = Manifest.load(folder_of(source.path, config.data))
            sizes[manifest.tokenizer] = Ids(manifest.vocabulary, manifest.end_of_text)
            told.setdefault(manifest.tokenizer, source.path)
    if told and config.data.validation_path is not None:
        held_out = MixSource(config.data.validation_path)
        if is_own(held_out):
            tokenizer_of_it = Manifest.load(folder_of(held_out.path, config.data)).tokenizer
            told.setdefault(tokenizer_of_it, f"data.validation_path={held_out.path}")
    if len(told) > 1:
        one, other, *_ = told.values()
        raise DataError(
            f"{one} and {other} have different tokenizers, so an id means different text: prepare "
            "one of them again with the tokenizer of the other"
        )
    return next(iter(sizes.values()), Ids(None, None))


def sources_now(config: Config) -> Unchanged:
    """What the run is to read, for comparison with what it finds later."""
    data, found = config.data, Unchanged()
    named = [] if data.source is Source.random else list(_sources(config).values())
    if data.validation_path is not None:
        named.append(MixSource(data.validation_path))
    for source in named:
        if is_own(source):
            folder = folder_of(source.path, data)
            local = None if is_remote(source.path) else folder
            found.add(source.path, Manifest.load(folder), local)
        else:
            found.add_foreign(source.path, foreign_files(source.path))
    return found


def _mixed(config: Config, parts: dict[str, Samples], endless: bool = True) -> Samples:
    data = config.data
    if not data.sources:
        return next(iter(parts.values()))
    first = {name: source.weight for name, source in data.sources.items()}
    changes = [(change.at_tokens, change.weights) for change in data.mix_changes if endless]
    mix = Mix(phases(list(parts), first, changes, data.sequence_length))
    return Mixture(parts, mix, endless=endless)


def _sources(config: Config) -> dict[str, MixSource]:
    data = config.data
    if data.sources:
        return data.sources
    assert data.path is not None
    return {"": MixSource(data.path, 1.0, data.format)}


def _ramp(config: Config) -> Ramp:
    data = config.data
    early = [(stage.until_tokens, stage.batch_size, stage.sequence_length) for stage in data.ramp]
    return Ramp(data.batch_size, data.sequence_length, early)


def _check_ramp(config: Config) -> None:
    """Refuse stages that the layout does not divide, before workers start."""
    parallel, micro_batch = config.parallel, config.data.micro_batch_size
    tensor = parallel.tensor
    assert tensor is not None and micro_batch is not None
    for stage in _ramp(config).stages:
        check_batch(stage.batch_size, micro_batch, data_ranks(parallel))
        if parallel.pipeline > 1:
            check_micro_batches(stage.batch_size, micro_batch, parallel, "data.ramp: batch_size")
        if stage.length % tensor:
            raise ConfigError(
                f"sequences of {stage.length} tokens in data.ramp do not divide over "
                f"parallel.tensor={tensor}"
            )
        check_sequence(stage.length, parallel, "data.ramp: sequence_length")


def _spoken(config: Config) -> str:
    return ", ".join(source.path for source in _sources(config).values())
