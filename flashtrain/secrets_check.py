"""No secret in a configuration: it goes into logs, run folders, checkpoints and W&B.

Keys belong into the environment or ~/.netrc, which nothing here writes down.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from flashtrain.config import ConfigError
from flashtrain.tracking.wandb import redact

LEAST = 12  # characters; a shorter value stands in other texts by chance


def refuse_secrets(tree: dict[str, Any], environment: Mapping[str, str]) -> None:
    """ConfigError where a key of `tree` names a secret, or a value holds one of `environment`.

    The sentence says where, never what.
    """
    secrets = {
        name: value
        for name, value in environment.items()
        if len(value) >= LEAST and redact({name: value}) != {name: value}
    }
    for key, value in _texts(tree):
        if value and redact({key.rpartition(".")[2]: value}) != {key.rpartition(".")[2]: value}:
            raise ConfigError(
                f"{key} names a secret, and configurations are written to logs and checkpoints: "
                "leave it out and set it in the environment"
            )
        for name, secret in secrets.items():
            if secret in value:
                raise ConfigError(
                    f"{key} holds the value of the environment's {name}, and configurations are "
                    "written to logs and checkpoints: leave it out"
                )


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of every text in `tree`, and of every key of a mapping."""
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for item in tree:
            yield from _texts(item, key)
    elif isinstance(tree, str):
        yield key, tree
