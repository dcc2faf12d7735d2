from __future__ import annotations

import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import list_splits, open_source

TABLE = "filepath\ttitle\na.png\tone cat\nsub/b.png\tNA\na.png\tthe same cat\n"


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path, {"a.png": png(1), "sub/b.png": png(2), "list.csv": TABLE})


def test_csv_reads_open_clip_s_table(folder):
    source = open_source(f"csv:{folder}/list.csv")
    assert list_splits(f"csv:{folder}/list.csv") == ()
    assert source.ids() == ["a.png", "sub/b.png"]
    assert source.provides == {"image", "text"}
    assert source[0].texts == {"en": ("one cat", "the same cat")}
    assert source[1].texts == {"en": ("NA",)}  # a word, not a missing value
    assert source[1].image == png(2)
    assert source.labels() is None


def test_csv_takes_columns_and_separator_from_the_options(folder):
    write_files(folder, {"list.csv": 'url,alt,kind\na.png,"a ""big"", cat",pet\nsub/b.png,b,\n'})
    source = open_source(f"csv:{folder}/list.csv?sep=comma&img=url&text=alt&label=kind")
    assert source[0].texts == {"en": ('a "big", cat',)}
    assert (source.classes, source.labels()) == (("pet",), [0, None])
    labels_only = open_source(f"csv:{folder}/list.csv?sep=comma&img=url&label=kind")
    assert labels_only.provides == {"image", "label"}


def test_csv_keeps_a_caption_with_a_line_separator_whole(folder):
    write_files(folder, {"list.csv": "filepath\ttitle\r\na.png\tone\u2028two\x0bthree\r\n"})
    assert open_source(f"csv:{folder}/list.csv")[0].texts == {"en": ("one\u2028two\x0bthree",)}


def test_csv_reads_absolute_paths(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_files(other, {"list.csv": f"filepath\ttitle\n{folder}/a.png\tx\n"})
    assert open_source(f"csv:{other}/list.csv")[0].image == png(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("filepath\ttitel\na.png\tx\n", r"unknown column 'titel'|unknown column 'title'; did you mean 'titel'"),
        ("filepath,title\na.png,x\n", r"one column only, 'filepath,title'; is the separator '\\t'\? Say \?sep=comma"),
        ("filepath\ttitle\na.png\tx\ty\n", "line 2: 3 cells, the header has 2"),
        ('filepath\ttitle\na.png\t"x" y\n', "line 2: "),
        ("filepath\ttitle\n", "no row below the header"),
        ("", "unknown column 'filepath'"),
    ],
)
def test_csv_names_what_is_wrong_with_a_table(folder, content, message):
    write_files(folder, {"list.csv": content})
    with pytest.raises(UserError, match=message):
        open_source(f"csv:{folder}/list.csv")


def test_csv_names_bad_files(folder):
    with pytest.raises(UserError, match=r"did you mean 'list\.csv'"):
        open_source(f"csv:{folder}/lists.csv")
    write_files(folder, {"latin.csv": "filepath\ttitle\na.png\tcaf\xe9\n".encode("latin-1")})
    with pytest.raises(UserError, match="not UTF-8"):
        open_source(f"csv:{folder}/latin.csv")
    (folder / "a.png").unlink()
    with pytest.raises(BadExample, match=r"a\.png: missing file"):
        open_source(f"csv:{folder}/list.csv")[0]
    write_files(folder, {"two.csv": "filepath\ttitle\tkind\na.png\tx\tcat\na.png\ty\tdog\n"})
    with pytest.raises(UserError, match="has two labels, 'cat' and 'dog'"):
        open_source(f"csv:{folder}/two.csv?label=kind")
