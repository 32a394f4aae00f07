from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flashtrain.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from flashtrain.data.unfinished import Reader, cut, stops_at

TEXT = "né à Zürich 日本, 🙂 and so on. END of it"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_is_shown_makes_the_text_and_never_half_a_character(kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe([TEXT] * 3, 300)
    reader = Reader(tokenizer)
    parts = [reader.add(token) for token in tokenizer.encode(TEXT)]
    assert "".join(parts) + reader.rest() == TEXT
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("strings", [["END"], ["so", "🙂"], ["is missing"], [". E", "Zürich 日本"]])
def test_a_stop_string_ends_the_text_before_it(kind: str, strings: list[str]) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe([TEXT] * 3, 300)
    stop = stops_at(tokenizer, strings)
    assert stop is not None
    reader, shown, ids = Reader(tokenizer, strings), "", []
    for token in tokenizer.encode(TEXT):
        ids.append(token)
        shown += reader.add(token)
        if stop(ids):
            break
    ended = any(string in TEXT for string in strings)
    assert (tokenizer.decode(ids) != TEXT) == ended
    assert shown + reader.rest() == cut(TEXT, strings)
    assert cut(TEXT, strings) == min((TEXT.split(s)[0] for s in strings), key=len)


def test_a_first_blank_is_shown_where_the_tokenizer_marks_blanks_as_llama_2_does(
    tmp_path: Path,
) -> None:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(["the quick brown fox"] * 9, trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    prompt, *words = (tokenizer.encode(text) for text in ("the quick", "brown", "fox"))
    reader = Reader(tokenizer, ["fox"], prompt)
    assert "".join(reader.add(*ids) for ids in words) + reader.rest() == " brown "
    assert Reader(tokenizer).add(*words[0]) == "brown"


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    reader = Reader(ByteTokenizer())
    assert reader.add(0xC3) == ""
    assert reader.rest() == "\ufffd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        stops_at(ByteTokenizer(), ["a", ""])
    assert stops_at(ByteTokenizer(), []) is None
