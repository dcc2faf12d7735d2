from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Example
from vlbench.data.vocabulary import (
    END,
    MASK,
    N_SPECIAL,
    PAD,
    START,
    UNKNOWN,
    Vocabulary,
    captions_of,
    learn_vocabulary,
    read_vocabulary,
)

CAPTIONS = ["A red circle left of a blue square", "a blue circle", "a red square, above a blue circle", "Café"] * 5


def test_special_ids_are_distinct_and_their_pieces_are_no_text() -> None:
    assert sorted({PAD, UNKNOWN, START, END, MASK}) == list(range(N_SPECIAL))
    vocabulary = Vocabulary(learn_vocabulary(CAPTIONS, size=60))
    assert vocabulary.pieces()[:N_SPECIAL] == ["<pad>", "<unk>", "[SOS]", "[EOS]", "[MASK]"]
    assert all(number >= N_SPECIAL for number in vocabulary.encode("a red circle"))
    # A text that spells a special piece is text.
    assert not {PAD, START, END, MASK} & set(vocabulary.encode("[sos] [SOS] [EOS] [MASK] <pad>"))


@pytest.mark.parametrize("text", ["a red circle", "a blue square above a circle", "cafe", "square, square"])
def test_encode_and_decode_are_inverse_on_known_characters(text: str) -> None:
    vocabulary = Vocabulary(learn_vocabulary(CAPTIONS, size=60))
    ids = vocabulary.encode(text)
    assert min(ids) >= N_SPECIAL
    assert vocabulary.decode([START, *ids, END, PAD]) == text


def test_unknown_characters_have_their_own_id_not_that_of_padding() -> None:
    vocabulary = Vocabulary(learn_vocabulary(CAPTIONS, size=60))
    ids = vocabulary.encode("a # circle")
    assert UNKNOWN in ids
    assert PAD not in ids


def test_learning_is_a_function_of_the_captions_alone() -> None:
    model = learn_vocabulary(iter(CAPTIONS), size=60)
    assert learn_vocabulary(CAPTIONS, size=60) == model
    assert learn_vocabulary([text.upper() for text in CAPTIONS], size=60) == model  # normalised first
    assert learn_vocabulary([*CAPTIONS, "green triangle"], size=60) != model


def test_frequent_words_become_one_piece() -> None:
    vocabulary = Vocabulary(learn_vocabulary(CAPTIONS, size=200))
    assert len(vocabulary.encode("a red circle")) == 3
    small = Vocabulary(learn_vocabulary(CAPTIONS, size=30))
    assert len(small) == 30
    assert len(small.encode("a red circle")) > 3


def test_vocabulary_shrinks_to_what_the_captions_can_give() -> None:
    vocabulary = Vocabulary(learn_vocabulary(CAPTIONS, size=10_000))
    assert 60 < len(vocabulary) < 200
    assert vocabulary.decode(vocabulary.encode("a red circle")) == "a red circle"


def test_vocabulary_survives_pickling_and_a_file(tmp_path: Path) -> None:
    model = learn_vocabulary(CAPTIONS, size=60)
    vocabulary = Vocabulary(model)
    vocabulary.encode("a red circle")
    assert pickle.loads(pickle.dumps(vocabulary)).encode("a red circle") == vocabulary.encode("a red circle")
    (tmp_path / "v.model").write_bytes(model)
    assert read_vocabulary(tmp_path / "v.model") == model


def test_what_cannot_be_learnt_or_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no text to learn a vocabulary from"):
        learn_vocabulary(["", "  "], size=60)
    with pytest.raises(UserError, match=r"different characters and 5 special pieces do not fit into a vocabulary of 9"):
        learn_vocabulary(CAPTIONS, size=9)
    with pytest.raises(UserError, match=r"absent\.model: cannot be read: No such file"):
        read_vocabulary(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("these are words")
    with pytest.raises(UserError, match=r"text\.model: not a SentencePiece model; vlbench data vocab makes one"):
        read_vocabulary(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.model: its special pieces are not"):
        read_vocabulary(tmp_path / "empty.model")


def test_a_foreign_vocabulary_is_refused(tmp_path: Path) -> None:
    """One whose padding is its unknown piece, as VirTex's released one."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[SOS]", "[EOS]", "[MASK]"],
        minloglevel=4,
    )
    with pytest.raises(UserError, match="its special pieces are not <pad>, <unk>, "):
        Vocabulary(model.getvalue())


class _Captioned:
    """Three examples, the second of them broken; its images cannot be decoded."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index == 1:
            raise BadExample("empty file", "1", "nothing in it")
        return Example(id=str(index), image=b"no image", texts={"en": (f"one {index}", "two"), "de": ("drei",)})


def test_captions_of_reads_languages_in_order_and_no_image() -> None:
    sources: Any = [_Captioned()]
    assert list(captions_of(sources)) == ["one 0", "two", "one 2", "two"]
    assert list(captions_of(sources, ("de", "en")))[:3] == ["drei", "one 0", "two"]
    assert list(captions_of(sources, ("fr",))) == []
