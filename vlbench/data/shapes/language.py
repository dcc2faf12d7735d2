"""What is said of a scene, in English, German, French and Czech.

Every caption leads with the main object and is made from one plan (which facts, in which order) that each language
words for itself. Inflection is by table: a noun phrase is asked for by its grammatical role, and the relational phrases
were chosen so that each governs one case (German: the dative throughout; Czech: the genitive or the instrumental).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np

from vlbench.data.shapes.scene import Background, Scene, SceneObject
from vlbench.data.shapes.world import Relation

Case: TypeAlias = Literal["nominative", "dative", "genitive", "instrumental"]
CAPTIONS_PER_IMAGE = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """Which facts a caption tells. ``relations`` is how many neighbours the main object is placed against."""

    sized: bool = False
    placed: bool = False
    relations: int = 0
    listed: bool = False
    background: bool = False


BRIEF = Plan()
ALONE = (Plan(sized=True), Plan(background=True), Plan(placed=True), Plan(sized=True, placed=True, background=True))
RELATED = (
    Plan(relations=2, sized=True, placed=True),
    Plan(relations=2, sized=True, background=True),
    Plan(relations=1, sized=True, placed=True, background=True),
    Plan(relations=2, placed=True, background=True),
    Plan(relations=2, sized=True, placed=True, background=True),
)
"""Plans that name a neighbour, where it is, and more: with distinct neighbours, no two images share a caption."""
DETAILED = (
    Plan(relations=2, sized=True, background=True),
    Plan(listed=True, sized=True, background=True),
    Plan(relations=2, sized=True, placed=True, background=True),
)
"""What retrieval asks with: every object is named with its size, and what is behind them."""
TOGETHER = (
    Plan(sized=True, background=True),
    Plan(placed=True),
    Plan(listed=True),
    Plan(relations=1),
    Plan(relations=2, sized=True),
    *RELATED,
)


class Language(Protocol):
    """How one language words the facts."""

    conjunction: str

    def noun_phrase(self, item: SceneObject, case: Case = "nominative", *, sized: bool) -> str:
        """The object with its indefinite article, colour and, where asked, size."""

    def related(self, relation: Relation, other: SceneObject, *, sized: bool) -> str:
        """``left of a blue square``."""

    def placed(self, place: tuple[int, int]) -> str:
        """Where in the picture: ``at the top left``."""

    def behind(self, background: Background) -> str:
        """``on a dark striped background``."""


class English:
    """No agreement to mind, and no word that would need "an"."""

    conjunction = "and"
    _PLACES = (
        ("at the top left", "at the top", "at the top right"),
        ("on the left", "in the middle", "on the right"),
        ("at the bottom left", "at the bottom", "at the bottom right"),
    )

    def noun_phrase(self, item: SceneObject, case: Case = "nominative", *, sized: bool) -> str:
        """English has one form for all cases."""
        size = f"{item.size} " if sized and item.size != "medium" else ""
        return f"a {size}{item.name}"

    def related(self, relation: Relation, other: SceneObject, *, sized: bool) -> str:
        """Relations are named in English already."""
        return f"{relation} {self.noun_phrase(other, sized=sized)}"

    def placed(self, place: tuple[int, int]) -> str:
        """By row and column."""
        return self._PLACES[place[0]][place[1]]

    def behind(self, background: Background) -> str:
        """Tone first, then the pattern if there is one."""
        pattern = "" if background.pattern == "plain" else f"{background.pattern} "
        return f"on a {background.tone} {pattern}background"


class German:
    """Adjectives after "ein" take the mixed declension; all our prepositions of place govern the dative."""

    conjunction = "und"
    _NOUNS: ClassVar = {
        "circle": ("m", "Kreis"),
        "square": ("n", "Quadrat"),
        "triangle": ("n", "Dreieck"),
        "hexagon": ("n", "Sechseck"),
        "cross": ("n", "Kreuz"),
        "star": ("m", "Stern"),
        "heart": ("n", "Herz"),
        "crescent": ("f", "Mondsichel"),
    }
    _COLOURS: ClassVar = {
        "red": "rot",
        "yellow": "gelb",
        "green": "grün",
        "blue": "blau",
        "purple": "violett",
        "brown": "braun",
    }
    _SIZES: ClassVar = {"large": "groß", "small": "klein", "tiny": "winzig"}
    _ENDINGS: ClassVar = {"nominative": {"m": "er", "f": "e", "n": "es"}, "dative": {"m": "en", "f": "en", "n": "en"}}
    _ARTICLES: ClassVar = {
        "nominative": {"m": "ein", "f": "eine", "n": "ein"},
        "dative": {"m": "einem", "f": "einer", "n": "einem"},
    }
    _RELATIONS: ClassVar = {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"}
    _PLACES = (
        ("oben links", "oben", "oben rechts"),
        ("auf der linken Seite", "in der Mitte", "auf der rechten Seite"),
        ("unten links", "unten", "unten rechts"),
    )
    _TONES: ClassVar = {"dark": "dunklem", "light": "hellem"}  # strong declension, dative: there is no article
    _PATTERNS: ClassVar = {"striped": "gestreiftem", "checkered": "kariertem", "spotted": "gepunktetem"}

    def noun_phrase(self, item: SceneObject, case: Case = "nominative", *, sized: bool) -> str:
        """``ein großer roter Kreis``, ``einer kleinen blauen Mondsichel``."""
        gender, noun = self._NOUNS[item.combo.shape]
        ending = self._ENDINGS[case][gender]
        words = [self._SIZES[item.size]] if sized and item.size in self._SIZES else []
        words.append(self._COLOURS[item.combo.colour])
        return " ".join([self._ARTICLES[case][gender], *(word + ending for word in words), noun])

    def related(self, relation: Relation, other: SceneObject, *, sized: bool) -> str:
        """``links von einem blauen Quadrat``."""
        return f"{self._RELATIONS[relation]} {self.noun_phrase(other, 'dative', sized=sized)}"

    def placed(self, place: tuple[int, int]) -> str:
        """By row and column."""
        return self._PLACES[place[0]][place[1]]

    def behind(self, background: Background) -> str:
        """``vor dunklem, gestreiftem Hintergrund``."""
        words = [self._TONES[background.tone]]
        if background.pattern != "plain":
            words.append(self._PATTERNS[background.pattern])
        return f"vor {', '.join(words)} Hintergrund"


class French:
    """Size before the noun, colour after it, both in its gender; "brun" and not "marron", which does not agree."""

    conjunction = "et"
    _NOUNS: ClassVar = {
        "circle": ("m", "cercle"),
        "square": ("m", "carré"),
        "triangle": ("m", "triangle"),
        "hexagon": ("m", "hexagone"),
        "cross": ("f", "croix"),
        "star": ("f", "étoile"),
        "heart": ("m", "cœur"),
        "crescent": ("m", "croissant"),
    }
    _COLOURS: ClassVar = {
        "red": ("rouge", "rouge"),
        "yellow": ("jaune", "jaune"),
        "green": ("vert", "verte"),
        "blue": ("bleu", "bleue"),
        "purple": ("violet", "violette"),
        "brown": ("brun", "brune"),
    }
    _SIZES: ClassVar = {
        "large": ("grand", "grande"),
        "small": ("petit", "petite"),
        "tiny": ("tout petit", "toute petite"),
    }
    _RELATIONS: ClassVar = {
        "left of": "à gauche d'",
        "right of": "à droite d'",
        "above": "au-dessus d'",
        "below": "au-dessous d'",
    }
    _PLACES = (
        ("en haut à gauche", "en haut", "en haut à droite"),
        ("sur le côté gauche", "au milieu", "sur le côté droit"),
        ("en bas à gauche", "en bas", "en bas à droite"),
    )
    _TONES: ClassVar = {"dark": "sombre", "light": "clair"}
    _PATTERNS: ClassVar = {"striped": " et rayé", "checkered": " à carreaux", "spotted": " à pois"}

    def noun_phrase(self, item: SceneObject, case: Case = "nominative", *, sized: bool) -> str:
        """``un grand cercle rouge``, ``une toute petite étoile verte``. French has one form for all cases."""
        gender, noun = self._NOUNS[item.combo.shape]
        form = 1 if gender == "f" else 0
        words = ["une" if form else "un"]
        if sized and item.size in self._SIZES:
            words.append(self._SIZES[item.size][form])
        return " ".join([*words, noun, self._COLOURS[item.combo.colour][form]])

    def related(self, relation: Relation, other: SceneObject, *, sized: bool) -> str:
        """``à gauche d'un carré bleu``."""
        return self._RELATIONS[relation] + self.noun_phrase(other, sized=sized)

    def placed(self, place: tuple[int, int]) -> str:
        """By row and column."""
        return self._PLACES[place[0]][place[1]]

    def behind(self, background: Background) -> str:
        """``sur un fond sombre et rayé``."""
        pattern = "" if background.pattern == "plain" else self._PATTERNS[background.pattern]
        return f"sur un fond {self._TONES[background.tone]}{pattern}"


class Czech:
    """Hard adjectives and nouns by gender and case; "od" governs the genitive, "nad" and "pod" the instrumental."""

    conjunction = "a"
    _NOUNS: ClassVar = {
        "circle": ("m", "kruh", "kruhu", "kruhem"),
        "square": ("m", "čtverec", "čtverce", "čtvercem"),
        "triangle": ("m", "trojúhelník", "trojúhelníku", "trojúhelníkem"),
        "hexagon": ("m", "šestiúhelník", "šestiúhelníku", "šestiúhelníkem"),
        "cross": ("m", "kříž", "kříže", "křížem"),
        "star": ("f", "hvězda", "hvězdy", "hvězdou"),
        "heart": ("n", "srdce", "srdce", "srdcem"),
        "crescent": ("m", "půlměsíc", "půlměsíce", "půlměsícem"),
    }
    _CASES = ("nominative", "genitive", "instrumental")
    _COLOURS: ClassVar = {
        "red": "červen",
        "yellow": "žlut",
        "green": "zelen",
        "blue": "modr",
        "purple": "fialov",
        "brown": "hněd",
    }
    _SIZES: ClassVar = {"large": "velk", "small": "mal", "tiny": "maličk"}
    _ENDINGS: ClassVar = {
        "nominative": {"m": "ý", "f": "á", "n": "é"},
        "genitive": {"m": "ého", "f": "é", "n": "ého"},
        "instrumental": {"m": "ým", "f": "ou", "n": "ým"},
    }
    _RELATIONS: ClassVar[dict[str, tuple[str, Case]]] = {
        "left of": ("vlevo od", "genitive"),
        "right of": ("vpravo od", "genitive"),
        "above": ("nad", "instrumental"),
        "below": ("pod", "instrumental"),
    }
    _PLACES = (
        ("vlevo nahoře", "nahoře", "vpravo nahoře"),
        ("na levé straně", "uprostřed", "na pravé straně"),
        ("vlevo dole", "dole", "vpravo dole"),
    )
    _TONES: ClassVar = {"dark": "tmavém", "light": "světlém"}  # locative, neuter
    _PATTERNS: ClassVar = {"striped": "pruhovaném", "checkered": "kostkovaném", "spotted": "puntíkovaném"}

    def noun_phrase(self, item: SceneObject, case: Case = "nominative", *, sized: bool) -> str:
        """``velký červený kruh``, ``malé modré hvězdy``, ``zeleným srdcem``. Czech has no article."""
        gender, *forms = self._NOUNS[item.combo.shape]
        ending = self._ENDINGS[case][gender]
        words = [self._SIZES[item.size]] if sized and item.size in self._SIZES else []
        words.append(self._COLOURS[item.combo.colour])
        return " ".join([*(word + ending for word in words), forms[self._CASES.index(case)]])

    def related(self, relation: Relation, other: SceneObject, *, sized: bool) -> str:
        """``vlevo od modrého čtverce``, ``nad modrým čtvercem``."""
        words, case = self._RELATIONS[relation]
        return f"{words} {self.noun_phrase(other, case, sized=sized)}"

    def placed(self, place: tuple[int, int]) -> str:
        """By row and column."""
        return self._PLACES[place[0]][place[1]]

    def behind(self, background: Background) -> str:
        """``na tmavém pruhovaném pozadí``."""
        pattern = "" if background.pattern == "plain" else f"{self._PATTERNS[background.pattern]} "
        return f"na {self._TONES[background.tone]} {pattern}pozadí"


GRAMMARS: dict[str, Language] = {"en": English(), "de": German(), "fr": French(), "cs": Czech()}


def caption(scene: Scene, plan: Plan, language: str) -> str:
    """One caption: the main object, then the facts that the plan names and the scene has."""
    grammar = GRAMMARS[language]
    text = grammar.noun_phrase(scene.main, sized=plan.sized)
    if plan.listed and scene.others:
        text = _enumerated(grammar, [text, *(grammar.noun_phrase(o, sized=plan.sized) for o in scene.others)])
        return f"{text} {grammar.behind(scene.background)}" if plan.background else text
    if plan.placed:
        text += f" {grammar.placed(scene.place())}"
    neighbours = scene.others[: plan.relations]
    if neighbours:
        phrases = [
            grammar.related(scene.relation(0, place), other, sized=plan.sized)
            for place, other in enumerate(neighbours, start=1)
        ]
        text += ("," if plan.placed else "") + " " + f" {grammar.conjunction} ".join(phrases)
    if plan.background:
        text += ("," if neighbours else "") + " " + grammar.behind(scene.background)
    return text


def plans(scene: Scene, *, detailed: bool = False) -> tuple[Plan, ...]:
    """The plans of a scene's five captions, short to long; ``detailed`` keeps to those that name a neighbour."""
    if not scene.others:
        return (BRIEF, *ALONE)
    if detailed:
        return DETAILED
    rng = np.random.default_rng([scene.key, 2])
    chosen = sorted(rng.choice(len(TOGETHER), CAPTIONS_PER_IMAGE - 1, replace=False).tolist())
    return (BRIEF, *(TOGETHER[place] for place in chosen))


def captions(scene: Scene, *, detailed: bool = False) -> dict[str, list[str]]:
    """Five captions in each language; the same place in each list says the same."""
    chosen = plans(scene, detailed=detailed)
    return {language: [caption(scene, plan, language) for plan in chosen] for language in GRAMMARS}


def _enumerated(grammar: Language, phrases: Sequence[str]) -> str:
    return f"{', '.join(phrases[:-1])} {grammar.conjunction} {phrases[-1]}"
