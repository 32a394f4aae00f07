"""A resolved config small enough to follow."""

from flashtrain.compose import resolve_model
from flashtrain.config import Config, DataConfig, ModelConfig, Source, TrainerConfig, WandbMode


def small_config() -> Config:
    config = Config(
        name="tiny",
        model=resolve_model(ModelConfig(n_layers=2, n_heads=4, d_model=64, vocabulary=256)),
        data=DataConfig(source=Source.random, batch_size=8, micro_batch_size=2, sequence_length=32),
        trainer=TrainerConfig(steps=100),
    )
    config.tracking.wandb.mode = WandbMode.disabled
    return config
