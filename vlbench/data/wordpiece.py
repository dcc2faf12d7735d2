"""WordPiece: a vocabulary learnt from texts, and the tokenizer that reads with it.

A vocabulary is kept as the ``tokenizer.json`` of Hugging Face's ``tokenizers``, which says how texts are normalised
too, so that whoever has the bytes tokenises as the training did. The library learns it, under two conditions without
which the same texts give other bytes in every process: it numbers the pieces ``##x`` in the order of a hash table,
and breaks ties between equally frequent pairs by these numbers. So all of them are named beforehand, in order.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from vlbench.core.cards import TextSpec
from vlbench.core.config import Config
from vlbench.core.errors import UserError

PAD, UNKNOWN, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LENGTH_STEP = 16  # why: models/text.py
_MIN_COUNT = 2  # a pair of pieces that occurs once is a name, not a part of words
_WORDS_A_LINE = 1000
_ALPHABET = 1000
_LEFT_OUT = 1e-5  # of all letters of the texts: a few words in 100,000 are [UNK]


class WordPieceConfig(Config):
    """Which vocabulary."""

    size: int = Field(default=30_522, ge=100, description="tokens to learn at most, the five special ones included")
    file: str | None = Field(
        default=None,
        description="a vocabulary to take instead of learning one: tokenizer.json, or BERT's vocab.txt. Its size is "
        "the file's; a tokenizer.json also says itself how texts are normalised",
    )
    lower: bool = Field(default=True, description="lower-case texts; false for several languages, as BERT's was")
    strip_accents: bool | None = Field(default=None, description="None: where lower is on, BERT's rule")
    alphabet: int | None = Field(
        default=None,
        ge=1,
        description="characters at most, the most frequent; words with others are [UNK]. Never more than fill half of "
        "the vocabulary. None: 1000, or as many more as the scripts of the texts need: all but 1 in 100,000 letters",
    )
    max_examples: int | None = Field(
        default=None, ge=1, description="learn from so many examples of each source, evenly spaced; None: from all"
    )


def train_wordpiece(
    texts: Iterable[str],
    size: int,
    *,
    lower: bool = True,
    strip_accents: bool | None = None,
    alphabet: int | None = None,
) -> bytes:
    """A WordPiece vocabulary of ``texts``, as ``tokenizer.json``. The same texts, in any order, give the same bytes.

    Args:
        texts: gone through once; only their words are kept.
        size: tokens at most; fewer where the texts have no more.
        lower: lower-case.
        strip_accents: None: where ``lower`` is on.
        alphabet: characters at most, the most frequent; None: as many as ``WordPieceConfig`` says.

    Raises:
        UserError: where there is not a word in the texts.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    normaliser, splitter = _normaliser(lower, strip_accents), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text)))
    if not words:
        raise UserError("there are no texts to learn a vocabulary from")
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    ordered = sorted(letters, key=lambda letter: (-letters[letter], letter))
    # Each letter is two tokens, "x" and "##x".
    limit = max(1, min(alphabet or _needed(letters, ordered), (size - len(SPECIAL)) // 4))
    known = sorted(ordered[:limit])
    readable = {word: count for word, count in sorted(words.items()) if set(word) <= set(known)}
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=_MIN_COUNT,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in known)],
        initial_alphabet=known,
        show_progress=False,
    )
    with _one_thread():
        learner.train_from_iterator(_lines(readable), trainer)
    tokens = learner.get_vocab()
    return _serialised(sorted(tokens, key=tokens.__getitem__), lower, strip_accents)


def _needed(letters: Counter[str], ordered: Sequence[str]) -> int:
    """How many letters to know where nobody has said: 1000, BERT's number for one language, if they suffice.

    Han characters alone are several thousand, and a number that grew with the vocabulary would fill an English one
    with letters that occur once on the web. So it grows with what the texts are written in, by frequency.
    """
    left, allowed, needed = letters.total(), _LEFT_OUT * letters.total(), 0
    while left > allowed:
        left -= letters[ordered[needed]]
        needed += 1
    return max(_ALPHABET, needed)


def unknown_share(content: bytes, texts: Iterable[str]) -> float:
    """The share of the tokens of ``texts`` that are ``[UNK]`` under a vocabulary; 0 where there is no token."""
    read, total, unknown = WordPieceTokenizer(content, context_length=sys.maxsize), 0, 0
    for text in texts:
        ids = read.ids(text)[1:-1]
        total += len(ids)
        unknown += ids.count(read.unknown)
    return unknown / total if total else 0.0


def read_wordpiece(path: str | Path, *, lower: bool = True, strip_accents: bool | None = None) -> bytes:
    """The vocabulary in a file, as ``train_wordpiece`` gives it.

    Args:
        path: a ``tokenizer.json`` with a WordPiece model, or BERT's ``vocab.txt``, one token a line.
        lower: for ``vocab.txt``, which does not say.
        strip_accents: the same.

    Raises:
        UserError: for a file that cannot be read, or is no WordPiece vocabulary.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"vocabulary {path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".txt":
        try:
            tokens = [line.rstrip("\r") for line in content.decode("utf-8").rstrip("\n").split("\n")]
        except UnicodeDecodeError:
            raise UserError(f"vocabulary {path}: not a text file in UTF-8") from None
        if len(set(tokens)) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise UserError(f"vocabulary {path}: the token {twice!r} is there twice")
        _check_special(tokens, str(path))
        content = _serialised(tokens, lower, strip_accents)
    WordPieceTokenizer(content, context_length=3, where=str(path))
    return content


class WordPieceTokenizer:
    """Texts to token ids, ``[CLS] ... [SEP]``, padded no further than the batch needs, in steps of 16.

    A longer text is cut; ``[SEP]`` stays. A text that spells "[SEP]" has these letters, not the token.

    Args:
        content: a vocabulary as ``train_wordpiece`` gives it.
        context_length: L at most, the two special tokens included.
        where: what to call the vocabulary in an error.

    Raises:
        UserError: where ``content`` is no WordPiece vocabulary with BERT's special tokens, ``[PAD]`` first.
    """

    def __init__(self, content: bytes, *, context_length: int, where: str = "the run's own") -> None:
        from tokenizers import Tokenizer, models

        try:
            stored = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"vocabulary {where}: not a tokenizer.json ({_line(error)})") from None
        if not isinstance(stored.model, models.WordPiece):
            raise UserError(f"vocabulary {where}: a {type(stored.model).__name__} model, not WordPiece")
        # Without the file's added tokens, which a text could spell, and without its own padding and truncation.
        self._encoder = Tokenizer(stored.model)
        self._encoder.normalizer, self._encoder.pre_tokenizer = stored.normalizer, stored.pre_tokenizer
        ids = self._encoder.get_vocab()
        _check_special(sorted(ids, key=ids.__getitem__), where)
        self._start, self._end = ids[START], ids[END]
        self.unknown = ids[UNKNOWN]
        """The id of words that cannot be made of known pieces."""
        self.size = max(ids.values()) + 1
        """Rows that a token embedding needs."""
        name = f"wordpiece:{hashlib.sha256(content).hexdigest()[:8]}"
        self.spec = TextSpec(tokenizer=name, context_length=context_length)
        """For the model card: two vocabularies have two names."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """``tokens_BL``, int64, padded with zeros, which are ``[PAD]``."""
        assert not isinstance(texts, str), "a list of texts, not one text"
        rows = [self.ids(text) for text in texts]
        longest = max(map(len, rows), default=1)
        length = min(self.spec.context_length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
        tokens_BL = torch.zeros(len(rows), length, dtype=torch.long)
        for row_L, ids in zip(tokens_BL, rows, strict=True):
            row_L[: len(ids)] = torch.tensor(ids)
        return tokens_BL

    def ids(self, text: str) -> list[int]:
        """The token ids of one text, the special ones included."""
        inner = self._encoder.encode(text, add_special_tokens=False).ids
        return [self._start, *inner[: self.spec.context_length - 2], self._end]


def _normaliser(lower: bool, strip_accents: bool | None) -> Any:
    from tokenizers import normalizers

    stripped = lower if strip_accents is None else strip_accents
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=stripped, lowercase=lower
    )


def _serialised(tokens: Sequence[str], lower: bool, strip_accents: bool | None) -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    whole = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    whole.normalizer = _normaliser(lower, strip_accents)
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return whole.to_str().encode("utf-8")


def _check_special(tokens: Sequence[str], where: str) -> None:
    missing = [token for token in (PAD, UNKNOWN, START, END) if token not in tokens]
    if missing:
        raise UserError(
            f"vocabulary {where}: {', '.join(missing)} missing; is it a WordPiece vocabulary of BERT's kind?"
        )
    if tokens[0] != PAD:
        raise UserError(f"vocabulary {where}: its first token is {tokens[0]!r}; {PAD} must be there, since it has id 0")


def _lines(words: dict[str, int]) -> Iterator[str]:
    """Texts that hold each word as often as it was counted."""
    for word, count in words.items():
        for start in range(0, count, _WORDS_A_LINE):
            yield " ".join([word] * min(_WORDS_A_LINE, count - start))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library's thread pool asleep: once used, it warns of every loader process that is forked later."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
