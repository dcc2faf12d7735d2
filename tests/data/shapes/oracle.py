"""Answers sentences about scenes by reading them again: shares no code with what wrote them.

Each function takes the words as they are in the files and the scene's bare facts, and raises where it cannot parse
the words or where the picture leaves the answer open.
"""

from __future__ import annotations

import re

from vlbench.data.shapes.scene import Scene

COLOURS = "red|yellow|green|blue|purple|brown"
SHAPES = "circle|square|triangle|hexagon|cross|star|heart|crescent"
SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WHERE = "|".join(SIDES)
HELD_OUT = {
    ("red", "circle"),
    ("yellow", "square"),
    ("green", "triangle"),
    ("blue", "hexagon"),
    ("purple", "cross"),
    ("brown", "star"),
    ("red", "heart"),
    ("yellow", "crescent"),
    ("blue", "circle"),
    ("purple", "triangle"),
    ("brown", "cross"),
    ("green", "heart"),
}


def objects(scene: Scene) -> list[dict]:
    """What a person would list: colour, shape, where, how wide."""
    return [
        {"colour": o.combo.colour, "shape": o.combo.shape, "x": o.x, "y": o.y, "r": o.radius, "size": o.size}
        for o in scene.objects
    ]


def the(scene: Scene, **wanted: str) -> dict:
    """The one object with these attributes."""
    (found,) = such(scene, **wanted)
    return found


def such(scene: Scene, **wanted: str) -> list[dict]:
    return [o for o in objects(scene) if all(o[key] == value for key, value in wanted.items())]


def stands(first: dict, second: dict, where: str) -> bool:
    """Whether ``first`` is WHERE ``second``; a diagonal is an error."""
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    assert max(abs(dx), abs(dy)) > 1.5 * min(abs(dx), abs(dy)), "neither one nor the other"
    across, down = SIDES[where]
    along = dx * across + dy * down
    return along > 0 and along == max(abs(dx), abs(dy))


def bigger(first: dict, second: dict) -> bool:
    ratio = first["r"] / second["r"]
    assert not 0.85 < ratio < 1.17, "nearly of a size"
    return ratio > 1


def biggest(scene: Scene) -> dict:
    first, *rest = sorted(objects(scene), key=lambda o: -o["r"])
    assert all(first["r"] > 1.5 * o["r"] for o in rest)
    return first


def is_on(scene: Scene, word: str) -> bool:
    assert word in ("dark", "light", "plain", "striped", "checkered", "spotted")
    return word in (scene.background.tone, scene.background.pattern)


def _match(pattern: str, text: str) -> tuple[str, ...] | None:
    pattern = pattern.replace("COLOUR", f"({COLOURS})").replace("SHAPE", f"({SHAPES})").replace("WHERE", f"({WHERE})")
    match = re.fullmatch(pattern, text)
    return None if match is None else match.groups()


def answer(text: str, scene: Scene) -> str:
    """The answer to a VQA question."""
    for pattern, rule in QUESTIONS.items():
        found = _match(pattern, text)
        if found is not None:
            told = rule(scene, *found)
            return told if isinstance(told, str) else ("yes" if told else "no") if isinstance(told, bool) else str(told)
    raise AssertionError(f"no rule for {text!r}")


def _one_that_stands(scene: Scene, where: str, shape: str) -> dict:
    item = the(scene, shape=shape)
    (found,) = [o for o in objects(scene) if o != item and stands(o, item, where)]
    return found


QUESTIONS = {
    "Is there a COLOUR SHAPE\\?": lambda s, c, n: bool(such(s, colour=c, shape=n)),
    "Is there a SHAPE\\?": lambda s, n: bool(such(s, shape=n)),
    "Are there any COLOUR shapes\\?": lambda s, c: bool(such(s, colour=c)),
    "Is the SHAPE COLOUR\\?": lambda s, n, c: the(s, shape=n)["colour"] == c,
    "Is the COLOUR object a SHAPE\\?": lambda s, c, n: the(s, colour=c)["shape"] == n,
    "Is the SHAPE WHERE the SHAPE\\?": lambda s, a, w, b: stands(the(s, shape=a), the(s, shape=b), w),
    "Is the SHAPE bigger than the SHAPE\\?": lambda s, a, b: bigger(the(s, shape=a), the(s, shape=b)),
    "Is the background (\\w+)\\?": lambda s, w: is_on(s, w),
    "How many shapes are there\\?": lambda s: len(objects(s)),
    "How many COLOUR shapes are there\\?": lambda s, c: len(such(s, colour=c)),
    "How many SHAPE(?:es|s) are there\\?": lambda s, n: len(such(s, shape=n)),
    "What color is the SHAPE\\?": lambda s, n: the(s, shape=n)["colour"],
    "What color is the biggest shape\\?": lambda s: biggest(s)["colour"],
    "What is the COLOUR object\\?": lambda s, c: the(s, colour=c)["shape"],
    "What is the biggest object\\?": lambda s: biggest(s)["shape"],
    "What is WHERE the SHAPE\\?": lambda s, w, n: _one_that_stands(s, w, n)["shape"],
    "What color is the object WHERE the SHAPE\\?": lambda s, w, n: _one_that_stands(s, w, n)["colour"],
    "How big is the SHAPE\\?": lambda s, n: the(s, shape=n)["size"],
    "Is the background dark or light\\?": lambda s: s.background.tone,
    "What pattern does the background have\\?": lambda s: s.background.pattern,
}


# ------------------------------------------------------------------------------------------------ NLVR2


def holds(text: str, left: Scene, right: Scene) -> bool:
    """Whether an NLVR2 sentence is true of a pair."""
    for pattern, rule in SENTENCES.items():
        match = re.fullmatch(pattern, text)
        if match is not None:
            return rule(left, right, *match.groups())
    raise AssertionError(f"no rule for {text!r}")


def _shows(scene: Scene, words: str) -> bool:
    colour, shape = re.fullmatch(f"(?:({COLOURS}) )?({SHAPES}|shape)", words).groups()
    wanted = {"colour": colour} if colour else {}
    return bool(such(scene, **wanted | ({} if shape == "shape" else {"shape": shape})))


def _around(scene: Scene, where: str) -> bool:
    """Whether something stands WHERE the biggest."""
    main = biggest(scene)
    return True in [stands(o, main, where) for o in objects(scene) if o != main]


def _beside(scene: Scene, where: str) -> bool:
    """Whether the biggest stands WHERE something."""
    main = biggest(scene)
    return True in [stands(main, o, where) for o in objects(scene) if o != main]


NUMBERS = {"a single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def _side(left: Scene, right: Scene, side: str) -> Scene:
    return {"left": left, "right": right}[side]


SENTENCES = {
    "Both images show a (.+)\\.": lambda a, b, w: _shows(a, w) and _shows(b, w),
    "Exactly one image contains a (.+)\\.": lambda a, b, w: [_shows(a, w), _shows(b, w)].count(True) == 1,
    "At least one of the images contains a (.+)\\.": lambda a, b, w: [_shows(a, w), _shows(b, w)].count(True) >= 1,
    "Neither image shows a (.+)\\.": lambda a, b, w: [_shows(a, w), _shows(b, w)].count(True) == 0,
    f"There is a ((?:{COLOURS}) shape|(?:(?:{COLOURS}) )?(?:{SHAPES})) in the (left|right) image\\.": (
        lambda a, b, w, s: _shows(_side(a, b, s), w)
    ),
    f"In the (left|right) image a shape is ({WHERE}) the biggest one\\.": lambda a, b, s, w: _around(_side(a, b, s), w),
    f"In the (left|right) image the biggest shape is ({WHERE}) a small one\\.": (
        lambda a, b, s, w: _beside(_side(a, b, s), w)
    ),
    f"The biggest shape in the (left|right) image is ({COLOURS})\\.": (
        lambda a, b, s, c: biggest(_side(a, b, s))["colour"] == c
    ),
    f"The biggest shape in the (left|right) image is a ({SHAPES})\\.": (
        lambda a, b, s, n: biggest(_side(a, b, s))["shape"] == n
    ),
    "The left image has more shapes than the right image\\.": lambda a, b: len(objects(a)) > len(objects(b)),
    "The right image has more shapes than the left image\\.": lambda a, b: len(objects(a)) < len(objects(b)),
    "The two images have the same number of shapes\\.": lambda a, b: len(objects(a)) == len(objects(b)),
    "The biggest shapes of the two images have the same color\\.": (
        lambda a, b: biggest(a)["colour"] == biggest(b)["colour"]
    ),
    "The biggest shapes of the two images are of the same kind\\.": (
        lambda a, b: biggest(a)["shape"] == biggest(b)["shape"]
    ),
    "Some color is found on a shape in both images\\.": (
        lambda a, b: any(x["colour"] == y["colour"] for x in objects(a) for y in objects(b))
    ),
    "Some kind of shape is found in both images\\.": (
        lambda a, b: any(x["shape"] == y["shape"] for x in objects(a) for y in objects(b))
    ),
    "There are (\\w+) shapes in the two images together\\.": (
        lambda a, b, n: len(objects(a)) + len(objects(b)) == NUMBERS[n]
    ),
    "There (?:is|are) (a single|two|three) shapes? in the (left|right) image\\.": (
        lambda a, b, n, s: len(objects(_side(a, b, s))) == NUMBERS[n]
    ),
    "Both images have a (\\w+) background\\.": lambda a, b, w: is_on(a, w) and is_on(b, w),
    "Exactly one image has a (\\w+) background\\.": lambda a, b, w: is_on(a, w) != is_on(b, w),
    "The (left|right) image has a (\\w+) background\\.": lambda a, b, s, w: is_on(_side(a, b, s), w),
}


# ---------------------------------------------------------------------------------------------- SNLI-VE


def label(text: str, scene: Scene) -> str:
    """The gold label of a hypothesis: neutral where something that it names is not there."""
    for pattern, rule in HYPOTHESES.items():
        found = _match(pattern, text)
        if found is None:
            continue
        shapes = [word for word in found if word in SHAPES.split("|")]
        subject = {"colour": found[0]} if found[0] in COLOURS.split("|") else None
        named = [subject] if subject else [{"shape": word} for word in shapes]
        there = [such(scene, **wanted) for wanted in named]
        assert all(len(found) <= 1 for found in there), "one of several is meant, and it is not said which"
        if not all(there):
            return "neutral"
        return "entailment" if rule(scene, *found) else "contradiction"
    raise AssertionError(f"no rule for {text!r}")


HYPOTHESES = {
    "The SHAPE is COLOUR\\.": lambda s, n, c: the(s, shape=n)["colour"] == c,
    "The COLOUR object is a SHAPE\\.": lambda s, c, n: the(s, colour=c)["shape"] == n,
    "The SHAPE is (big|small)\\.": lambda s, n, w: (the(s, shape=n)["r"] > 0.2) == (w == "big"),
    "The SHAPE is WHERE the SHAPE\\.": lambda s, a, w, b: stands(the(s, shape=a), the(s, shape=b), w),
    "The SHAPE is bigger than the SHAPE\\.": lambda s, a, b: bigger(the(s, shape=a), the(s, shape=b)),
    "The SHAPE and the SHAPE have the same color\\.": (
        lambda s, a, b: the(s, shape=a)["colour"] == the(s, shape=b)["colour"]
    ),
    "The SHAPE is on a (\\w+) background\\.": lambda s, n, w: is_on(s, w),
}


# --------------------------------------------------------------------------------------------- RefCOCO+

_SAME = {"violet": "purple", "moon": "crescent", "disc": "circle"}
_IDLE = {"the", "one", "shape", "thing", "that", "is", "a"}


def meant(text: str, scene: Scene) -> dict:
    """The one object that a phrase picks, word by word."""
    found = objects(scene)
    words = [_SAME.get(word, word) for word in text.split()]
    refused = words.index("not") if "not" in words else len(words)
    for place, word in enumerate(words):
        if word in ("biggest", "largest", "smallest"):
            ordered = sorted(found, key=lambda o: o["r"], reverse=word != "smallest")
            assert bigger(ordered[0], ordered[1]) == (word != "smallest")
            found = ordered[:1]
        elif word in ("big", "small"):
            found = [o for o in found if (o["r"] > 0.2) == (word == "big")]
        elif word in COLOURS.split("|") or word in SHAPES.split("|"):
            found = [o for o in found if (word in (o["colour"], o["shape"])) == (place < refused)]
        else:
            assert word in _IDLE or word == "not", f"no rule for {word!r} in {text!r}"
    (item,) = found
    return item


def names_held_out(text: str) -> bool:
    """Whether a held-out colour and shape are said of one thing."""
    text = " ".join(_SAME.get(word, word) for word in text.lower().split())
    said = re.findall(f"({COLOURS}) (?:object is an? |object an? )?({SHAPES})", text)
    said += [pair[::-1] for pair in re.findall(f"({SHAPES}) (?:that |is )*({COLOURS})", text)]
    return any(pair in HELD_OUT for pair in said)
