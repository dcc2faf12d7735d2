"""WordPiece: the same bytes every time, the greedy algorithm by hand, and files that are no vocabulary."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.data.shapes.language import captions
from vlbench.data.shapes.scene import sample_scene
from vlbench.data.wordpiece import SPECIAL, WordPieceTokenizer, read_wordpiece, train_wordpiece, unknown_share

SENTENCES = (
    "A small red circle left of a large blue square.",
    "Ein kleiner roter Kreis links von einem großen blauen Quadrat, über dem Stern.",
    "Un petit cercle rouge à gauche d'un grand carré bleu; une étoile.",
    "Malý červený kruh vlevo od velkého modrého čtverce.",
)


def corpus(seed: int = 0, words: int = 400, texts: int = 600) -> list[str]:
    """Random words: many pairs of letters are equally frequent, so that ties must be broken."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzäéř", k=rng.randint(2, 8))) for _ in range(words)]
    return [" ".join(rng.choices(known, k=6)) for _ in range(texts)]


def vocabulary(content: bytes) -> list[str]:
    table = json.loads(content)["model"]["vocab"]
    return sorted(table, key=table.__getitem__)


def test_the_same_texts_give_the_same_bytes_in_any_order_and_process() -> None:
    texts = corpus()
    first = train_wordpiece(texts, 600)
    assert train_wordpiece(iter(texts), 600) == first
    assert train_wordpiece(reversed(texts), 600) == first
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.starmap(train_wordpiece, [(texts, 600)] * 3) == [first] * 3
    assert train_wordpiece(corpus(seed=1), 600) != first
    assert len(vocabulary(first)) == 600


def test_the_librarys_threads_are_left_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # hf: models set it for the whole process
    train_wordpiece(SENTENCES, 200)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def by_hand(words: list[str], known: set[str]) -> list[str]:
    """WordPiece as BERT's repository describes it: the longest known beginning, then the longest known ``##``."""
    pieces: list[str] = []
    for word in words:
        start, found = 0, []
        while start < len(word):
            ends = (end for end in range(len(word), start, -1))
            piece = next((piece for end in ends if (piece := ("##" if start else "") + word[start:end]) in known), None)
            if piece is None:
                found = ["[UNK]"]
                break
            found.append(piece)
            start += len(piece) - (2 if start else 0)
        pieces += found
    return pieces


def test_texts_are_cut_as_by_hand() -> None:
    content = train_wordpiece(corpus(), 500, strip_accents=False)
    tokens = vocabulary(content)
    read = WordPieceTokenizer(content, context_length=64)
    assert read.size == len(tokens) == 500
    for text in [*corpus(seed=2, texts=200), *corpus(texts=50), "qqq ω aωb", ""]:
        pieces = by_hand(text.split(), set(tokens))
        assert [tokens[index] for index in read.ids(text)] == ["[CLS]", *pieces, "[SEP]"]
    frequent = [token for token in tokens[5:] if len(token.removeprefix("##")) > 2]
    assert len(frequent) > 100, "nothing but letters was learnt"


def test_normalisation_is_berts_or_none() -> None:
    def words(**settings: Any) -> set[str]:
        return set(vocabulary(train_wordpiece([*SENTENCES] * 20, 2000, **settings)))

    lower, mixed = words(), words(lower=False)
    assert {"ein", "grossen", "großen"} & lower == {"ein", "großen"}  # accents alone are stripped
    assert {"etoile", "cerveny", "carre"} <= lower
    assert {"Ein", "étoile", "červený", "Stern"} <= mixed
    assert "étoile" in words(strip_accents=False)
    content = train_wordpiece(SENTENCES, 400)
    read = WordPieceTokenizer(content, context_length=32)
    assert read.ids("Étoile  ROUGE") == read.ids("etoile rouge")
    other = WordPieceTokenizer(train_wordpiece(SENTENCES, 400, lower=False), context_length=32)
    assert other.ids("Étoile") != other.ids("etoile")


def test_rows_are_padded_in_steps_of_16_and_long_texts_keep_their_end() -> None:
    read = WordPieceTokenizer(train_wordpiece(SENTENCES, 300), context_length=40)
    tokens_BL = read(["red circle", ""])
    assert tokens_BL.shape == (2, 16)
    assert tokens_BL.dtype == torch.long
    start, end = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    assert tokens_BL[1].tolist() == [start, end] + [0] * 14
    long_BL = read(["red circle " * 50, "red"])
    assert long_BL.shape == (2, 40)
    assert (long_BL[0, 0], long_BL[0, -1]) == (start, end)
    assert (long_BL[0] != 0).all()
    assert long_BL[0, 1:3].tolist() == tokens_BL[0, 1:3].tolist()
    assert read(["a " * 20]).shape == (1, 32)
    assert read([]).shape[0] == 0


def test_a_text_that_spells_a_special_token_has_its_letters_only() -> None:
    content = train_wordpiece([*SENTENCES, "[sep] [cls] [pad]"], 300)
    ids = WordPieceTokenizer(content, context_length=64).ids("a [SEP] b [PAD] [CLS] c")
    assert ids.count(SPECIAL.index("[SEP]")) == ids.count(SPECIAL.index("[CLS]")) == 1
    assert 0 not in ids


def test_the_alphabet_is_bounded_and_rare_letters_are_unknown() -> None:
    texts = ["the cat sat on the mat"] * 50 + ["Ω at"]
    content = train_wordpiece(texts, 100, alphabet=9)
    read = WordPieceTokenizer(content, context_length=16)
    assert read.ids("Ω")[1:-1] == [1]
    assert 1 not in read.ids("the cat")
    many = "".join(chr(0x4E00 + index) for index in range(500))
    assert len(vocabulary(train_wordpiece([many] * 3, 100))) <= 100


def test_the_alphabet_grows_with_the_scripts_and_not_with_rare_letters() -> None:
    han = [chr(0x4E00 + index) for index in range(1500)]
    texts = ["".join(han)] * 3 + ["the cat sat on the mat"] * 50
    content = train_wordpiece(texts, 100_000, lower=False)
    assert unknown_share(content, texts) == 0
    assert set(han) <= set(vocabulary(content))
    assert unknown_share(train_wordpiece(texts, 100_000, lower=False, alphabet=1000), texts) > 0.1
    # A letter that is less than 1 in 100,000 is left out, once there are 1000 others.
    rare = chr(0x4E00 + 5000)
    frequent = ["".join(han)] * 200
    assert rare not in vocabulary(train_wordpiece([*frequent, rare], 100_000, lower=False))
    assert rare in vocabulary(train_wordpiece([*frequent[:50], rare], 100_000, lower=False))
    assert unknown_share(content, ["", " "]) == 0


def test_one_languages_vocabulary_is_what_it_was_with_a_thousand_letters() -> None:
    """Captions of the embedded world, of which presets learn, and texts of 30 letters: the same bytes."""
    scenes = (sample_scene(0, "pairs", index) for index in range(200))
    world = [caption for scene in scenes for caption in captions(scene)["en"]]
    for texts, size in ((world, 512), (world, 200), (corpus(), 600), ([*SENTENCES] * 5, 30_522)):
        assert train_wordpiece(texts, size) == train_wordpiece(texts, size, alphabet=1000)


def test_the_tokenizer_travels_and_names_its_vocabulary() -> None:
    content = train_wordpiece(SENTENCES, 300)
    read = WordPieceTokenizer(content, context_length=32)
    again = pickle.loads(pickle.dumps(read))
    assert again.ids(SENTENCES[0]) == read.ids(SENTENCES[0])
    assert again.spec == read.spec
    kind, _, digits = read.spec.tokenizer.partition(":")
    assert (kind, len(digits), read.spec.context_length) == ("wordpiece", 8, 32)
    cased = WordPieceTokenizer(train_wordpiece(SENTENCES, 300, lower=False), context_length=32)
    assert cased.spec.tokenizer != read.spec.tokenizer


def test_files_are_read_in_both_forms(tmp_path: Path) -> None:
    content = train_wordpiece(SENTENCES, 300)
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_wordpiece(tmp_path / "tokenizer.json") == content
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary(content)) + "\n", encoding="utf-8")
    assert read_wordpiece(tmp_path / "vocab.txt") == content
    cased = read_wordpiece(tmp_path / "vocab.txt", lower=False)
    assert json.loads(cased)["normalizer"]["lowercase"] is False


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.json", None, "a BPE model, not WordPiece"),
        ("vocab.txt", "a\nb\n", r"\[PAD\], \[UNK\], \[CLS\], \[SEP\] missing"),
        ("vocab.txt", "[UNK]\n[PAD]\n[CLS]\n[SEP]\n", r"its first token is '\[UNK\]'; \[PAD\] must be there"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nx\nx\n", "the token 'x' is there twice"),
        ("vocab.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    if content is None:
        from tokenizers import Tokenizer, models

        content = Tokenizer(models.BPE()).to_str()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_wordpiece(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_no_file_and_no_texts_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_wordpiece(tmp_path / "absent.json")
    with pytest.raises(UserError, match="no texts to learn a vocabulary from"):
        train_wordpiece(["", "  "], 100)
