"""The tokens a config names: made here where they can be, opened, and held against the config."""

import dataclasses

import torch

from flashtrain.compose import check_layout
from flashtrain.config import Config, ConfigError, Source, TokenizerKind
from flashtrain.data.loader import DataLoader, count_samples
from flashtrain.data.prepare import prepare_shakespeare
from flashtrain.data.shards import RandomTokens, TokenShards

VOCABULARY_STEP = 128  # a head whose width is a multiple of 128 fills the matrix units' tiles


def prepare_source(config: Config, world_size: int) -> Config:
    """The config with `data.path` and `model.vocabulary` known; makes the embedded text's shards.

    Called once, on one process. Raises ConfigError or DataError before anything else is touched.
    """
    data, model = config.data, config.model
    if data.source is Source.random:
        return config
    if data.source is Source.shakespeare and data.path is None:
        size = f"-{data.tokenizer_vocabulary}" if data.tokenizer is TokenizerKind.bpe else ""
        data = dataclasses.replace(data, path=f"data/shakespeare-{data.tokenizer.name}{size}")
        assert data.path is not None
        prepare_shakespeare(data.path, data.tokenizer.name, data.tokenizer_vocabulary)
    assert data.path is not None
    shards = TokenShards(data.path, "train")
    count_samples(shards, data.sequence_length)
    held_out = count_samples(TokenShards(data.path, "validation"), data.sequence_length)
    if config.trainer.evaluate_sequences > held_out:
        raise ConfigError(
            f"trainer.evaluate_sequences={config.trainer.evaluate_sequences} is more than the "
            f"{held_out} held-out sequences of {data.sequence_length} tokens in {data.path}: "
            "lower it or prepare more text"
        )
    vocabulary = model.vocabulary or -(-shards.vocabulary // VOCABULARY_STEP) * VOCABULARY_STEP
    if vocabulary < shards.vocabulary:
        raise ConfigError(
            f"model.vocabulary={vocabulary} is smaller than the {shards.vocabulary} tokens of "
            f"{data.path}: raise it to {shards.vocabulary} or more, or leave it null"
        )
    model = dataclasses.replace(model, vocabulary=vocabulary)
    config = dataclasses.replace(config, model=model, data=data)
    check_layout(config, world_size)
    return config


def open_loader(config: Config, data_rank: int, data_size: int, device: torch.device) -> DataLoader:
    """The batches of one data-parallel rank, training and held-out, after `prepare_source`."""
    assert config.data.micro_batch_size is not None
    return DataLoader(
        _open(config, "train"),
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        micro_batch_size=config.data.micro_batch_size,
        seed=config.seed,
        data_rank=data_rank,
        data_size=data_size,
        device=device,
        validation=_open(config, "validation"),
    )


def _open(config: Config, split: str) -> TokenShards | RandomTokens:
    if config.data.source is Source.random:
        assert config.model.vocabulary is not None
        return RandomTokens(config.model.vocabulary, config.seed + (split != "train"))
    assert config.data.path is not None
    return TokenShards(config.data.path, split)
