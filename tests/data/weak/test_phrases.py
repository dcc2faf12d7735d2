from __future__ import annotations

import re
import sys
import types
from itertools import pairwise

import pytest

from vlbench.core.errors import UserError
from vlbench.data.shapes.language import DETAILED, RELATED, TOGETHER, caption
from vlbench.data.shapes.scene import sample_scene
from vlbench.data.shapes.world import COLOURS, SHAPES
from vlbench.data.weak import phrases
from vlbench.data.weak.phrases import TagChunker, load_chunker

COCO = ["man", "woman", "dog", "cat", "horse", "pizza", "table", "traffic light", "fire hydrant", "street", "bench"]
COCO += ["bus", "person", "child", "baseball bat", "hot dog", "umbrella", "skateboard", "orange", "cup", "wine glass"]
COCO += ["teddy bear", "sheep", "knife", "berry", "tomato", "sign", "sun"]


def found(chunker, text):
    return [text[a:b] for a, b in chunker.spans([text])[0]]


def test_every_noun_phrase_of_a_shape_is_found_in_every_kind_of_caption():
    """The grammar's own phrases, article, size, colour and shape, and nothing else."""
    seen = [sample_scene(3, "pairs", index) for index in range(60)]
    tags = sorted({item.name for scene in seen for item in scene.objects})
    chunker = TagChunker(tags)
    phrase = re.compile(rf"a (?:(?:large|small|tiny) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})")
    checked = 0
    for scene in seen:
        for plan in (*TOGETHER, *RELATED, *DETAILED):
            text = caption(scene, plan, "en")
            spans = chunker.spans([text])[0]
            assert list(spans) == [match.span() for match in phrase.finditer(text)], text
            checked += len(spans)
    assert checked > 500


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A man riding a horse on the street.", ["A man", "a horse", "the street"]),
        ("Two large brown dogs, a cat and three women", ["Two large brown dogs", "a cat", "three women"]),
        (
            "an extremely muddy dog sleeps under the old wooden bench",
            ["an extremely muddy dog", "the old wooden bench"],
        ),
        ("the cat chasing dogs near a traffic light", ["the cat", "dogs", "a traffic light"]),
        ("a sleeping dog", ["a sleeping dog"]),
        ("the dogs eating their pizza", ["the dogs", "their pizza"]),
        ("People waiting at a bus stop", ["People", "a bus"]),
        ("a red fire hydrant on a city street", ["a red fire hydrant", "a city street"]),
        ("An orange, half eaten, next to an orange cup", ["An orange", "an orange cup"]),
        ("an orange plastic cup, an orange", ["an orange plastic cup", "an orange"]),
        ("an orange left of the cup", ["an orange", "the cup"]),
        ("A hot dog on a table with two wine glasses", ["A hot dog", "a table", "two wine glasses"]),
        ("his dog's umbrella and the children's skateboards", ["his dog's umbrella", "the children's skateboards"]),
        ("street sign over the street", ["street sign", "the street"]),
        ("knives, berries and tomatoes", ["knives", "berries", "tomatoes"]),
        ("no such thing here", []),
        ("", []),
        ("DOG", ["DOG"]),
        ("a dog!a cat", ["a dog", "a cat"]),
    ],
)
def test_tag_chunker_on_captions_of_photographs(text, expected):
    assert found(TagChunker(COCO), text) == expected


def test_spans_never_overlap_and_read_left_to_right():
    text = "a dog cat the man a a dog the the table bus sign person person"
    spans = TagChunker(COCO).spans([text])[0]
    assert all(a < b for a, b in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_a_longer_tag_vocabulary_only_adds_heads():
    assert found(TagChunker(["dog"]), "a dog on a bench") == ["a dog"]
    assert found(TagChunker(["dog", "bench"]), "a dog on a bench") == ["a dog", "a bench"]
    assert found(TagChunker([]), "a dog on a bench") == []
    assert found(TagChunker(["", "the", "in"]), "the dog in the bench") == []


def test_auto_takes_the_rules_without_spacy_and_spacy_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert load_chunker("auto", COCO).name == "tags v1"
    with pytest.raises(UserError, match="--chunker spacy needs spaCy and its model") as caught:
        load_chunker("spacy", COCO)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'spacy'"):
        load_chunker("spcay", COCO)


def test_spacy_chunks_come_with_their_character_spans(monkeypatch):
    """What is asked of spaCy: its model by name, ``pipe``, and the character offsets of ``noun_chunks``."""

    class Model:
        meta = {"version": "3.8.0"}  # noqa: RUF012

        def pipe(self, texts, batch_size):
            for text in texts:
                chunks = [
                    types.SimpleNamespace(start_char=m.start(), end_char=m.end()) for m in re.finditer("a b", text)
                ]
                yield types.SimpleNamespace(noun_chunks=iter(chunks))

    asked = []
    fake = types.SimpleNamespace(load=lambda name, exclude: asked.append(name) or Model())
    monkeypatch.setitem(sys.modules, "spacy", fake)
    chunker = load_chunker("auto", COCO)
    assert chunker.name == "spacy en_core_web_sm 3.8.0"
    assert asked == [phrases.SPACY_MODEL]
    assert chunker.spans(["a b c a b", "none"]) == [((0, 3), (6, 9)), ()]


# Words with their part of speech, dependency and head, so that spaCy's own noun_chunks runs without a trained model.
PARSED = {
    "A man is riding two  horses on the street.": (
        "A/DET/det/1 man/NOUN/nsubj/3 is/AUX/aux/3 riding/VERB/ROOT/3 two/NUM/nummod/6 /SPACE/dep/4 horses/NOUN/dobj/3 "
        "on/ADP/prep/3 the/DET/det/9 street/NOUN/pobj/7 ./PUNCT/punct/3"
    ),
    "They see a red circle and a small blue square": (
        "They/PRON/nsubj/1 see/VERB/ROOT/1 a/DET/det/4 red/ADJ/amod/4 circle/NOUN/dobj/1 and/CCONJ/cc/4 "
        "a/DET/det/9 small/ADJ/amod/9 blue/ADJ/amod/9 square/NOUN/conj/4"
    ),
    "Café’s dog sleeps. The cat too!": (
        "Café/PROPN/poss/2 ’s/PART/case/0 dog/NOUN/nsubj/3 sleeps/VERB/ROOT/3 ./PUNCT/punct/3 "
        "The/DET/det/6 cat/NOUN/ROOT/6 too/ADV/advmod/6 !/PUNCT/punct/6"
    ),
}


@pytest.fixture
def parsed_by_hand(tmp_path, monkeypatch):
    """A saved pipeline in the model's place, of spaCy's own classes; its entity tagger and lemmatizer must not run."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'vlbench[muvla]'")

    def parse(doc):
        rows = [word.rsplit("/", 3) for word in PARSED.get(doc.text, "").split(" ") if word]
        columns = {"pos": [row[1] for row in rows], "deps": [row[2] for row in rows]}
        columns["heads"] = [int(row[3]) for row in rows]
        words, spaces = [token.text for token in doc], [bool(token.whitespace_) for token in doc]
        return spacy.tokens.Doc(doc.vocab, words=words, spaces=spaces, **columns)

    def never(doc):
        raise AssertionError("not needed for noun phrases")

    spacy.Language.component("vlbench_parsed_by_hand", func=parse)
    spacy.Language.component("vlbench_never", func=never)
    nlp = spacy.blank("en", meta={"version": "3.8.0"})
    nlp.add_pipe("vlbench_parsed_by_hand")
    for name in ("ner", "lemmatizer"):
        nlp.add_pipe("vlbench_never", name=name)
    nlp.to_disk(tmp_path / "model")
    monkeypatch.setattr(phrases, "SPACY_MODEL", str(tmp_path / "model"))
    return tmp_path / "model"


def test_spacys_own_noun_chunks_of_given_parses(parsed_by_hand):
    chunker = load_chunker("auto", COCO)
    assert chunker.name == f"spacy {parsed_by_hand} 3.8.0"
    texts = [*PARSED, ""]
    chunks = [[text[a:b] for a, b in spans] for text, spans in zip(texts, chunker.spans(texts), strict=True)]
    assert chunks == [
        ["A man", "two  horses", "the street"],
        ["They", "a red circle", "a small blue square"],
        ["Café’s dog", "The cat"],
        [],
    ]
    # Where phrases have a determiner or a number the rules agree; they find no pronoun.
    rules = TagChunker(["man", "horse", "street", "red circle", "blue square", "cat"])
    assert [found(rules, text) for text in texts] == [chunks[0], chunks[1][1:], chunks[2][1:], []]


def test_a_model_of_another_spacy_is_one_line_and_auto_goes_on_without_it(parsed_by_hand):
    config = parsed_by_hand / "config.cfg"
    config.write_text(config.read_text().replace("vlbench_parsed_by_hand", "a_factory_of_another_version"))
    with pytest.raises(UserError, match="--chunker spacy needs spaCy and its model") as caught:
        load_chunker("spacy", COCO)
    assert "a_factory_of_another_version" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_chunker("auto", COCO).name == "tags v1"


def test_the_english_model_itself():
    """The noun phrases that spaCy's documentation shows, and those of a plain caption."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'vlbench[muvla]'")
    if not spacy.util.is_package(phrases.SPACY_MODEL):
        pytest.skip(f"spaCy's English model is not installed: python -m spacy download {phrases.SPACY_MODEL}")
    chunker = load_chunker("auto", COCO)
    assert chunker.name.startswith(f"spacy {phrases.SPACY_MODEL}")
    documented = "Autonomous cars shift insurance liability toward manufacturers"
    assert found(chunker, documented) == ["Autonomous cars", "insurance liability", "manufacturers"]
    assert found(chunker, "A man is riding a horse on the street.") == ["A man", "a horse", "the street"]
