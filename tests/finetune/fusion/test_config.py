"""What a fusion model's settings say beyond their values."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.finetune.fusion.config import FusionConfig


def test_words_must_fit_after_padding() -> None:
    assert parse(FusionConfig, {"max_words": 32, "stream": {"positions": 32}}, where="here").max_words == 32
    with pytest.raises(UserError, match="max_words 30, padded to 32, is more than"):
        parse(FusionConfig, {"max_words": 30, "stream": {"positions": 30}}, where="here")


def test_bad_images_are_not_passed_over() -> None:
    with pytest.raises(UserError, match=r"max_bad: a question whose image cannot be read stops the run.*leave it out"):
        parse(FusionConfig, {"max_bad": 0.5}, where="here")
    assert parse(FusionConfig, {"max_bad": 0}, where="here").max_bad == 0
    stored = FusionConfig().model_dump(mode="json")
    assert parse(FusionConfig, stored, where="here") == FusionConfig()


def test_contents_follow_weights_and_vocabulary_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    config = parse(FusionConfig, {"bert": str(tmp_path)}, where="here")
    before = config.contents()
    (tmp_path / "README.md").write_text("words about it")
    assert config.contents() == before
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n")
    other = config.contents()
    assert other != before
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert config.contents() not in (before, other)
    assert FusionConfig().contents() == []
