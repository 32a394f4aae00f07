"""What the trainer asks of an engine, and nothing more."""

from collections.abc import Collection, Iterable
from typing import Protocol

from torch import Tensor

from flashtrain.checkpoint import State
from flashtrain.data.loader import Batch
from flashtrain.engine.decoder import Decoder


class Engine(Protocol):
    """A model with its optimizer, spread over a mesh."""

    skips_bad_steps: bool  # a gradient that is not finite leaves weights and optimizer as they are

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """Gradients of one global batch, of which `batches` are this rank's micro-batches.

        Returns the mean loss per valid token of the global batch: a 0-dim fp32 tensor on the
        device, equal on every rank.
        """
        ...

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, forget the gradients. Returns the norm before clipping."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Mean loss per valid token over every data rank's `batches`; no gradients."""
        ...

    def decoder(self) -> Decoder:
        """The model as it is now, asked for its next token. Every rank calls it alike."""
        ...

    def state(self, saved: Collection[str] = ()) -> State:
        """Views of weights and optimizer state under their logical names, for a checkpoint.

        saved: names of a checkpoint about to be loaded; optimizer state that it has and a fresh
        optimizer lacks is made. Whoever writes to the views calls `loaded` afterwards.
        """
        ...

    def loaded(self) -> None:
        """Take over what was written to the views of `state`. Collective."""
        ...

    def close(self) -> None:
        """Give back what must go before the process groups do. The last call of all."""
        ...
