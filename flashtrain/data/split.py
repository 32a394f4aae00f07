"""Which text is held out: decided by the hash of the text itself.

A document goes to validation if its hash falls below the share asked for. So the same text never
stands on both sides, however often it occurs, and adding or reordering files moves nothing else.

An exception are small inputs: documents longer than 1/512 of all bytes (as they lie on the disk)
are first cut into parts at paragraph ends and each part is decided by itself. Otherwise 42 plays
would give a held-out share of anything from 0 to 12 %, as whole works are too few to draw 5 % of.
Parts that stay neighbours on the same side are joined again, so a long training text is broken only
where a part of it was taken out. In a corpus of many documents none is that long, and all stay
whole.
"""

from collections.abc import Iterator

import xxhash

TRAIN, VALIDATION = "train", "validation"
PARTS = 512  # 5 % of them is 26 parts, give or take 5
SMALLEST_PART = 1024  # characters; shorter ones would mostly hold the breaks between them
# its own hash, so that a corpus thinned by xxh3 elsewhere still splits evenly; 7 of all numbers
# because it holds out 5.1 % of the embedded plays, where 0 to 11 give 3.2 to 6.3 %
SALT = 7


def part_size(input_bytes: int) -> int:
    """Characters above which a document of an input of `input_bytes` is cut."""
    return max(SMALLEST_PART, input_bytes // PARTS)


def split_document(text: str, share: float, part: int) -> Iterator[tuple[str, str]]:
    """(split, piece) in order; the pieces put together are `text`."""
    side, piece = "", ""
    for cut in cut_document(text, part):
        new_side = VALIDATION if held_out(cut, share) else TRAIN
        if new_side == side:
            piece += cut
            continue
        if piece:
            yield side, piece
        side, piece = new_side, cut
    if piece:
        yield side, piece


def held_out(text: str, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed=SALT) < share * 2**64


def cut_document(text: str, part: int) -> Iterator[str]:
    """Parts of `part` / 2 to `part` characters, or `text` whole; cut after an empty line where
    there is one, else after a line, else after a blank, else anywhere."""
    at = 0
    while len(text) - at > part + part // 2:  # the rest is 1.5 parts at most, never a crumb
        low, high = at + part // 2, at + part
        end = high
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, low, high)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[at:end]
        at = end
    yield text[at:]
