"""Signs of life between nodes. One that loses power or network closes no connection: without this
the others would wait for it in a collective until `trainer.hang_timeout`, and a spare with them.

The first process of every node counts up in the store of the start, twice a second. Rank 0 looks at
all of them and names those that have fallen silent; the others look for such names, and take a
store that does not answer for the loss of rank 0's node. That alone ends nothing: the watch
(watch.py) asks only when training has stood still for as long. A living process is not silent: even
while Triton compiles, no thread of it waits for Python's lock for more than 0.15 s (measured).
"""

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_S = 0.5
LEFT = "left"  # what a node says at its orderly end
LOST = "pulse/lost"


class Pulse:
    """Use it in a `with` block around training; `lost` is what its watch needs to know."""

    def __init__(self, store: Store, rank: int, node: int, n_nodes: int, limit: float) -> None:
        """node: of `n_nodes`, that this process speaks for. limit: s of silence."""
        self.rank, self.node, self.limit = rank, node, limit
        self.lost: str | None = None  # one sentence
        # a connection of its own: on one that is shared, training would wait for our calls
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=limit))
        self._beats = 0
        self._answered = time.monotonic()  # the store did
        self._unknown = list(range(n_nodes)) if rank == 0 else []  # that have not begun
        self._heard: dict[int, tuple[str, float]] = {}  # by node: its latest word, since when
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    @classmethod
    def of_this_process(cls, store: Store | None, rank: int, limit: float) -> Self | None:
        """None where it speaks for no node, or where there is but one."""
        n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # torchrun's
        if store is None or n_nodes == 1 or os.environ.get("LOCAL_RANK") != "0":
            return None
        return cls(store, rank, int(os.environ["GROUP_RANK"]), n_nodes, limit)

    def beat(self, now: float) -> None:
        """Say that this node lives and hear of the others. RuntimeError: the store is silent."""
        self._beats += 1
        self._store.set(_key(self.node), f"{self._beats} {socket.gethostname()}")
        silent = self._silent(now) if self.rank == 0 else []
        if silent:
            names = ", ".join(silent)
            self._store.set(LOST, f"nothing is heard of {names} (trainer.node_timeout)")
        if self._store.check([LOST]):
            self.lost = self._store.get(LOST).decode()
        self._answered = now

    def _silent(self, now: float) -> list[str]:
        """Names of nodes that have said nothing new within the limit."""
        for node in [node for node in self._unknown if self._store.check([_key(node)])]:
            self._unknown.remove(node)
            self._heard[node] = ("", now)
        words = self._store.multi_get([_key(node) for node in self._heard])
        if now - self._answered > self.limit / 2:  # this one was held up, so it can judge nobody
            self._heard = {node: (word, now) for node, (word, _) in self._heard.items()}
        names = []
        for node, word in zip(list(self._heard), map(bytes.decode, words), strict=True):
            before, since = self._heard[node]
            if word != before:
                self._heard[node] = (word, now)
            elif word != LEFT and now - since > self.limit:
                names.append(f"node {node} ({word.partition(' ')[2]})")
        return names

    def _run(self) -> None:
        while self.lost is None and not self._done.wait(BEAT_S):
            now = time.monotonic()
            try:
                self.beat(now)
            except RuntimeError:
                if time.monotonic() - self._answered > self.limit:
                    self.lost = "nothing is heard of rank 0's node (trainer.node_timeout)"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if error is None:
            self._thread.join(BEAT_S)
            with contextlib.suppress(RuntimeError):  # rank 0's process may have ended before
                self._store.set(_key(self.node), LEFT)


def _key(node: int) -> str:
    return f"pulse/{node}"
