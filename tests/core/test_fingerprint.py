"""Words in their order: what tells one list from another, whatever is in it."""

from __future__ import annotations

import hashlib

from vlbench.core.fingerprint import fingerprint_words


def test_words_are_told_apart_by_their_order_and_their_ends() -> None:
    lists = [(), ("",), ("", ""), ("a", "bc"), ("ab", "c"), ("abc",), ("bc", "a"), ("a", "bc", "")]
    assert len({fingerprint_words(words) for words in lists}) == len(lists)
    assert fingerprint_words(iter(("a", "bc"))) == fingerprint_words(["a", "bc"])
    assert fingerprint_words(["\udcff"]) != fingerprint_words(["?"]), "file names may be no text"


def test_the_digits_are_those_that_checkpoints_hold() -> None:
    """A resumed run compares them with those of the run that was stopped, perhaps by an older vlbench."""
    said = b"".join(len(word).to_bytes(8, "little") + word for word in ("é".encode(), b"bc"))
    assert fingerprint_words(["é", "bc"]) == hashlib.sha256(said).hexdigest()[:16]
