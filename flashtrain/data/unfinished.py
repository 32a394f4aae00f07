"""Text that is still being drawn, token by token: where it stops, and what of it can be shown."""

from collections.abc import Callable, Sequence

from flashtrain.data.tokenizer import UNKNOWN, Tokenizer


def stops_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """A test of the ids drawn so far: whether the newest of them completes one of `strings`."""
    if not all(strings):
        raise ValueError("a stop string is empty: leave it out")
    if not strings:
        return None
    # a token is at least one byte, a character at most four; one more may begin before the string
    window = 4 * max(map(len, strings)) + 1

    def stop(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-window:])
        return any(string in text for string in strings)

    return stop


def cut(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of `strings` in it."""
    ends = [text.find(string) for string in strings if string in text]
    return text[: min(ends)] if ends else text


class Reader:
    """Shows a growing text: what `add` returns, one after the other, and `rest` make the whole.

    Held back are characters whose bytes are not all there, and what may begin a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, strings: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """before: ids of the text that this one goes on from; it is not shown again."""
        self.tokenizer, self.strings = tokenizer, strings
        # Llama 2's decoder takes a blank off whatever it begins with, so it begins with these
        self.ids = list(before)
        self.begin = len(tokenizer.decode(before)) if before else 0
        self.shown = 0  # characters

    def add(self, *tokens: int) -> str:
        self.ids += tokens
        text = self._text()
        return self._show(text[: len(text) - self._unsure(text)])

    def rest(self) -> str:
        """What is left at the end."""
        return self._show(self._text())

    def _text(self) -> str:
        return cut(self.tokenizer.decode(self.ids)[self.begin :], self.strings)

    def _show(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new

    def _unsure(self, text: str) -> int:
        """How many characters at the end may still change or begin a stop string."""
        whole = text.rstrip(UNKNOWN)
        begun = max(
            (
                n
                for string in self.strings
                for n in range(1, len(string))
                if whole.endswith(string[:n])
            ),
            default=0,
        )
        return len(text) - len(whole) + begun
