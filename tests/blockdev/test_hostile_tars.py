# SPDX-License-Identifier: Apache-2.0
"""Layers made to mislead or to exhaust: exact on a mounted disk, or one error, in bounded memory and time."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.build import tree as tree_module
from blockdev.build.plain import plain
from blockdev.build.tree import Tree
from blockdev.errors import CorruptImage
from formats.archive import Archive
from formats.tree import Node
from tests.requires import ROOT, requires_mount, scaled
from tests.tars import Contents, binary, file, folder, hardlink, header, merged, names, paths, pax, reader, symlink
from tests.trees import CAPABILITY, Disk, difference, listing, mount, mounted

# ---- odd, but right ----

DEEP = b"/".join(b"%03d" % level for level in range(100))
LONG = b"/".join(b"n" * 255 for _ in range(15))
WHOLE_BYTE = bytes(byte for byte in range(1, 256) if byte != ord("/"))
ODD = {
    "100 deep": pax({b"path": DEEP + b"/bottom"}) + file(b"", b"deep"),
    "as long as paths can be": pax({b"path": LONG + b"/" + b"f" * 255}) + file(b"", b"long"),
    "names of 0xFF": file(b"\xff" * 99, b"x") + pax({b"path": b"\xff" * 255}) + folder(b""),
    "names of all bytes": file(b"a" + WHOLE_BYTE[:90], b"x") + pax({b"path": b"b" + WHOLE_BYTE}) + file(b"", b"y"),
    "names that look like others": file(b"...", b"x") + folder(b".. ") + file(b".. /.wh") + file(b"-rf") + file(b".w"),
    "ids beyond 2^31": file(b"ids", b"x", uid=binary(1 << 31, 8), gid=binary(0xFFFFFFFE, 8)),
    "ids beyond 2^31 in pax": pax({b"uid": b"4294967294", b"gid": b"2147483648"}) + folder(b"ids-pax"),
    "set-id bits with large ids": file(b"set-id", b"x", mode=0o7777, uid=binary(3_000_000, 8)),
    "before 1970": file(b"old", b"x", mtime=binary(-(1 << 33), 12)),
    "nanoseconds before 1970": pax({b"mtime": b"-1.000000001"}) + file(b"old-ns", b"x"),
    "nanoseconds": pax({b"mtime": b"1700000000.999999999"}) + symlink(b"ns", b"x"),
    "far from now": file(b"far", b"x", mtime=binary(1 << 34, 12)),
    "xattrs of any bytes": pax(
        {
            b"SCHILY.xattr.security.capability": CAPABILITY,
            b"SCHILY.xattr.user.any=byte": WHOLE_BYTE + b"\0\n=" * 20,
            b"SCHILY.xattr.trusted.empty": b"",
            b"SCHILY.xattr.user." + b"n" * 250: b"v",
        }
    )
    + file(b"xattrs", b"x"),
    "a target of the longest": pax({b"linkpath": b"../" * 1365}) + symlink(b"target", b""),
    "a target that leads out": symlink(b"out", b"/../../../etc/shadow"),
    "links and devices": file(b"one", b"x") + b"".join(hardlink(b"link%d" % i, b"one") for i in range(70)),
    "the largest device": header(b"device", b"4", major=4095, minor=(1 << 20) - 1),
    "written through links": folder(b"r/e") + symlink(b"r/up", b"../../../../r/e") + file(b"r/up/../f", b"x"),
}


def test_what_is_odd_but_right_comes_out_of_the_kernel_exactly(tmp_path: Path) -> None:
    requires_mount()
    disk = Disk(tmp_path / "image")
    contents = Contents()
    tree = merged(*ODD.values(), contents=contents)
    files = {node: contents.of(node) for _, node in paths(tree.root) if node.children is None}
    _write(disk, tree, contents)
    with mount(tmp_path / "image", tmp_path / "mnt") as point:
        assert not difference(mounted(point), listing(tree.root, files))


def _write(disk: Disk, tree: Tree, contents: Contents) -> None:
    """All files onto the disk, and where they are into the tree."""
    places: dict[int, int] = {}
    for _, node in paths(tree.root):
        if node.block and node.block not in places:
            places[node.block] = disk.file(contents.of(node)).block
    for node in {node for _, node in paths(tree.root)}:
        node.block = places.get(node.block, 0)
    disk.finish(tree.root)


# ---- tricks ----

TRICKS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "a link to the root of all": ([symlink(b"l", b"/") + file(b"l/etc/x")], [b"etc", b"etc/x", b"l"]),
    "a link that climbs": ([symlink(b"l", b"../../../..") + file(b"l/x")], [b"l", b"x"]),
    "two links that climb": (
        [symlink(b"a", b".") + symlink(b"a/b", b"..") + file(b"a/b/x") + file(b"b/y")],
        [b"a", b"b", b"x", b"y"],
    ),
    "a link of a lower layer": ([symlink(b"l", b"/tmp/../.."), file(b"l/x")], [b"l", b"x"]),
    "a directory that becomes a link, and back": (
        [folder(b"d") + file(b"d/1"), symlink(b"d", b"/e") + file(b"d/2") + folder(b"d") + file(b"d/3")],
        [b"d", b"d/3", b"e", b"e/2"],
    ),
    "a hard link to a link that leads out": (
        [symlink(b"l", b"/etc/passwd") + hardlink(b"h", b"l") + file(b"h", b"x")],
        [b"h", b"l"],
    ),
    "a whiteout through a link": (
        [folder(b"d") + file(b"d/f") + symlink(b"l", b"/../d"), file(b"l/.wh.f") + file(b"l/.wh..wh..opq")],
        [b"d", b"l"],
    ),
    "a file in place of the directory it was in": ([file(b"d/e/f") + file(b"d")], [b"d"]),
    "whiteouts with content and of all kinds": (
        [file(b"a") + file(b"b") + file(b"c"), symlink(b".wh.a", b"/") + folder(b".wh.b/") + hardlink(b".wh.c", b"no")],
        [],
    ),
}


@pytest.mark.parametrize(("layers", "left"), TRICKS.values(), ids=TRICKS)
def test_no_trick_leads_out_of_the_tree(layers: list[bytes], left: list[bytes]) -> None:
    assert names(merged(*layers)) == left


# ---- greed ----

INTERPRETER = 40 << 20  # bytes, before the first entry
PER_ENTRY = ((1 << 30) - INTERPRETER) // 1_000_000


@pytest.mark.timeout(scaled(300, 3600))  # a minute of one processor in earnest
def test_many_entries_take_bounded_memory(record_measured: Callable[[str, dict[str, object]], None]) -> None:
    """A million, in two layers, in a GiB; fewer in as much less."""
    count = scaled(20_000, 1_000_000)
    command = [sys.executable, "-m", "tests.many_entries", str(count)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    assert found["peak_rss"] <= INTERPRETER + count * PER_ENTRY
    record_measured("tree-entries", found | {"bound": INTERPRETER + count * PER_ENTRY})


class _Watched(dict[bytes, Node]):
    """Children that count how often all of them were looked through."""

    looks = 0

    def __iter__(self) -> Iterator[bytes]:
        self.looks += 1
        return super().__iter__()


def test_many_whiteouts_of_one_directory_are_no_more_work_than_one() -> None:
    tree = merged(file(b"d/lower"))
    children = _Watched({b"lower": dict(paths(tree.root))[b"d/lower"]})
    dict(paths(tree.root))[b"d"].children = children
    upper = b"".join(file(b"d/%d" % i) + file(b"d/.wh..wh..opq") + file(b".wh.d") for i in range(1000))
    tree.apply(Archive(reader(upper)), Contents())
    assert children.looks == 1
    assert len(names(tree)) == 1 + 1000


@pytest.mark.parametrize(
    "entry",
    [
        lambda number: hardlink(b"%d" % number, b"d/38/x"),
        lambda number: file(b"d/38/%d/x" % number),
        lambda number: file(b"d/38/.wh.%d" % number),
    ],
)
def test_ways_through_long_links_are_bounded_by_the_layer(entry: Callable[[int], bytes]) -> None:
    """Each name asks for 150 KB of links to be followed, in a hundred bytes of a compressed layer."""
    target = b"../d/" * 800
    links = b"".join(pax({b"linkpath": target + b"%d" % (i - 1)}) + symlink(b"d/%d" % i, b"") for i in range(1, 39))
    tar = file(b"d/0/x", b"x") + links
    few = b"".join(entry(number) for number in range(10))
    assert len(names(merged(tar + few))) >= 2 + 38
    with pytest.raises(CorruptImage, match="more and longer symbolic links on the ways than files"):
        merged(tar + b"".join(entry(number) for number in range(100)))


def test_a_tree_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of 4 KiB makes two thousand directories, and compresses to nothing."""
    monkeypatch.setattr(tree_module, "_MEMORY_MAX", 1 << 20)
    tar = b"".join(pax({b"path": b"%d/" % i + b"d/" * 2000}) + folder(b"") for i in range(10))
    with pytest.raises(CorruptImage, match="more files than a tree may hold"):
        merged(tar)
    same = b"".join(pax({b"path": b"d/" * 2000}) + file(b"") + file(b"d") + folder(b"d") for _ in range(10))
    assert names(merged(same)) == [b"d"], "what is replaced does not count"


@pytest.mark.parametrize("size", [1 << 31, 1 << 40, (1 << 63) - 1])
def test_a_size_alone_takes_nothing(size: int) -> None:
    """A file that claims more than the layer has is an error once the layer ends; so is an extension header."""
    for typeflag in (b"0", b"L", b"x", b"g"):
        with pytest.raises(CorruptImage, match=r"layer 0: .*(the tar ends|extension header of|more than 16 TiB)"):
            merged(header(b"x", typeflag, size=binary(size, 12)) + bytes(5000))


def test_a_hole_larger_than_any_disk_is_refused() -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"%d" % (1 << 62)}
    with pytest.raises(CorruptImage, match="x: file of 4611686018427387904 bytes, more than 16 TiB"):
        merged(pax(records) + file(b"x", b"0\n".ljust(512, b"\0")))


def test_a_compressed_layer_of_endless_names_is_cut_short() -> None:
    """A MiB of one name out of a KiB of gzip: refused as a path, not made."""
    blob = gzip.compress(pax({b"path": b"n/" * 500_000}) + file(b""))
    tree = Tree()
    with pytest.raises(CorruptImage, match="path of more than 4095 bytes"):
        tree.apply(Archive(plain(reader(blob))), Contents(), "layer")
    assert names(tree) == []


@pytest.mark.parametrize("place", range(0, 512, 37))
def test_one_bit_of_a_header_is_an_error_that_says_where(place: int) -> None:
    tar = bytearray(file(b"a", b"x") + file(b"victim" * 16, b"x", mode=0o4755, uid=1000))
    tar[1024 + place] ^= 4
    with pytest.raises(
        CorruptImage, match=r"^cannot unpack the layer: layer 0: tar header is damaged \(at byte 1024\)$"
    ):
        merged(bytes(tar))
