"""A vocabulary of sub-words for models that write captions: SentencePiece's byte-pair encoding, learnt from captions.

VirTex's (kdexd/virtex, scripts/build_vocabulary.py): BPE, every character covered, trained on normalised captions. One
thing differs: padding has an id of its own. In the released code it is the id of unknown pieces, which are then left
out of the loss and embedded as zero without a word; no published number depends on it, since every character of the
training captions is known.

Training is a function of the captions and their order alone: one thread, no sampling, no file names in the result.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Source
from vlbench.data.caption_text import normalise_caption

PAD: Final = 0
UNKNOWN: Final = 1
START: Final = 2
END: Final = 3
MASK: Final = 4
N_SPECIAL: Final = 5
"""Pieces of text have the ids from here on."""

_SPECIAL = {PAD: "<pad>", UNKNOWN: "<unk>", START: "[SOS]", END: "[EOS]", MASK: "[MASK]"}
_CONTROL = [_SPECIAL[START], _SPECIAL[END], _SPECIAL[MASK]]
_SILENT = 4
"""SentencePiece's level of messages above its errors: they arrive here as exceptions."""


class Vocabulary:
    """Sub-words and their ids. It can be pickled; a loader process builds its own reader.

    Args:
        model: the bytes of a SentencePiece model, as ``learn_vocabulary`` gives them.
        where: what to call it in an error.

    Raises:
        UserError: for bytes that are none, or a vocabulary whose special ids are not ours.
    """

    def __init__(self, model: bytes, *, where: str = "the vocabulary") -> None:
        self.model = bytes(model)
        self._where = where
        found = {name: self._reader.piece_to_id(name) for name in _SPECIAL.values()}
        if found != {name: number for number, name in _SPECIAL.items()} or self._reader.id_to_piece(UNKNOWN) != "<unk>":
            raise UserError(
                f"{where}: its special pieces are not {', '.join(_SPECIAL.values())} in this order; make one with "
                "vlbench data vocab SPEC --out FILE"
            )

    @cached_property
    def _reader(self) -> Any:
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise UserError(f"{self._where}: not a SentencePiece model; vlbench data vocab makes one") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "_where": self._where}

    def __len__(self) -> int:
        return int(self._reader.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Ids of a normalised caption, without start and end."""
        return list(self._reader.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones say nothing."""
        return str(self._reader.decode([number for number in ids if number >= N_SPECIAL]))

    def pieces(self) -> list[str]:
        """Every piece by id."""
        return [self._reader.id_to_piece(number) for number in range(len(self))]


def learn_vocabulary(texts: Iterable[str], *, size: int, where: str = "the captions") -> bytes:
    """A SentencePiece model of at most ``size`` pieces, the five special ones included.

    Where the texts cannot give that many (few different words) the vocabulary is smaller: ``len(Vocabulary(...))``
    says how many there are.

    Args:
        texts: captions, normalised or not.
        size: the largest number of pieces.
        where: what to call the texts in an error.

    Raises:
        UserError: where there is no text, or ``size`` is below the number of different characters.
    """
    import sentencepiece

    normalised = (normalise_caption(text) for text in texts)
    lines = [line for line in normalised if line]
    if not lines:
        raise UserError(f"{where}: there is no text to learn a vocabulary from")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            pad_piece=_SPECIAL[PAD],
            unk_piece=_SPECIAL[UNKNOWN],
            unk_surface="",
            control_symbols=_CONTROL,
            num_threads=1,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 20,
            minloglevel=_SILENT,
        )
    except RuntimeError as error:
        characters = len(set("".join(lines).replace(" ", "\u2581")))
        if size < characters + N_SPECIAL:
            raise UserError(
                f"{where}: {characters} different characters and {N_SPECIAL} special pieces do not fit into a "
                f"vocabulary of {size}; make it larger"
            ) from None
        raise UserError(f"{where}: no vocabulary of {size} pieces: {' '.join(str(error).split())[:160]}") from None
    return model.getvalue()


def captions_of(sources: Sequence[Source], languages: Sequence[str] = ("en",)) -> Iterator[str]:
    """Every caption of every example in order; no image is decoded.

    Broken examples are passed over: training or ``vlbench data check`` will name them.
    """
    for source in sources:
        for index in range(len(source)):
            try:
                texts = source[index].texts
            except BadExample:
                continue
            for language in languages:
                yield from texts.get(language, ())


def read_vocabulary(path: str | Path) -> bytes:
    """The bytes of a vocabulary file. Raises UserError where there is none or it is not one of ours."""
    path = Path(path).expanduser()
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"vocabulary {path}: cannot be read: {error.strerror}") from None
    Vocabulary(model, where=f"vocabulary {path}")
    return model
