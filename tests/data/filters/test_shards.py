from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from tests.data.filters.planting import members_of
from tests.data.making import png, write_tar
from vlbench.core.errors import BadExample, UserError
from vlbench.data.filters.shards import Pair, copy_kept, open_shard, read_pair, source_shards


def pairs(number: int) -> dict[str, bytes]:
    return {f"{i:03}.{name}": data for i in range(number) for name, data in (("png", png(i)), ("txt", b"text %d" % i))}


def only(folder):
    return source_shards(f"wds:{folder}")[0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_copy_leaves_members_as_they_are(tmp_path, form):
    folder = tmp_path / "src"
    folder.mkdir()
    long = "directory-with-a-long-name/" + "x" * 90 if form != tarfile.USTAR_FORMAT else "short/x"
    with tarfile.open(folder / "0.tar", "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("short"))
        for i in range(5):
            for name in ("png", "json", "txt"):
                member = tarfile.TarInfo(f"{long}{i}.{name}")
                member.size, member.mtime, member.mode, member.uname = 100 * i, 1_700_000_000 + i, 0o640, "someone"
                tar.addfile(member, io.BytesIO(bytes([i]) * member.size))
    index = open_shard(only(folder), allow_truncated=False)
    keep = np.array([True, False, True, True, False])
    copy_kept(index, keep, tmp_path / "out.tar")
    before, after = members_of(folder / "0.tar"), members_of(tmp_path / "out.tar")
    assert after == before[:4] + before[7:13]
    assert (tmp_path / "out.tar").stat().st_size % 10240 == 0


def test_copy_of_everything_is_the_same_file_and_of_nothing_an_empty_shard(tmp_path):
    path = write_tar(tmp_path / "src" / "0.tar", pairs(4))
    index = open_shard(only(tmp_path / "src"), allow_truncated=False)
    copy_kept(index, np.ones(4, dtype=bool), tmp_path / "all.tar")
    assert (tmp_path / "all.tar").read_bytes() == path.read_bytes()
    copy_kept(index, np.zeros(4, dtype=bool), tmp_path / "none" / "0.tar")
    assert len(open_shard(only(tmp_path / "none"), allow_truncated=False)) == 0


def test_cut_shard_is_refused_or_copied_up_to_its_cut(tmp_path):
    path = write_tar(tmp_path / "src" / "0.tar", pairs(4))
    path.write_bytes(path.read_bytes()[:4000])  # inside the second sample
    with pytest.raises(UserError, match=r"0\.tar: truncated tar: it is cut .* 4,000; .* --allow-truncated"):
        open_shard(only(tmp_path / "src"), allow_truncated=False)
    index = open_shard(only(tmp_path / "src"), allow_truncated=True)
    assert 0 < len(index) < 4
    copy_kept(index, np.ones(len(index), dtype=bool), tmp_path / "out" / "0.tar")
    whole = open_shard(only(tmp_path / "out"), allow_truncated=False)
    assert whole.keys == index.keys


def test_text_is_the_txt_else_the_caption(tmp_path):
    members = {
        "a.png": png(),
        "a.txt": b"\xef\xbb\xbf from the text \n",
        "a.json": b'{"caption": "from the record"}',
        "b.jpg": b"\xff\xd8\xff",
        "b.json": b'{"caption": "from the record"}',
        "c.webp": b"RIFF",
        "c.json": b'{"caption": null}',
        "d.txt": b"no image",
    }
    write_tar(tmp_path / "0.tar", members)
    index = open_shard(only(tmp_path), allow_truncated=False)
    assert [read_pair(index, row) for row in range(4)] == [
        Pair(png(), "from the text"),
        Pair(b"\xff\xd8\xff", "from the record"),
        Pair(b"RIFF", None),
        Pair(None, "no image"),
    ]


@pytest.mark.parametrize(
    "member, data, kind",
    [
        ("png", b"", "empty file"),
        ("txt", b"caf\xe9", "bad text"),
        ("json", b"[1]", "bad JSON"),
        ("json", b"[" * 100_000, "bad JSON"),
    ],
)
def test_unreadable_parts_are_told_by_kind(tmp_path, member, data, kind):
    write_tar(tmp_path / "0.tar", {"a.png": png(), "a.txt": b"text", f"a.{member}": data})
    index = open_shard(only(tmp_path), allow_truncated=False)
    with pytest.raises(BadExample) as caught:
        read_pair(index, len(index) - 1)
    assert caught.value.kind == kind


def test_shards_of_several_folders_keep_their_paths(tmp_path):
    for name in ("a/0.tar", "b/0.tar"):
        write_tar(tmp_path / name, pairs(1))
    shards = source_shards(f"wds:{tmp_path}/{{a,b}}/0.tar")
    assert [shard.name for shard in shards] == ["a/0.tar", "b/0.tar"]
    assert [shard.name for shard in source_shards(f"wds:{tmp_path}/a")] == ["0.tar"]
    with pytest.raises(UserError, match="a shard is named twice"):
        source_shards(f"wds:{tmp_path}/{{a,a}}/0.tar")
    with pytest.raises(UserError, match="only webdataset shards"):
        source_shards(f"imagefolder:{tmp_path}")
