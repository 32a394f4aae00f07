"""Ranks of one start find each other in a store that remembers earlier ones."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from flashtrain.meeting import ANSWERED, CALLS, meet

LIMIT = timedelta(seconds=20)


def start(store: Store, world_size: int) -> list[str]:
    """What each rank reads where rank 0 wrote the number of its start."""
    said: list[str] = [""] * world_size

    def rank(number: int) -> None:
        part = meet(store, number, world_size, LIMIT)
        if number == 0:
            part.set("word", f"start {store.add('starts', 1)}")
        said[number] = part.get("word").decode()

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(world_size)]
    for thread in reversed(threads):  # rank 0 comes last
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_each_start_has_a_part_of_its_own() -> None:
    store = HashStore()
    assert start(store, 3) == ["start 1"] * 3
    assert start(store, 3) == ["start 2"] * 3
    assert start(store, 5) == ["start 3"] * 5  # more nodes have joined
    assert start(store, 1) == ["start 4"]


def test_calls_of_ranks_that_died_hold_nobody_up() -> None:
    store = HashStore()
    store.add(CALLS, 1)  # died before it could say its name
    store.set(f"{CALLS}/{store.add(CALLS, 1)}", "dead")  # died before it was answered
    assert start(store, 3) == ["start 1"] * 3
    assert int(store.get(ANSWERED)) == 4


def test_ranks_that_do_not_come_are_counted() -> None:
    with pytest.raises(TimeoutError, match="1 of 2 ranks"):
        meet(HashStore(), 0, 2, timedelta(seconds=0.1))
