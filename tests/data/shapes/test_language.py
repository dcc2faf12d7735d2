from dataclasses import replace

import pytest

from vlbench.data.shapes.language import DETAILED, GRAMMARS, Plan, caption, captions, plans
from vlbench.data.shapes.scene import Background, Scene, SceneObject, sample_scene
from vlbench.data.shapes.world import CLASS_NAMES, COLOURS, COMBOS, HELD_OUT, LANGUAGES, SHAPES, Combo


def thing(name: str, size: str = "medium", x: float = 0.5, y: float = 0.5) -> SceneObject:
    colour, shape = name.split()
    combo = Combo(COLOURS.index(colour), SHAPES.index(shape))
    return SceneObject(combo, size, x, y, 0.2, 0.0, 1.0, 0, (1.0, 0.0, 0.0))


def scene(*objects: SceneObject, tone: str = "dark", pattern: str = "striped") -> Scene:
    return Scene("pairs", 0, objects, Background(tone, pattern, (0, 0, 0), (0, 0, 0), 0.0, 0.1), key=1)


EVERYTHING = Plan(sized=True, placed=True, relations=2, background=True)


FULL = {
    "en": "a large red circle at the top left, left of a small blue crescent and above a tiny green star, "
    "on a dark striped background",
    "de": "ein großer roter Kreis oben links, links von einer kleinen blauen Mondsichel und über einem winzigen "
    "grünen Stern, vor dunklem, gestreiftem Hintergrund",
    "fr": "un grand cercle rouge en haut à gauche, à gauche d'un petit croissant bleu et au-dessus d'une toute "
    "petite étoile verte, sur un fond sombre et rayé",
    "cs": "velký červený kruh vlevo nahoře, vlevo od malého modrého půlměsíce a nad maličkou zelenou hvězdou, "
    "na tmavém pruhovaném pozadí",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_full_caption_is_grammatical(language):
    picture = scene(
        thing("red circle", "large", 0.3, 0.3),
        thing("blue crescent", "small", 0.8, 0.3),
        thing("green star", "tiny", 0.3, 0.8),
    )
    assert caption(picture, EVERYTHING, language) == FULL[language]


@pytest.mark.parametrize(
    "language,name,case,expected",
    [
        ("de", "yellow heart", "nominative", "ein großes gelbes Herz"),
        ("de", "purple crescent", "nominative", "eine große violette Mondsichel"),
        ("de", "brown star", "dative", "einem großen braunen Stern"),
        ("de", "blue crescent", "dative", "einer großen blauen Mondsichel"),
        ("fr", "purple star", "nominative", "une grande étoile violette"),
        ("fr", "green cross", "nominative", "une grande croix verte"),
        ("fr", "brown star", "nominative", "une grande étoile brune"),
        ("fr", "yellow heart", "nominative", "un grand cœur jaune"),
        ("cs", "yellow star", "nominative", "velká žlutá hvězda"),
        ("cs", "brown heart", "nominative", "velké hnědé srdce"),
        ("cs", "purple heart", "genitive", "velkého fialového srdce"),
        ("cs", "red star", "genitive", "velké červené hvězdy"),
        ("cs", "green square", "instrumental", "velkým zeleným čtvercem"),
        ("cs", "blue star", "instrumental", "velkou modrou hvězdou"),
        ("cs", "blue cross", "genitive", "velkého modrého kříže"),
    ],
)
def test_noun_phrases_agree(language, name, case, expected):
    assert GRAMMARS[language].noun_phrase(thing(name, "large"), case, sized=True) == expected


@pytest.mark.parametrize(
    "language,expected",
    [
        ("en", "a red heart, a blue star and a brown cross"),
        ("de", "ein rotes Herz, ein blauer Stern und ein braunes Kreuz"),
        ("fr", "un cœur rouge, une étoile bleue et une croix brune"),
        ("cs", "červené srdce, modrá hvězda a hnědý kříž"),
    ],
)
def test_lists_stand_in_the_nominative(language, expected):
    picture = scene(thing("red heart"), thing("blue star"), thing("brown cross"))
    assert caption(picture, Plan(listed=True), language) == expected


@pytest.mark.parametrize(
    "pattern,expected",
    [
        ("plain", ("on a light background", "vor hellem Hintergrund", "sur un fond clair", "na světlém pozadí")),
        (
            "checkered",
            (
                "on a light checkered background",
                "vor hellem, kariertem Hintergrund",
                "sur un fond clair à carreaux",
                "na světlém kostkovaném pozadí",
            ),
        ),
    ],
)
def test_backgrounds(pattern, expected):
    picture = scene(thing("red heart"), tone="light", pattern=pattern)
    told = tuple(caption(picture, Plan(background=True), language) for language in LANGUAGES)
    assert all(text.endswith(words) for text, words in zip(told, expected, strict=True))


def test_medium_size_is_left_unsaid():
    assert caption(scene(thing("red heart")), Plan(sized=True), "de") == "ein rotes Herz"


def test_every_shape_and_colour_has_a_word_in_every_language():
    for language in LANGUAGES:
        phrases = {GRAMMARS[language].noun_phrase(thing(combo.name), sized=False) for combo in COMBOS}
        assert len(phrases) == len(COMBOS)


def test_captions_lead_with_the_main_object():
    for index in range(300):
        picture = sample_scene(0, "pairs", index)
        told = captions(picture)
        assert {language: len(texts) for language, texts in told.items()} == dict.fromkeys(LANGUAGES, 5)
        assert all(text.split(picture.main.name)[0] in {"a ", "a large "} for text in told["en"])
        for language, texts in told.items():
            leads = tuple(GRAMMARS[language].noun_phrase(picture.main, sized=sized) for sized in (False, True))
            assert texts[0] == leads[0]
            assert all(text.startswith(leads) for text in texts)


def test_captions_hold_no_held_out_combination_in_any_language_or_case():
    forbidden = {language: set() for language in LANGUAGES}
    for language, grammar in GRAMMARS.items():
        cases = {"de": ("nominative", "dative"), "cs": ("nominative", "genitive", "instrumental")}
        for combo in HELD_OUT:
            for case in cases.get(language, ("nominative",)):
                phrase = grammar.noun_phrase(thing(combo.name), case, sized=False)
                forbidden[language].add(phrase if language == "cs" else phrase.split(" ", 1)[1])
    assert forbidden["en"] == {combo.name for combo in HELD_OUT}
    for stream in ("pairs", "coco/train", "retrieval"):
        for index in range(400):
            for language, texts in captions(sample_scene(0, stream, index), detailed=stream == "retrieval").items():
                assert not any(phrase in text for text in texts for phrase in forbidden[language])


def test_planned_captions_say_more_and_more():
    told = captions(sample_scene(0, "retrieval", 0), detailed=True)
    assert plans(sample_scene(0, "retrieval", 0), detailed=True) == DETAILED
    assert len(told["en"][-1]) == max(map(len, told["en"]))


def test_choice_of_captions_follows_the_scene_alone():
    picture = next(s for s in (sample_scene(0, "pairs", i) for i in range(50)) if s.others)
    assert captions(picture) == captions(picture)
    assert len({plans(replace(picture, key=key)) for key in range(20)}) > 5


def test_class_names_are_english_phrases():
    assert "red square" in CLASS_NAMES
    assert all(GRAMMARS["en"].noun_phrase(thing(name), sized=False) == f"a {name}" for name in CLASS_NAMES)
