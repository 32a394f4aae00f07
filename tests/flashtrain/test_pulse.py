"""Who is said to be lost: a node that falls silent, not one that ends or comes late."""

from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from flashtrain.pulse import Pulse

LIMIT = 5.0


@pytest.fixture
def store() -> Store:
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    return PrefixStore("start", server)


def nodes(store: Store, n: int) -> list[Pulse]:
    return [Pulse(store, 8 * node, node, n, LIMIT) for node in range(n)]


def beat(pulses: list[Pulse], first: int, end: int) -> None:
    for second in range(first, end):
        for pulse in pulses:
            pulse.beat(float(second))


def test_nodes_that_live_and_one_that_comes_late_are_not_lost(store: Store) -> None:
    hub, one, late = nodes(store, 3)
    beat([hub, one], 0, 20)
    beat([hub, one, late], 20, 40)
    assert hub.lost is one.lost is late.lost is None


def test_a_silent_node_is_named_to_all_others(store: Store) -> None:
    hub, one, two = nodes(store, 3)
    beat([hub, one, two], 0, 3)
    beat([hub, one], 3, 9)
    assert hub.lost is one.lost is None
    beat([hub, one], 9, 10)
    assert hub.lost is not None and hub.lost.startswith("nothing is heard of node 2 (")
    assert one.lost == hub.lost


def test_a_hub_that_was_held_up_itself_judges_nobody(store: Store) -> None:
    hub, one = nodes(store, 2)
    beat([hub, one], 0, 3)
    beat([hub], 100, 104)
    assert hub.lost is None
    beat([hub, one], 104, 120)
    assert hub.lost is None


def test_a_node_that_has_ended_is_not_lost(store: Store) -> None:
    hub, one = nodes(store, 2)
    with one:
        beat([hub, one], 0, 3)
    beat([hub], 3, 30)
    assert hub.lost is None


def test_a_store_that_does_not_answer_is_the_loss_of_rank_0s_node(store: Store) -> None:
    class Gone:
        def clone(self) -> "Gone":
            return self

        def set_timeout(self, limit: timedelta) -> None: ...

        def set(self, key: str, value: object) -> None:
            raise RuntimeError("Connection reset by peer")

    pulse = Pulse(Gone(), 8, 1, 2, 0.1)  # type: ignore[arg-type]
    pulse._run()  # ends by itself
    assert pulse.lost == "nothing is heard of rank 0's node (trainer.node_timeout)"


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "LOCAL_RANK": "0"}, True),
        ({"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "LOCAL_RANK": "0"}, False),
        ({}, False),
    ],
)
def test_the_first_process_of_one_of_several_nodes_speaks(
    store: Store, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], speaks: bool
) -> None:
    for name in ("GROUP_WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (Pulse.of_this_process(store, 0, LIMIT) is not None) is speaks
    assert Pulse.of_this_process(None, 0, LIMIT) is None
