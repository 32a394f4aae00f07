"""Tiles and schedules of the Hopper kernels, per head size and mask."""

from dataclasses import dataclass

from kernels.attention.hopper.schedule import SNAKE, STRIDE, TICKET

STRIDED, SNAKED, DRAWN = STRIDE.value, SNAKE.value, TICKET.value
MIB = 1 << 20


@dataclass(frozen=True)
class ForwardTile:
    """How the forward kernel works through its tiles."""

    consumers: int  # warpgroups of 64 query rows
    keys: int  # of a key tile
    stages: int  # key and value tiles in flight
    registers: int  # per consumer thread; 65,536 in all, the loading warp keeps 24
    schedule: int
    together: int  # bytes of K and V that the tiles standing together may span; 0: one head
    persistent: bool = True  # else one program per tile


@dataclass(frozen=True)
class BackwardTile:
    """How the backward kernel works through its tiles of 128 keys."""

    queries: int  # of a query tile: 64 or 128
    stages: int  # query tiles in flight
    early: bool  # issue dP beside S, not after the softmax
    schedule: int
    together: int  # bytes of Q, dO and dQ that the tiles standing together may span; 0: one head
    persistent: bool = True


# (head size, causal)
FORWARD = {
    (64, False): ForwardTile(3, 128, 3, 160, STRIDED, 0),
    (64, True): ForwardTile(3, 128, 3, 160, DRAWN, 32 * MIB),
    (128, False): ForwardTile(2, 128, 2, 240, STRIDED, 0),
    (128, True): ForwardTile(2, 128, 2, 240, DRAWN, 32 * MIB),
}
BACKWARD = {
    (64, False): BackwardTile(128, 2, True, STRIDED, 16 * MIB),
    (64, True): BackwardTile(128, 2, False, DRAWN, 16 * MIB),
    (128, False): BackwardTile(64, 2, False, STRIDED, 16 * MIB),
    (128, True): BackwardTile(64, 2, False, DRAWN, 16 * MIB),
}
