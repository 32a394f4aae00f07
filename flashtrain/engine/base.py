"""What the trainer asks of an engine, and nothing more."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from flashtrain.data.loader import Batch
from flashtrain.model.gpt import GPT


class Engine(Protocol):
    """A model with its optimizer, spread over a mesh."""

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

    def next_token_logits(self, tokens: Tensor, position: int) -> Tensor:
        """Logits [V] after `tokens[0, position]`, whole on every rank. tokens: [1, T] int64."""
        ...

    def state(self) -> tuple[GPT, Optimizer]:
        """What a checkpoint holds: parameters (perhaps shards) and the optimizer over them."""
        ...
