from __future__ import annotations

import pytest

from tests.data.making import image_folder, write_files
from vlbench.core.errors import UserError
from vlbench.data.spec import parse_spec, rebase


@pytest.mark.parametrize(
    ("text", "kind", "path", "options", "weight"),
    [
        ("shapes", "shapes", "", {}, 1.0),
        ("shapes:pairs?seed=3@2", "shapes", "pairs", {"seed": "3"}, 2.0),
        ("wds:cc3m/{00000..00331}.tar@0.5", "wds", "cc3m/{00000..00331}.tar", {}, 0.5),
        (
            "hf:user/name?label=fine_label&text=caption",
            "hf",
            "user/name",
            {"label": "fine_label", "text": "caption"},
            1,
        ),
        ("csv:a.csv?sep=%7C", "csv", "a.csv", {"sep": "|"}, 1.0),
        ("imagefolder:/data/me@home/x", "imagefolder", "/data/me@home/x", {}, 1.0),
        ("imagefolder:a:b", "imagefolder", "a:b", {}, 1.0),
    ],
)
def test_parse_spec_reads_every_part(text, kind, path, options, weight):
    spec = parse_spec(text)
    assert (spec.kind, spec.path, spec.options, spec.weight, spec.text) == (kind, path, options, weight, text)


def test_bare_leaves_the_weight_out():
    assert parse_spec("wds:a.tar@3").bare == "wds:a.tar"
    assert parse_spec("shapes@3").bare == "shapes"
    assert parse_spec("hf:a?label=x@3").bare == "hf:a?label=x"


@pytest.mark.parametrize("text", ["imagefolder:x@0", "imagefolder:x@-1", "imagefolder:x@inf", "imagefolder:x@nan"])
def test_parse_spec_refuses_a_weight_that_is_not_positive(text):
    with pytest.raises(UserError, match="positive"):
        parse_spec(text)


def test_parse_spec_names_the_nearest_kind():
    with pytest.raises(UserError, match="did you mean 'imagefolder'"):
        parse_spec("imagfolder:x")


@pytest.mark.parametrize("text", ["hf:x?label", "hf:x?=a", "hf:x?a=1&a=2", "hf:", "imagefolder"])
def test_parse_spec_refuses_malformed_specs(text):
    with pytest.raises(UserError):
        parse_spec(text)


def test_parse_spec_proposes_the_kind_of_a_bare_path(tmp_path):
    folder = image_folder(tmp_path / "pets")
    shards = write_files(tmp_path / "shards", {"00000.tar": b""})
    parquet = write_files(tmp_path / "table", {"data/train.parquet": b""})
    table = write_files(tmp_path, {"list.csv": ""}) / "list.csv"
    voc = write_files(tmp_path / "VOCdevkit", {"VOC2007/ImageSets/Main/cat_test.txt": ""})
    captions = write_files(tmp_path / "flickr30k", {"dataset_flickr30k.json": ""})
    pairs = [(folder, "imagefolder"), (shards, "wds"), (parquet, "hf"), (table, "csv"), (voc, "voc")]
    for path, kind in [*pairs, (captions, "karpathy"), (captions / "dataset_flickr30k.json", "karpathy")]:
        with pytest.raises(UserError, match=f"probably {kind}:{path}"):
            parse_spec(str(path))
    with pytest.raises(UserError, match="no such file or folder"):
        parse_spec(str(tmp_path / "absent"))


def test_rebase_moves_relative_paths_only(tmp_path):
    assert rebase("imagefolder:pets@2", tmp_path) == f"imagefolder:{tmp_path}/pets@2"
    assert rebase("csv:a.csv?sep=comma", tmp_path) == f"csv:{tmp_path}/a.csv?sep=comma"
    assert rebase("imagefolder:/pets", tmp_path) == "imagefolder:/pets"
    assert rebase("shapes:seen", tmp_path) == "shapes:seen"
    assert rebase("hf:user/name", tmp_path) == "hf:user/name"
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert rebase("hf:user/name", tmp_path) == f"hf:{tmp_path}/user/name"
