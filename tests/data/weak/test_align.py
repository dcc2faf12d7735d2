from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from tests.data.weak.fakes import HashEncoder, TaggedSource
from vlbench.core.errors import BadExample, RunError, UserError
from vlbench.data.stream import Mixture
from vlbench.data.weak import align
from vlbench.data.weak.align import AlignSettings, weakly_align
from vlbench.data.weak.corpus import open_corpus
from vlbench.data.weak.phrases import TagChunker

POOL = [
    "a red ball on the grass",
    "the dog runs",
    "a dog and a red ball",
    "two cats asleep",
    "a cat beside a dog",
    "nothing of note",
    "A  DOG and a red ball",  # merged with the third
]
IMAGES = {
    "one": (["dog", "ball", "dog"], ["a dog and a red ball", "a dog plays"]),
    "two": (["cat"], ["two cats asleep"]),
    "three": ([], ["an empty field"]),
    "four": (["zebra"], ["stripes everywhere"]),
}


def made(tmp_path, images=IMAGES, pool=POOL, *, encoder=None, captions=True, name="weak", **settings):
    source = TaggedSource(images, captions=captions)
    return weakly_align(
        source, pool, out=tmp_path / name, settings=AlignSettings(chunker="tags", **settings), encoder=encoder
    )


def tfidf_by_hand(pool, query):
    """Cosines of smoothed tf-idf, in float64, from the definition."""
    words = lambda text: re.findall(r"\b\w\w+\b", text.lower())  # noqa: E731
    df = Counter(word for text in pool for word in set(words(text)))
    idf = {word: math.log((1 + len(pool)) / (1 + n)) + 1 for word, n in df.items()}

    def vector(text):
        counts = Counter(word for word in words(text) if word in idf)
        full = {word: n * idf[word] for word, n in counts.items()}
        norm = math.sqrt(sum(x * x for x in full.values())) or 1.0
        return {word: x / norm for word, x in full.items()}

    asked = vector(query)
    return [sum(asked.get(word, 0.0) * x for word, x in vector(text).items()) for text in pool]


def test_tfidf_retrieval_is_the_definition(tmp_path):
    corpus = made(tmp_path, k=3)
    merged = POOL[:6]
    for image_id, query in (("one", "dog ball"), ("two", "cat")):
        scores = tfidf_by_hand(merged, query)
        best = [j for j in sorted(range(6), key=lambda j: (-scores[j], j))[:3] if scores[j] > 0]
        assert [aligned.text for aligned in corpus[image_id]] == [merged[j] for j in best]
        np.testing.assert_allclose([a.score for a in corpus[image_id]], [scores[j] for j in best], rtol=1e-6)
    assert corpus["one"][0].text == "a dog and a red ball"
    assert corpus["three"] == corpus["four"] == ()
    assert corpus.ids() == list(IMAGES)
    assert corpus.tags("one") == ("dog", "ball", "dog")


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_dense_retrieval_is_brute_force_over_the_pool(tmp_path, metric):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    pool = [" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(300)]
    images = {f"i{i}": (list(rng.choice(words, rng.integers(1, 4))), ()) for i in range(40)}
    encoder = HashEncoder()
    corpus = made(
        tmp_path,
        images,
        pool,
        encoder=encoder,
        captions=False,
        metric=metric,
        k=5,
        block=64,
        queries=7,
        backend="numpy",
    )
    merged = list(dict.fromkeys(pool))
    vectors = encoder.encode(merged).astype(np.float64)
    for image_id, (tags, _) in images.items():
        query = encoder.encode([" ".join(dict.fromkeys(tags))]).astype(np.float64)[0]
        if metric == "cosine":
            scores = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        else:
            scores = -((vectors - query) ** 2).sum(axis=1)
        best = np.argsort(-scores)[:5]
        np.testing.assert_allclose([a.score for a in corpus[image_id]], scores[best], rtol=1e-5, atol=1e-6)
        distinct = len(set(np.round(scores[best], 6))) == 5
        assert not distinct or [a.text for a in corpus[image_id]] == [merged[j] for j in best]


def test_links_join_each_region_to_its_nearest_phrase(tmp_path):
    encoder = HashEncoder()
    corpus = made(tmp_path, encoder=encoder, k=6)
    text = "a dog and a red ball"
    aligned = next(aligned for aligned in corpus["one"] if aligned.text == text)
    phrases = ["a dog", "a red ball"]
    assert [(link.region, link.phrase) for link in aligned.links] == [(0, "a dog"), (1, "a red ball"), (2, "a dog")]
    for link in aligned.links:
        assert text[link.start : link.end] == link.phrase
        tag, *others = encoder.encode([corpus.tags("one")[link.region], *phrases]).astype(np.float64)
        cosines = [tag @ other / np.linalg.norm(tag) / np.linalg.norm(other) for other in others]
        assert link.score == pytest.approx(max(cosines), rel=1e-5)
        assert phrases[int(np.argmax(cosines))] == link.phrase
    strict = made(tmp_path, encoder=encoder, k=6, min_link=0.65, name="strict")
    kept = [link for aligned in strict["one"] for link in aligned.links]
    assert kept == [link for aligned in corpus["one"] for link in aligned.links if link.score >= 0.65]
    assert corpus["three"] == ()  # without a tag there is no question
    assert 0 < len(kept) < sum(len(aligned.links) for aligned in corpus["one"])


def test_own_captions_are_left_out_in_any_spelling(tmp_path):
    found = made(tmp_path, k=2)
    assert found["one"][0].text == "a dog and a red ball"
    assert found.made_of["counts"]["own_found"] == pytest.approx(1 / 4)
    corpus = made(tmp_path, k=2, exclude_own=True, name="without")
    for image_id, (_, own) in IMAGES.items():
        assert not {aligned.text for aligned in corpus[image_id]} & set(own)
    assert len(corpus["one"]) == 2  # two others take the places
    assert corpus.made_of["counts"]["own_found"] == 0


def test_aligned_shares_are_nested_and_put_an_own_caption_first(tmp_path):
    images = {f"i{i}": (["dog"], [f"caption {i} here", f"another {i}"]) for i in range(60)}
    pool = [text for _, own in images.values() for text in own] + POOL
    shares = {}
    for share in (0.0, 0.3, 0.7, 1.0):
        corpus = made(tmp_path, images, pool, k=3, aligned=share, name=f"{share}")
        first = {name for name in images if corpus[name][0].text in images[name][1]}
        assert all(aligned.text not in images[name][1] for name in images for aligned in corpus[name][1:])
        assert all(len(corpus[name]) == 3 for name in images if name in first)
        shares[share] = first
    assert shares[0.0] == set()
    assert shares[1.0] == set(images)
    assert shares[0.3] < shares[0.7]
    assert 8 <= len(shares[0.3]) <= 28
    other = made(tmp_path, images, pool, k=3, aligned=0.3, seed=1, name="other seed")
    assert {name for name in images if other[name][0].text in images[name][1]} != shares[0.3]


def test_an_own_caption_that_is_put_first_has_its_own_score(tmp_path):
    encoder = HashEncoder()
    corpus = made(tmp_path, encoder=encoder, aligned=1.0, k=2)
    query, own = encoder.encode(["cat", "two cats asleep"]).astype(np.float64)
    assert corpus["two"][0].text == "two cats asleep"
    assert corpus["two"][0].score == pytest.approx(query @ own / np.linalg.norm(query) / np.linalg.norm(own), rel=1e-5)
    pure = made(tmp_path, k=2, aligned=1.0, name="sparse")
    assert pure["one"][0].text in IMAGES["one"][1]
    assert pure["four"] == (pure["four"][0],)  # nothing else was found for a zebra
    assert pure["four"][0].score == 0


def test_sorted_tags_ask_one_question_of_the_same_objects(tmp_path):
    class Ordered(HashEncoder):
        def encode(self, texts):  # the order of words counts
            return np.stack([super(Ordered, self).encode([text])[0] + self.word("start " + text[:3]) for text in texts])

    images = {"ab": (["apple", "bear"], ()), "ba": (["bear", "apple"], ())}
    given = made(tmp_path, images, encoder=Ordered(), k=2, captions=False)
    alike = made(tmp_path, images, encoder=Ordered(), k=2, captions=False, order="sorted", name="sorted")
    assert given["ab"][0].score != given["ba"][0].score
    assert [a.score for a in alike["ab"]] == [a.score for a in alike["ba"]]
    assert alike.tags("ba") == ("bear", "apple")


def test_counts_are_those_of_the_entries(tmp_path):
    corpus = made(tmp_path, k=2)
    counts = corpus.made_of["counts"]
    sentences = [aligned for entry in corpus for aligned in entry.aligned]
    assert counts["images"] == 4
    assert counts["images_without"] == 2
    assert counts["pool"] == 6
    assert counts["used"] == len({aligned.text for aligned in sentences})
    assert counts["coverage"] == counts["used"] / 6
    assert counts["mean_score"] == pytest.approx(np.mean([aligned.score for aligned in sentences]))
    assert counts["links_per_sentence"] == sum(len(aligned.links) for aligned in sentences) / len(sentences)
    assert counts["names_first_tag"][0] == 1.0  # "dog" and "cat": found by their words
    assert corpus.made_of["fingerprints"]["chunker"] == "tags v1"
    assert corpus.made_of["encoder"] == "tfidf"


def test_the_same_call_makes_the_same_bytes(tmp_path):
    first = made(tmp_path, k=3).path.read_bytes()
    assert made(tmp_path, k=3).path.read_bytes() == first
    assert made(tmp_path, k=3, queries=1, block=2, name="blocks")["one"] == open_corpus(tmp_path / "weak")["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "weak"]  # the parts are gone


def test_a_killed_run_goes_on_from_its_parts(tmp_path, monkeypatch):
    images = {f"i{i}": ([f"w{i % 9}", f"w{i % 7}"], ()) for i in range(50)}
    pool = [f"w{i} w{j}" for i in range(9) for j in range(9)]
    settings = {"encoder": HashEncoder(), "captions": False, "k": 3, "block": 20, "queries": 5}
    whole = list(made(tmp_path, images, pool, **settings))
    cost = settings["encoder"].encoded
    for stop in (3, 4):
        calls = []

        def dying(*args, calls=calls, stop=stop, real=align.nearest, **kwargs):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(align, "nearest", dying)
            with pytest.raises(KeyboardInterrupt):
                made(tmp_path, images, pool, **settings, name="killed")
        assert not (tmp_path / "killed").exists()
    assert len(list(next(tmp_path.glob(".killed.*")).glob("*.npy"))) == 5 + 3 + 4
    settings["encoder"] = HashEncoder()
    resumed = made(tmp_path, images, pool, **settings, name="killed")
    assert list(resumed) == whole
    assert settings["encoder"].encoded < cost - len(pool) // 2
    assert not list(tmp_path.glob(".killed.*"))


def test_parts_of_other_settings_are_not_taken(tmp_path, monkeypatch):
    def dying(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(align, "write_corpus", dying)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, k=1)
    assert len(made(tmp_path, k=3)["one"]) == 3


def test_mixtures_are_their_sources(tmp_path):
    parts = [TaggedSource({name: IMAGES[name]}) for name in ("one", "two")]
    settings = AlignSettings(chunker="tags", k=2)
    corpus = weakly_align(Mixture(parts, needs=frozenset()), POOL, out=tmp_path / "a", settings=settings)
    assert corpus.ids() == ["one", "two"]
    with pytest.raises(UserError, match="occurs in more than one of the sources"):
        weakly_align([parts[0], parts[0]], POOL, out=tmp_path / "b", settings=settings)


def test_what_does_not_go_together_is_one_line(tmp_path):
    cases = [
        ({"metric": "l2"}, "--metric l2 is for sentence encoders"),
        ({"captions": False, "exclude_own": True}, "has no captions in 'en'"),
        ({"captions": False, "aligned": 0.5}, "has no captions in 'en'"),
        ({"pool": ["", "  "]}, "the pool has no sentence"),
        ({"pool": ["a", "b"]}, "no word of two letters"),
        ({"images": {"a": ((), ())}}, "no image has a tagged region"),
        ({"language": "de", "exclude_own": True}, "has no captions in 'de'"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            made(tmp_path, **settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "weak").exists()


def test_images_that_cannot_be_read_are_counted_and_too_many_stop_the_run(tmp_path):
    class Broken(TaggedSource):
        bad = 1

        def __getitem__(self, index):
            if index < self.bad:
                raise BadExample("truncated image", str(index), "cut short")
            return super().__getitem__(index)

    images = {f"i{i}": (["dog"], ()) for i in range(40)}
    source = Broken(images, captions=False)
    settings = AlignSettings(chunker="tags", k=2)
    corpus = weakly_align(source, POOL, out=tmp_path / "a", settings=settings)
    assert len(corpus) == 39
    assert corpus.made_of["counts"]["unreadable"] == {"truncated image": 1}
    source.bad = 20
    with pytest.raises(RunError, match="too many bad examples"):
        weakly_align(source, POOL, out=tmp_path / "b", settings=settings)


def test_a_chunker_of_ones_own_is_used(tmp_path):
    class Nothing(TagChunker):
        name = "nothing"

        def spans(self, texts):
            return [() for _ in texts]

    corpus = weakly_align(TaggedSource(IMAGES), POOL, out=tmp_path / "a", chunker=Nothing(["dog"]))
    assert corpus.made_of["chunker"] == "nothing"
    assert all(not aligned.links for entry in corpus for aligned in entry.aligned)
    assert corpus["one"]
