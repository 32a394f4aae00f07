"""How the ranks of one start find each other in a store that may remember earlier starts.

torchrun keeps one store over all restarts (pytorch issues 135712, 143574), and what dead ranks left
in it, such as their addresses, would be taken for the living ones'. A count of restarts does not
tell starts apart either: nodes that join later count from zero. So every rank calls out with a
number drawn at random, rank 0 answers each call with a word drawn at random too, and all that
belongs to this start goes under that word.
"""

import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

CALLS, ANSWERED = "flashtrain/calls", "flashtrain/answered"
POLL_S = 0.01


def meet(store: Store, rank: int, world_size: int, limit: timedelta) -> Store:
    """A part of `store` that only the ranks of this start know. Every rank calls it.

    Raises TimeoutError on rank 0 when not all others came within `limit`; the others wait for rank
    0 as long as the store lets them.
    """
    if rank != 0:
        mine = secrets.token_hex(8)
        number = store.add(CALLS, 1)
        store.set(f"{CALLS}/{number}", mine)
        word = store.get(f"{CALLS}/{mine}/answer").decode()
        part = PrefixStore(f"flashtrain/{word}", store)
        part.add("present", 1)
        return part
    word = secrets.token_hex(8)
    part = PrefixStore(f"flashtrain/{word}", store)
    _answer(store, word, part, world_size, time.monotonic() + limit.total_seconds())
    return part


def _answer(store: Store, word: str, part: Store, world_size: int, deadline: float) -> None:
    """Answer every call, those of dead ranks too, until all others have taken the word."""
    # no call up to here can be of this start: its rank 0 had heard from all of its ranks
    heard = int(store.get(ANSWERED)) if store.check([ANSWERED]) else 0
    unread: list[int] = []  # a rank that died between its two calls leaves one for ever
    while part.add("present", 0) < world_size - 1:
        calls = store.add(CALLS, 0)
        unread += range(heard + 1, calls + 1)
        heard = calls
        for number in list(unread):
            if store.check([f"{CALLS}/{number}"]):
                name = store.get(f"{CALLS}/{number}").decode()
                store.set(f"{CALLS}/{name}/answer", word)
                unread.remove(number)
        if time.monotonic() > deadline:
            there = part.add("present", 0) + 1
            raise TimeoutError(f"{there} of {world_size} ranks came to the start of this run")
        time.sleep(POLL_S)
    store.set(ANSWERED, str(heard))
