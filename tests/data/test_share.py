"""``?share=0.5`` of any kind of data: which entries, of which split, and who can tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.making import image_folder, png, write_files, write_tar
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import is_present, list_splits, open_source
from vlbench.data.taskdata import TaskData
from vlbench.train.batches import data_identity, open_mixture

N = 40


def table(root: Path, names: list[str]) -> str:
    rows = "".join(f"{name}.png\tthis is {name}\n" for name in names)
    write_files(root, {"list.csv": f"filepath\ttitle\n{rows}", **{f"{name}.png": png(int(name)) for name in names}})
    return f"csv:{root}/list.csv"


@pytest.fixture
def names() -> list[str]:
    return [f"{number:03}" for number in range(N)]


def ids(spec: str, split: str | None = None) -> list[str]:
    return list(open_source(spec, split).ids())


def test_a_share_is_the_same_entries_in_any_order_of_the_data(names: list[str], tmp_path: Path) -> None:
    forward, backward = table(tmp_path / "a", names), table(tmp_path / "b", names[::-1])
    half = ids(f"{forward}?share=0.5")
    assert len(half) == N // 2
    assert half == sorted(half)
    assert half != ids(forward)[: N // 2]
    assert ids(f"{backward}?share=0.5") == half[::-1]
    assert ids(f"{forward}?share=0.5") == half
    assert set(ids(f"{forward}?share=0.25")) < set(half) < set(ids(f"{forward}?share=0.8"))
    other = ids(f"{forward}?share=0.5&share_seed=1")
    assert len(other) == N // 2
    assert other != half
    assert len(ids(f"{forward}?share=1e-9")) == 1
    assert ids(f"{forward}?share=1") == ids(forward)
    source = open_source(f"{forward}?share=0.5")
    assert source[3].texts == {"en": (f"this is {half[3].removesuffix('.png')}",)}
    assert source.spec == f"{forward}?share=0.5"


def test_which_entries_they_are_is_fixed_for_ever(names: list[str], tmp_path: Path) -> None:
    assert ids(f"{table(tmp_path, names)}?share=0.1") == ["003.png", "004.png", "019.png", "029.png"]


def test_only_what_is_trained_on_is_cut(tmp_path: Path) -> None:
    spec = f"imagefolder:{image_folder(tmp_path, splits=('train', 'val', 'test'), per_class=10)}"
    assert list_splits(f"{spec}?share=0.3") == ("train", "val", "test")
    assert is_present(f"{spec}?share=0.3")
    assert len(ids(f"{spec}?share=0.3")) == len(ids(f"{spec}?share=0.3", "training")) == 6
    for split in ("val", "test"):
        assert ids(f"{spec}?share=0.3", split) == ids(spec, split)
    whole, part, again = (TaskData(text) for text in (spec, f"{spec}?share=0.3", f"{spec}?share=0.3&share_seed=2"))
    assert part.fingerprint(("test",)) == whole.fingerprint(("test",))
    assert len({data.fingerprint(("train", "test")) for data in (whole, part, again)}) == 3


def test_every_kind_of_data_has_shares(tmp_path: Path) -> None:
    world = write_world(tmp_path / "shapes", sizes=TINY, parts=("pairs", "coco"), workers=1)
    write_tar(tmp_path / "shards" / "0.tar", {f"{i}.{end}": data for i in range(10) for end, data in pair(i)})
    boxes = next(world.rglob("instances_*.json")).parents[1]
    for spec in (f"shapes:pairs?root={world}", f"wds:{tmp_path}/shards", f"coco:{boxes}"):
        whole, part = ids(spec), open_source(f"{spec}{'&' if '?' in spec else '?'}share=0.5")
        assert len(part) == round(len(whole) / 2)
        assert set(part.ids()) < set(whole)
        assert [part[index].id for index in range(3)] == list(part.ids())[:3]
        assert "share=0.5" in part.spec


def pair(number: int) -> list[tuple[str, bytes]]:
    return [("png", png(number)), ("txt", f"this is {number}".encode())]


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "half", "nan", ""])
def test_what_is_no_share_is_one_line(share: str, names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a share is above 0 and at most 1, for instance \?share=0\.5") as error:
        open_source(f"{table(tmp_path, names)}?share={share}")
    assert "\n" not in str(error.value)


def test_a_seed_alone_and_a_slip_of_the_pen_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a share is above 0"):
        open_source(f"{table(tmp_path, names)}?share_seed=1")
    with pytest.raises(UserError, match="did you mean 'share'"):
        open_source(f"imagefolder:{tmp_path}?shar=0.5")


@pytest.mark.parametrize("order", ["any", "shards"])
def test_training_reads_the_share_alone_and_knows_it(order: str, names: list[str], tmp_path: Path) -> None:
    """Half of one source with all of another, as UniCL mixes labels and captions; weights stay what they are."""
    half, other = f"{table(tmp_path / 'a', names)}?share=0.5", table(tmp_path / "b", names[:8])
    recipe = RECIPES.get("clip")

    def config(*data: str):
        words = ["batch_size=4", "workers=0", *([] if order == "any" else ["order=shards", "open_shards=2"])]
        return override(recipe.presets["tiny"].model_copy(update={"data": data}), words)

    mixture = open_mixture(recipe, config(half, other))
    assert [len(source) for source in mixture.sources] == [20, 8]
    drawn = {mixture.locate(position)[:2] for position in range(200)}
    assert {index for source, index in drawn if source == 0} == set(range(20))
    of = [data_identity(config(spec), open_mixture(recipe, config(spec))) for spec in (half, half.partition("?")[0])]
    again = f"{half}&share_seed=3"
    of.append(data_identity(config(again), open_mixture(recipe, config(again))))
    assert len({str(identity[0]["ids"]) for identity in of}) == 3
