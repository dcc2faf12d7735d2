from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.stats.contractions import CONTRACTIONS
from vlbench.stats.intervals import estimate
from vlbench.stats.vqa import PUNCTUATION, accuracy, answer_vocabulary, normalise, soft_targets, vqa_outcomes

# ------------------------------------------------------------------ the rule once more, letter by letter, in fractions

MARKS = [chr(code) for code in (59, 47, 91, 93, 34, 123, 125, 40, 41, 61, 43, 92, 95, 45, 62, 60, 64, 96, 44, 63, 33)]
DIGITS = "0123456789"
COUNTED = {"none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
COUNTED |= {"eight": 8, "nine": 9, "ten": 10}


def oracle_accuracy(prediction: str, answers: list[str], branches: Counter) -> Fraction:
    """Every one of the people is left out in turn, and the others are gone through one by one."""
    given = [oracle_plain(answer, branches) for answer in answers]
    said = oracle_plain(prediction, branches)
    if any(answer != given[0] for answer in given):
        branches["answers differ"] += 1
        given, said = [oracle_spelling(answer, branches) for answer in given], oracle_spelling(said, branches)
    else:
        branches["answers agree"] += 1
    total = Fraction(0)
    for left_out in range(len(given)):
        matches = 0
        for place, answer in enumerate(given):
            if place != left_out and answer == said:
                matches += 1
        total += min(Fraction(1), Fraction(matches, 3))
    branches[f"matches {min(given.count(said), 5)}"] += 1
    return total / len(given)


def oracle_plain(text: str, branches: Counter) -> str:
    letters = []
    for letter in text:
        if letter in "\n\t":
            branches["line end or tab"] += 1
            letter = " "
        letters.append(letter)
    return "".join(letters).strip()


def oracle_spelling(text: str, branches: Counter) -> str:
    commas = [i for i in range(1, len(text) - 1) if text[i] == ","]
    thousands = any(text[i - 1] in DIGITS and text[i + 1] in DIGITS for i in commas)
    beside = set()
    for left, right in itertools.pairwise(text):
        if left == " " and right in MARKS:
            beside.add(right)
            branches[f"{right} behind a space"] += 1
        if right == " " and left in MARKS:
            beside.add(left)
            branches[f"{left} before a space"] += 1
    letters = []
    for letter in text:
        if letter not in MARKS:
            letters.append(letter)
        elif thousands:
            branches[f"{letter} with a comma in a number"] += 1
        elif letter in beside:
            branches[f"{letter} vanishes"] += 1
        else:
            branches[f"{letter} parts words"] += 1
            letters.append(" ")
    kept, gone = [], 0
    for place, letter in enumerate(letters):
        follows = letters[place + 1] if place + 1 < len(letters) else ""
        if letter == "." and follows not in set(DIGITS) and gone < 32:
            gone += 1
            branches["period vanishes"] += 1
            continue
        if letter == ".":
            branches["period before a digit" if follows in set(DIGITS) else "period after 32"] += 1
        kept.append(letter)
    words = []
    for word in "".join(kept).lower().split():
        if word in COUNTED:
            branches[f"number {word}"] += 1
            word = f"{COUNTED[word]}"
        if word in ("a", "an", "the"):
            branches[f"article {word}"] += 1
            continue
        words.append(oracle_contraction(word, branches))
    if not words:
        branches["nothing is left"] += 1
    if any(ord(letter) > 127 for word in words for letter in word):
        branches["beyond ASCII"] += 1
    return " ".join(words)


def oracle_contraction(word: str, branches: Counter) -> str:
    """Where one apostrophe put anywhere gives a word that the table restores."""
    if word == "somebody'd":
        branches["somebody'd"] += 1
        return "somebodyd"
    known = set(CONTRACTIONS.values()) - {"somebodyd"}
    for place in range(len(word) + 1):
        if (longer := f"{word[:place]}'{word[place:]}") in known:
            branches[f"contraction {word}"] += 1
            return longer
    return word


# ----------------------------------------------------------------------------------------------------- made answers

PLAIN = [
    "cat",
    "dog",
    "red",
    "blue sky",
    "yes",
    "no",
    "left",
    "Frisbee",
    "2",
    "10",
    "café",
    "naïve",
    "東京",
    "STOP",
    "",
]
NUMBERS = [
    "1,000",
    "12,345,678",
    "5.5",
    ".5",
    "3.",
    "1.000.000",
    "2,5 m",
    "1,a",
    "a,1",
    "٣,٤",
    "3.٣",
    "U.S.A.",
    "v1.2.",
]
SPACES = ["two\nwords", "a\tcat", "  dog  ", "blue  sky", "\n", "no\u00a0break", "t-shirt\n-red", "x-ray\t-y"]


def made_answers() -> list[str]:
    found = [*PLAIN, *NUMBERS, *SPACES, *COUNTED, *(word.title() for word in COUNTED), "." * 40, "a" + "." * 33 + "b"]
    for mark in MARKS:
        found += [f"{mark}cat", f"cat{mark}", f"cat{mark}dog", f"cat {mark}dog", f"cat{mark} dog", f"cat {mark} dog"]
        found += [f"1{mark}2", f"1{mark}000 1,000", f"{mark}", f"{mark}{mark}", f"a{mark}b {mark}c", f"don{mark}t"]
    for article in ("a", "an", "the", "A", "The"):
        found += [article, f"{article} cat", f"cat {article} dog", f"cat {article}", f"{article}cat"]
    for met in CONTRACTIONS:
        found += [met, f"{met.title()} it", CONTRACTIONS[met]]
    return found


def answer_sets(count: int) -> list[tuple[str, list[str]]]:
    """A prediction and ten answers: some agree, most differ, and many are other spellings of one another."""
    rng = random.Random(0)
    pool = made_answers()
    sets = []
    for number in range(count):
        base = pool[number % len(pool)]
        others = [base, base.upper(), f" {base}", f"the {base}", f"{base}!", rng.choice(pool), rng.choice(pool)]
        answers = [base] * 10 if number % 7 == 0 else [rng.choice(others) for _ in range(10)]
        if number % 11 == 0:
            answers = [base] * rng.randint(1, 5) + [rng.choice(pool) for _ in range(5)]
            answers += [base] * (10 - len(answers))
        sets.append((rng.choice([base, rng.choice(others), rng.choice(answers), rng.choice(pool)]), answers))
    return sets


def test_accuracy_equals_an_independent_computation_on_every_branch():
    branches: Counter = Counter()
    sets = answer_sets(6000)
    for prediction, answers in sets:
        expected = oracle_accuracy(prediction, answers, branches)
        assert accuracy(prediction, answers) == float(expected), (prediction, answers)
    wanted = {"answers differ", "answers agree", "line end or tab", "nothing is left", "beyond ASCII", "somebody'd"}
    wanted |= {"period vanishes", "period before a digit", "period after 32", *(f"matches {n}" for n in range(6))}
    wanted |= {f"article {word}" for word in ("a", "an", "the")} | {f"number {word}" for word in COUNTED}
    wanted |= {f"contraction {word}" for word in CONTRACTIONS if word != "somebody'd"}
    kinds = ("behind a space", "before a space", "vanishes", "parts words", "with a comma in a number")
    wanted |= {f"{mark} {kind}" for mark in MARKS for kind in kinds}
    hit = {name for name in wanted if branches[name]}
    assert hit == wanted, f"{len(hit)} of {len(wanted)} branches were hit, not {sorted(wanted - hit)}"
    assert len(hit) == 15 + 3 + 12 + 113 + 5 * 21, f"{len(hit)} branches were hit by {len(sets)} answer sets"


def test_normalise_equals_the_independent_spelling():
    for text in made_answers():
        branches: Counter = Counter()
        assert normalise(text) == oracle_spelling(oracle_plain(text, branches), branches), text


def test_the_oracle_is_not_the_identity():
    """Half the made answers change their spelling, so that a rule that is left out shows."""
    changed = [text for text in made_answers() if normalise(text) != text]
    assert len(changed) > 300


def test_marks_are_the_official_ones():
    assert sorted(PUNCTUATION) == sorted(MARKS)
    assert len(MARKS) == 21


def test_contractions_are_the_official_table():
    """The digest is of the official table, without entries that cannot match (capitals) or change nothing."""
    lines = "".join(f"{met} {meant}\n" for met, meant in sorted(CONTRACTIONS.items()))
    expected = "9964fa088ea25444d53dcc210a2d8394a798ac129e4dc1c0411f29e1d7d3d99a"
    assert hashlib.sha256(lines.encode()).hexdigest() == expected
    assert len(CONTRACTIONS) == 114


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("cats,dogs", "cats dogs"),
        ("cats, dogs", "cats dogs"),
        ("black-white", "black white"),
        ("black -white", "black white"),
        ("t-shirt - red", "tshirt red"),
        ("5.5", "5.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("none", "0"),
        ("Ten", "10"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("a an the", ""),
        ("two\nwords\t", "2 words"),
        ("Im", "im"),
    ],
)
def test_normalise_worked_examples(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_by_number_of_matches(matches, expected):
    answers = ["cat"] * matches + [f"other {n}" for n in range(10 - matches)]
    assert accuracy("cat", answers) == expected


def test_answers_that_agree_are_compared_as_written():
    assert accuracy("Yes", ["yes"] * 10) == 0.0
    assert accuracy("two", ["2"] * 10) == 0.0
    assert accuracy("yes\n", ["yes"] * 10) == 1.0
    assert accuracy("red\tcar", ["red car"] * 10) == 1.0
    assert accuracy("red car", ["red\ncar"] * 10) == 1.0
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert accuracy("two", ["2"] * 9 + ["3"]) == 1.0


def test_accuracy_does_not_depend_on_the_order_of_answers():
    rng = random.Random(1)
    for prediction, answers in answer_sets(200):
        assert accuracy(prediction, answers) == accuracy(prediction, rng.sample(answers, 10))


def test_accuracy_needs_two_answers():
    with pytest.raises(UserError, match="this question has 1 of them"):
        accuracy("cat", ["cat"])


# ------------------------------------------------------------------------------------------------ outcomes, vocabulary


def test_vqa_outcomes_by_answer_type_clustered_by_image():
    found = vqa_outcomes(
        ["1", "2", "3", "4"],
        [1.0, 0.3, 0.6, 0.0],
        images=["i", "i", "j", "j"],
        answer_types=["yes/no", "other", "yes/no", "number"],
    )
    assert sorted(found) == ["accuracy", "accuracy/number", "accuracy/other", "accuracy/yes/no"]
    assert estimate(found["accuracy"]).value == pytest.approx(0.475)
    assert estimate(found["accuracy"]).n_clusters == 2
    assert estimate(found["accuracy/yes/no"]).value == pytest.approx(0.8)
    assert (found["accuracy/yes/no"].ids, found["accuracy/yes/no"].clusters) == (["1", "3"], ["i", "j"])
    assert not found["accuracy"].binary


def test_answer_vocabulary_orders_by_count_then_text():
    leading = ["yes"] * 12 + ["no"] * 9 + ["Two"] * 5 + ["2"] * 4 + ["red!"] * 9 + ["rare"] * 8
    assert answer_vocabulary(leading) == ("yes", "2", "no", "red")
    assert answer_vocabulary(reversed(leading)) == ("yes", "2", "no", "red")
    assert answer_vocabulary(leading, min_count=8)[-1] == "rare"
    with pytest.raises(UserError, match=r"leads 9 questions or more of these 8; lower min_count"):
        answer_vocabulary(["rare"] * 8)


def test_soft_targets_are_the_accuracies_of_the_answers():
    place_of = {answer: place for place, answer in enumerate(("yes", "2", "no", "red"))}
    answers = ["Two", "2", "no", "no", "no", "red.", "blue", "blue", "blue", "blue"]
    assert soft_targets(answers, place_of) == {1: 0.6, 2: 0.9, 3: 0.3}
    assert soft_targets(answers, place_of) == {
        place: accuracy(answer, answers) for answer, place in place_of.items() if accuracy(answer, answers)
    }
    assert soft_targets(["blue"] * 10, place_of) == {}
    assert soft_targets(["Yes"] * 10, place_of) == {0: 1.0}


def test_constant_answers_score_as_often_as_people_gave_them():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 11, 500)
    values = [accuracy("cat", ["cat"] * n + ["dog"] * (10 - n)) for n in counts.tolist()]
    assert np.mean(values) == pytest.approx(np.mean(np.minimum(1, 0.3 * counts)))
