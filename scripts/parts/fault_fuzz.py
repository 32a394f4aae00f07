"""Damages copies of checkpoints at random and asks which would be resumed: for bench_faults.py.

No processes: the functions that a start calls, on a shelf of three small checkpoints. What was
damaged must be named and set aside and the newest sound one taken. Damage that leaves every byte as
it was (a file swapped with its equal) is harmless, which is proved by comparing the bytes.
"""

import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashtrain import checkpoint

STEPS = (1, 2, 3)


@dataclass
class Outcome:
    detected: Counter[str] = field(default_factory=Counter)  # by kind of damage
    harmless: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)  # a damaged one taken, or a sound one not

    @property
    def rounds(self) -> int:
        return self.detected.total() + self.harmless.total() + len(self.missed)


def flip(path: Path, others: list[Path], dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut(path: Path, others: list[Path], dice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def lengthen(path: Path, others: list[Path], dice: random.Random) -> None:
    with path.open("ab") as file:
        file.write(dice.randbytes(dice.randrange(1, 64)))


def zero(path: Path, others: list[Path], dice: random.Random) -> None:
    """A block that was never written, as a crashed file system leaves it."""
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content))
    length = min(len(content) - start, dice.randrange(1, 4096))
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def delete(path: Path, others: list[Path], dice: random.Random) -> None:
    path.unlink()


def swap(path: Path, others: list[Path], dice: random.Random) -> None:
    """With any other file of this checkpoint, or the same of another."""
    other = dice.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def stale(path: Path, others: list[Path], dice: random.Random) -> None:
    """The file of an older checkpoint in the place of the newer one."""
    shutil.copyfile(dice.choice([other for other in others if other.name == path.name]), path)


KINDS: dict[str, Callable[[Path, list[Path], random.Random], None]] = {
    "bits flipped": flip,
    "truncated": cut,
    "lengthened": lengthen,
    "block of zeros": zero,
    "deleted": delete,
    "swapped": swap,
    "stale": stale,
}


def make_shelf(folder: Path) -> None:
    """Three checkpoints of one small model in training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keep = checkpoint.Retention(len(STEPS))
    for step in STEPS:
        model(torch.randint(32, (4, 8))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save(folder, step, checkpoint.collect(model, optimizer), {}, keep=keep)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one(shelf: Path, kind: str, dice: random.Random, outcome: Outcome) -> None:
    """Damage the newest checkpoint of a copy, now and then the one before too."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        copy = Path(scratch) / "checkpoints"
        shutil.copytree(shelf, copy)
        newest, *older = sorted(copy.iterdir(), reverse=True)
        for target in [newest] + [older[0]] * (dice.random() < 0.2):
            path = dice.choice(sorted(target.iterdir()))
            rest = [p for folder in copy.iterdir() for p in folder.iterdir()]
            others = [p for p in rest if p != path and (p.parent == target or p.name == path.name)]
            KINDS[kind](path, others, dice)
        sound = [p for p in (newest, *older) if contents(p) == contents(shelf / p.name)]
        taken = _taken(copy)
        if taken is None and not sound:
            outcome.detected[kind] += 1  # all of them damaged, and said so
        elif not sound or taken is None or taken.name != sound[0].name:
            outcome.missed.append(f"{kind}: took {taken}, sound are {[p.name for p in sound]}")
        elif sound[0] == newest:
            outcome.harmless[kind] += 1
        else:
            outcome.detected[kind] += 1


def _taken(folder: Path) -> Path | None:
    try:
        return checkpoint.find_latest(folder)
    except checkpoint.CheckpointError:
        return None


def fuzz(rounds: int, seed: int) -> Outcome:
    """Every kind of damage equally often."""
    dice, outcome = random.Random(seed), Outcome()
    logger = logging.getLogger("flashtrain.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each round warns, as it should
    try:
        with tempfile.TemporaryDirectory(prefix="shelf-") as folder:
            make_shelf(Path(folder) / "checkpoints")
            for number in range(rounds):
                one(Path(folder) / "checkpoints", list(KINDS)[number % len(KINDS)], dice, outcome)
    finally:
        logger.setLevel(level)
    return outcome
