from __future__ import annotations

import io
import os
import tarfile
import time

import pytest

from tests.data.making import write_tar
from vlbench.core.errors import BadExample, UserError
from vlbench.core.paths import cache_dir
from vlbench.data.readers import tarindex
from vlbench.data.readers.tarindex import index_tar, read_members

MEMBERS = {f"{i:03d}.{ext}": bytes([i]) * (100 + 37 * i) for i in range(20) for ext in ("jpg", "txt")}


def test_index_tar_finds_every_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    index = index_tar(path)
    assert index.damage == ""
    assert index.keys == tuple(f"{i:03d}" for i in range(20))
    assert index.extensions == ("jpg", "txt")
    for row, key in enumerate(index.keys):
        data = read_members(str(path), index.members(row))
        assert data == {"jpg": MEMBERS[f"{key}.jpg"], "txt": MEMBERS[f"{key}.txt"]}


def test_index_tar_groups_by_key_with_the_folder_kept(tmp_path):
    members = {
        "./x/a.seg.PNG": b"1",
        "x/a.jpg": b"2",
        "y/a.jpg": b"3",
        "x/.b.jpg": b"4",
        "__meta__.json": b"5",
        "README": b"6",
    }
    index = index_tar(write_tar(tmp_path / "a.tar", members))
    assert index.keys == ("x/a", "y/a")
    assert set(index.members(0)) == {"seg.png", "jpg"}


def test_index_tar_groups_members_that_lie_apart_and_parts_repeated_ones(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt", "a.jpg", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    index = index_tar(path)
    assert index.keys == ("a", "b", "a#2")
    assert all(set(index.members(i)) == {"jpg", "txt"} for i in range(3))


def test_index_tar_reads_long_names_and_skips_links(tmp_path):
    path = tmp_path / "a.tar"
    long_name = "d/" * 90 + "é.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            member = tarfile.TarInfo(long_name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            tar.addfile(member.replace(name="z.jpg"), io.BytesIO(b"xyz"))
        index = index_tar(path)
        assert index.keys == (long_name.removesuffix(".jpg"), "z")
        assert read_members(str(path), index.members(1)) == {"jpg": b"xyz"}


@pytest.mark.parametrize("cut", range(1, 40_000, 977))
def test_index_tar_keeps_what_lies_before_a_cut(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes().rstrip(b"\0")
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: len(whole) - cut] if cut < len(whole) else whole[:700])
    index = index_tar(path)
    assert index.damage
    assert index.keys == tuple(f"{i:03d}" for i in range(len(index)))
    for row, key in enumerate(index.keys):
        data = read_members(str(path), index.members(row))
        assert data == {"jpg": MEMBERS[f"{key}.jpg"], "txt": MEMBERS[f"{key}.txt"]}


def test_index_tar_sees_a_missing_end_and_a_damaged_header(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS, end=False)
    index = index_tar(path)
    assert "cut or damaged" in index.damage
    assert len(index) == 20
    data = bytearray(write_tar(tmp_path / "b.tar", MEMBERS).read_bytes())
    header = data.find(b"010.jpg")
    data[header + 3 : header + 20] = os.urandom(17)
    (tmp_path / "b.tar").write_bytes(data)
    index = index_tar(tmp_path / "b.tar")
    assert index.damage == f"it is cut or damaged at byte {header:,}"
    assert index.keys == tuple(f"{i:03d}" for i in range(10))


def test_index_tar_refuses_what_is_no_plain_tar(tmp_path):
    import gzip

    whole = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    (tmp_path / "b.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"b.tar: compressed with gzip; unpack it"):
        index_tar(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_text("a text\n" * 1000)
    with pytest.raises(UserError, match=r"c.tar: not a tar file"):
        index_tar(tmp_path / "c.tar")
    with pytest.raises(UserError, match="no such tar file"):
        index_tar(tmp_path / "d.tar")
    (tmp_path / "e.tar").write_bytes(b"")
    assert index_tar(tmp_path / "e.tar").damage == "it is empty"


def test_index_tar_keeps_large_indices_and_notices_change(tmp_path, monkeypatch):
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tarindex, "_WORTH_KEEPING", 10)
    path = write_tar(tmp_path / "é a.tar", MEMBERS)
    built = index_tar(path)
    kept = list((cache_dir() / "tarindex").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tarindex, "_build", None)  # it must not be needed
        again = index_tar(path)
    assert (again.keys, again.extensions, again.damage) == (built.keys, built.extensions, built.damage)
    assert all(again.members(i) == built.members(i) for i in range(len(built)))
    write_tar(path, dict(list(MEMBERS.items())[:30]))
    assert len(index_tar(path)) == 15
    before = path.stat()
    time.sleep(0.02)  # longer than a file system's clock may stand still
    write_tar(path, {f"9{name[1:]}": data for name, data in list(MEMBERS.items())[:30]})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert index_tar(path).keys[0] == "900", "another content of the same size and time of modification is seen"
    for file in (cache_dir() / "tarindex").iterdir():
        file.write_bytes(b"damaged")
    assert len(index_tar(path)) == 15


def test_read_members_says_that_a_file_has_changed(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    place = {"jpg": index_tar(path).members(19)["jpg"]}
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadExample, match="has become shorter"):
        read_members(str(path), place)
    path.unlink()
    with pytest.raises(BadExample, match="unreadable file"):
        read_members(str(path), place)
