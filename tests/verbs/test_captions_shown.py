"""``vlbench eval`` of a model that writes: some captions can be read at once, and all of them found."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.types import Backbone
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import open_source
from vlbench.models.backbone import TorchBackbone
from vlbench.verbs.calls import evaluate

CHANNELS = ("red", "green", "blue")


def build() -> Backbone:
    """Says which channel of an image is the brightest."""

    def describe(images_BCHW: torch.Tensor) -> list[str]:
        return [f"it is {CHANNELS[int(image.mean((1, 2)).argmax())]}" for image in images_BCHW]

    card = ModelCard(
        id="speaker",
        loader="build",
        arch="x",
        preprocess=Preprocess(image_size=(8, 8)),
        provides={"pooled", "captions"},
    )
    return TorchBackbone(card, nn.Flatten(), captions_fn=describe)


def test_captions_are_shown_and_their_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    world = write_world(tmp_path / "shapes", sizes=TINY, parts=("retrieval",), workers=1)

    def printed(tasks: str, model: str = f"{__name__}:build") -> list[str]:
        words = {"model": model, "tasks": tasks, "data": f"shapes:retrieval?root={world}"}
        assert evaluate(**words, results=str(tmp_path / "results"), device="cpu", workers=0) == 0
        return capsys.readouterr().out.splitlines()

    lines = printed("captioning")
    (last,) = [number for number, line in enumerate(lines) if line.startswith("  all ")]
    shown = lines[last - 6 : last]
    assert lines[last - 7].startswith("  cider ")
    source = open_source(f"shapes:retrieval?root={world}", "test")
    texts = {source[index].id: source[index].texts["en"] for index in range(len(source))}
    for number, name in enumerate(sorted(texts)[:3]):
        written, reference = shown[2 * number : 2 * number + 2]
        assert written.startswith(f"  {name}: it is ")
        assert reference == f"      a reference: {texts[name][0]}"
    count, _, rest = lines[last].removeprefix("  all ").partition(": ")
    path, _, columns = rest.removesuffix(")").partition(" (columns ")
    table = pq.read_table(path)
    assert int(count.replace(",", "")) == table.num_rows == len(texts)
    assert columns.split(", ") == table.column_names == ["id", "image", "caption", "references"]
    of = dict(zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert [line.strip() for line in shown[::2]] == [f"{name}: {of[name]}" for name in sorted(texts)[:3]]

    again = printed("captioning")
    assert any(line.startswith("[1/1] captioning/") and "reused" in line for line in again)
    assert [line for line in again if line in lines[last - 6 : last + 1]] == lines[last - 6 : last + 1]

    other = printed("retrieval", "tests.verbs.toy_backbone:build")
    (began,) = [number for number, line in enumerate(other) if line.startswith("[1/1] retrieval/")]
    assert other[began + 1].startswith("  image_retrieval_recall@1 ")
    assert other[began + 2] == "", "nothing more is said of other tasks"
