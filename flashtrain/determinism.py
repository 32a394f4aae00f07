"""Every so many steps, forward and backward twice: a GPU that miscalculates gives two answers.

Silent data corruption is rare and kills no process (6 of 466 interruptions of Llama 3's 54 days,
Grattafiori et al. 2024, table 5), so nothing else here would see it. The loss is that of a rank's
own tokens, which tells ranks apart, but for tensor ranks. Gradients come out of backward summed
over the ranks that share a weight: an error in one rank's backward is seen, and on all of them.
"""

import logging

import torch
from torch import Tensor

from flashtrain.checkpoint import Peers, rng_state, set_rng_state
from flashtrain.config import ConfigError
from flashtrain.data.loader import Batch
from flashtrain.engine.base import Engine
from flashtrain.engine.native import NativeEngine
from flashtrain.trainer import Trains

log = logging.getLogger("flashtrain.determinism")


def checked(engine: Engine, every: int | None, peers: Peers) -> Trains:
    """The engine that the trainer drives: itself, or one that checks it every `every` steps."""
    if every is None:
        return engine
    if not isinstance(engine, NativeEngine):
        raise ConfigError(
            f"trainer.check_determinism={every} needs engine=native and parallel.pipeline=1: only "
            "there can a step be repeated"
        )
    return Twice(engine, every, peers)


class Twice:
    """A native engine's forward and backward, done again every `every` calls and compared."""

    def __init__(self, engine: NativeEngine, every: int, peers: Peers) -> None:
        self.engine, self.every, self.peers = engine, every, peers
        self.calls = 0
        self.step = engine.step

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """As the engine's. Logs on rank 0 which ranks calculated something else at first."""
        self.calls += 1
        if self.calls % self.every:
            return self.engine.forward_backward(batches)
        rng = rng_state()
        self.engine.forward_backward(batches)
        first = self._answer()
        self._forget()
        set_rng_state(rng)
        loss = self.engine.forward_backward(batches)
        self._compare(first, self._answer())
        return loss

    def _forget(self) -> None:
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.engine.model.zero_grad(set_to_none=True)

    def _answer(self) -> list[str]:
        """The loss of this rank's tokens and its gradients, as text that tells every bit."""
        gradients = [p.grad for p in self.engine.parameters.values() if p.grad is not None]
        bits = sum(
            (g.detach().contiguous().view(torch.int32).long().sum() for g in gradients),
            torch.zeros((), dtype=torch.int64, device=self.engine.device),
        )
        return [float(self.engine.own_loss).hex(), hex(int(bits))]

    def _compare(self, first: list[str], second: list[str]) -> None:
        answers = self.peers.gather([a != b for a, b in zip(first, second, strict=True)])
        for index, what in enumerate(("loss", "gradient")):
            ranks = [rank for rank, differs in enumerate(answers or []) if differs[index]]
            if ranks:
                log.warning(
                    "the %s of ranks %s is not the same when a step is repeated: on a GPU that is "
                    "sound this needs a kernel that is not deterministic; else look for %s",
                    what,
                    ",".join(map(str, ranks)),
                    "Xid and ECC errors in the log of that machine"
                    if len(ranks) == 1
                    else "Xid and ECC errors in the logs of all of them: ranks that work on the "
                    "same tokens or sum their gradients share one rank's error",
                )
