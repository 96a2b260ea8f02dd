# SPDX-License-Identifier: Apache-2.0
"""The EROFS reader: what was written comes back, paths resolve as a kernel would, any bytes are answers or errors."""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.erofs_disk import INODE_SIZE, SUPERBLOCK_OFFSET, superblock_checksum
from formats.erofs_reader import LINKS_MAX, FileSystem
from formats.errors import FormatError
from formats.readat import BytesAt
from formats.tree import BLOCK_SIZE, Node
from tests import requires
from tests.mutations import damaged, value_or_format_error
from tests.trees import Disk, difference, directory, listing, rich, shown

Built = tuple[Node, Disk, FileSystem]


def built(folder: Path, make: Callable[[Disk], Node]) -> Built:
    disk = Disk(folder / "disk")
    root = make(disk)
    disk.finish(root)
    return root, disk, FileSystem(BytesAt(disk.path.read_bytes()))


def with_checksum(disk: bytes) -> bytes:
    """The same disk, its superblock's checksum made right."""
    fixed = bytearray(disk)
    if len(fixed) >= BLOCK_SIZE:
        checksum = superblock_checksum(bytes(fixed[SUPERBLOCK_OFFSET:BLOCK_SIZE]))
        fixed[SUPERBLOCK_OFFSET + 4 : SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
    return bytes(fixed)


def test_a_rich_tree_comes_back(tmp_path: Path) -> None:
    root, disk, files = built(tmp_path, rich)
    tree = files.tree()
    assert difference(listing(tree), listing(root)) == ""
    assert difference(shown(files), listing(root, disk.contents)) == ""
    assert tree.children is not None
    assert root.children is not None
    assert tree.children[b"big"].block == root.children[b"big"].block


def test_a_large_directory_comes_back(tmp_path: Path) -> None:
    def make(disk: Disk) -> Node:
        return directory({b"entry-%d" % i: disk.file() for i in range(20_000)})

    root, _, files = built(tmp_path, make)
    assert difference(listing(files.tree()), listing(root)) == ""
    for name in (b"entry-0", b"entry-19999", b"entry-12345"):
        assert files.lookup(name) is not None
    for name in (b"!", b"entry-", b"entry-20000", b"zzz", b"entry-12345x"):
        assert files.lookup(name) is None


def linked(disk: Disk) -> Node:
    def link(target: bytes) -> Node:
        return Node(stat.S_IFLNK | 0o777, target=target)

    below = directory(
        {
            b"file": disk.file(b"below"),
            b"up": link(b"../file"),
            b"out": link(b"../../../../file"),
            b"top": link(b"/d/file"),
        }
    )
    chain = {b"c%d" % i: link(b"c%d" % (i + 1)) for i in range(LINKS_MAX)} | {b"c%d" % LINKS_MAX: disk.file(b"end")}
    children = {
        b"file": disk.file(b"top"),
        b"d": below,
        b"to-d": link(b"./d//"),
        b"loop": link(b"loop"),
        b"ping": link(b"pong"),
        b"pong": link(b"d/../ping"),
        b"dangling": link(b"no/such"),
        **chain,
        b"c-1": link(b"c0"),
    }
    return directory(children)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (b"file", b"top"),
        (b"/file", b"top"),
        (b"//d/./file", b"below"),
        (b"d/../file", b"top"),
        (b"../../file", b"top"),
        (b"to-d/file", b"below"),
        (b"to-d/../file", b"top"),
        (b"d/up", b"top"),
        (b"d/out", b"top"),
        (b"to-d/out", b"top"),
        (b"d/top", b"below"),
        (b"c0", b"end"),
        (b"c-1", None),
        (b"loop", None),
        (b"ping", None),
        (b"ping/x", None),
        (b"dangling", None),
        (b"dangling/..", None),
        (b"file/", None),
        (b"file/..", None),
        (b"file/x", None),
        (b"no", None),
        (b"no/../file", None),
        (b"d/" + b"n" * 300, None),
    ],
)
def test_a_path_leads_where_the_kernel_would_take_it_within_the_root(
    tmp_path: Path, path: bytes, content: bytes | None
) -> None:
    _, _, files = built(tmp_path, linked)
    inode = files.lookup(path)
    assert (inode and files.read(inode, 0, 100)) == content


def test_the_last_link_is_followed_if_asked_for(tmp_path: Path) -> None:
    _, _, files = built(tmp_path, linked)
    for path, kind in ((b"to-d", stat.S_IFLNK), (b"to-d/", stat.S_IFDIR), (b"to-d/.", stat.S_IFDIR)):
        inode = files.lookup(path, follow=False)
        assert inode is not None
        assert inode.kind == kind
    for path in (b"", b"/", b"..", b"to-d/..", b"/../."):
        inode = files.lookup(path)
        assert inode is not None
        assert inode.nid == files.root.nid


def test_content_is_read_from_any_offset(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40 + b"end"
    _, _, files = built(tmp_path, lambda disk: directory({b"f": disk.file(content)}))
    inode = files.lookup(b"f")
    assert inode is not None
    for offset, length in ((0, 10), (4090, 12), (4096, 4096), (10_000, 10_000), (len(content), 1), (1 << 60, 5)):
        assert files.read(inode, offset, length) == content[offset : offset + length]


def test_blocks_of_another_size_are_counted_as_trees_do(tmp_path: Path) -> None:
    """A disk with one file, made one of 2048-byte blocks: addresses double, and a file may start between."""
    _, disk, _ = built(tmp_path, lambda disk: directory({b"f": disk.file(b"a" * 2048 + b"b" * 2048)}))
    content = bytearray(disk.path.read_bytes())
    content[SUPERBLOCK_OFFSET + 8] = 0  # no checksum
    content[SUPERBLOCK_OFFSET + 12] = 11
    for place in (40, 44):
        content[SUPERBLOCK_OFFSET + place] *= 2
    for word, block, wanted in ((2, 1, b"a"), (3, 0, b"b")):
        inode = FileSystem(BytesAt(bytes(content))).lookup(b"f")
        assert inode is not None
        content[inode.position + 16] = word
        files = FileSystem(BytesAt(bytes(content)))
        [node] = (files.tree().children or {}).values()
        assert node.block == block
        moved = files.lookup(b"f")
        assert moved is not None
        assert files.read(moved, 0, 1) == wanted


# ---- hostile disks ----


def changed(disk: bytes, place: int, new: bytes) -> FileSystem:
    return FileSystem(BytesAt(with_checksum(disk[:place] + new + disk[place + len(new) :])))


@pytest.fixture
def small(tmp_path: Path) -> tuple[bytes, dict[str, int]]:
    """A disk, and where the inodes of what is on it are."""
    _, disk, files = built(
        tmp_path,
        lambda disk: directory(
            {
                b"a": directory({b"in": disk.file(b"in")}),
                b"b": directory(),
                b"file": disk.file(b"content", xattrs=((b"user.a", b"1"), (b"user.b", b"2"))),
                b"file2": disk.file(b"content", xattrs=((b"user.b", b"2"),)),
                b"link": Node(stat.S_IFLNK | 0o777, target=b"file"),
            }
        ),
    )
    places = {"root": files.root.position}
    for name, nid, _ in files.entries(files.root):
        places[name.decode()] = files.inode(nid).position
    return disk.path.read_bytes(), places


@pytest.mark.parametrize(
    ("what", "offset", "new"),
    [
        ("root", 0, b"\x0b\0"),  # layout 5
        ("root", 0, b"\x25\0"),  # a bit that nobody knows
        ("root", 4, struct.pack("<H", 0o100644)),  # a root that is a file
        ("root", 8, struct.pack("<Q", 1 << 63)),
        ("root", 8, struct.pack("<Q", 1 << 40)),
        ("root", 8, struct.pack("<Q", 11)),
        ("a", 4, struct.pack("<H", 0o644)),  # no type
        ("a", 4, struct.pack("<H", 0o100644)),  # not the type its entry says
        ("a", 0, b"\x01\0"),  # blocks at 0xffffffff
        ("a", 40, struct.pack("<I", 10**9)),
        ("file", 2, b"\xff\xff"),
        ("file", INODE_SIZE + 4, b"\xff"),  # shared attributes past the end of the area
        ("file", INODE_SIZE + 12, b"\xff\xff\xff\xff"),  # one of them off the disk
        ("file", INODE_SIZE + 16, b"\xff"),  # a name past the area
        ("file", INODE_SIZE + 17, b"\x07"),  # a prefix that nobody knows
        ("file", INODE_SIZE + 17, b"\x02"),  # an ACL with a name
        ("link", 8, struct.pack("<Q", 4096)),
        ("link", 8, struct.pack("<Q", 4000)),  # over the end of its block
    ],
)
def test_an_inode_that_breaks_the_format_is_refused(
    small: tuple[bytes, dict[str, int]], what: str, offset: int, new: bytes
) -> None:
    disk, places = small
    with pytest.raises(FormatError):
        changed(disk, places[what] + offset, new).tree()


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (0, b"\0"),  # magic
        (12, b"\x08"),
        (12, b"\x11"),
        (12, b"\xff"),
        (14, b"\xff\xff"),
        (40, b"\xff\xff\xff\xff"),
        (80, b"\x40"),
    ],
)
def test_a_superblock_that_breaks_the_format_is_refused(
    small: tuple[bytes, dict[str, int]], offset: int, new: bytes
) -> None:
    with pytest.raises(FormatError):
        changed(small[0], SUPERBLOCK_OFFSET + offset, new).tree()


def test_a_superblock_with_a_wrong_checksum_is_refused(small: tuple[bytes, dict[str, int]]) -> None:
    disk = small[0]
    with pytest.raises(FormatError, match="checksum"):
        FileSystem(BytesAt(disk[: SUPERBLOCK_OFFSET + 50] + b"\xff" + disk[SUPERBLOCK_OFFSET + 51 :]))


@pytest.mark.parametrize("entry", [b"\0" * 8, b"\xff" * 8, b"\1" + b"\0" * 7])
def test_a_directory_within_itself_or_off_the_disk_is_refused(
    small: tuple[bytes, dict[str, int]], entry: bytes
) -> None:
    """Slot 1 is the root: an entry of "a" that leads there would make a loop."""
    disk, places = small
    inside = places["a"] + INODE_SIZE + 2 * 12  # its third entry, after "." and ".."
    files = changed(disk, inside, entry + struct.pack("<HB", 39, 2))
    with pytest.raises(FormatError):
        files.tree()


@pytest.mark.parametrize("names", [b"...i/", b"...\0n", b"...in"])
def test_a_name_that_is_none_is_refused(small: tuple[bytes, dict[str, int]], names: bytes) -> None:
    disk, places = small
    place = places["a"] + INODE_SIZE + 3 * 12
    assert disk[place : place + 5] == b"...in"
    files = changed(disk, place, names)
    if names == b"...in":
        files.tree()
        return
    with pytest.raises(FormatError):
        files.tree()


def test_names_out_of_order_are_refused(small: tuple[bytes, dict[str, int]]) -> None:
    disk, places = small
    place = places["root"] + INODE_SIZE + 7 * 12 + 3
    assert disk[place : place + 2] == b"ab"
    with pytest.raises(FormatError, match="after"):
        changed(disk, place, b"ba").tree()


def test_bytes_that_many_inodes_claim_as_their_own_do_not_make_a_tree_of_gigabytes(tmp_path: Path) -> None:
    """Values of 64 KB that lie over the inodes that follow: 4,000 of them are 260 MB, of a disk of 800 KB."""
    count = 4000

    def make(disk: Disk) -> Node:
        return directory({b"%d" % i: disk.file(xattrs=((b"user.name", b"%032d" % i),)) for i in range(count)})

    _, disk, files = built(tmp_path, make)
    content = bytearray(disk.path.read_bytes() + bytes(1 << 17))
    for _, nid, _ in list(files.entries(files.root)):
        place = files.inode(nid).position
        content[place + 2 : place + 4] = ((65532 + 8) // 4 + 1).to_bytes(2, "little")
        entry = place + INODE_SIZE + 12
        content[entry + 2 : entry + 4] = (65532).to_bytes(2, "little")
    claimed = FileSystem(BytesAt(bytes(content)))
    last = claimed.lookup(b"3999")
    assert last is not None
    assert len(claimed.xattrs(last)[0][1]) == 65532
    assert value_or_format_error(claimed.tree) is None


SEEDS: list[bytes] = []


def seeds(folder: Path) -> list[bytes]:
    """Small disks of every kind of node."""

    def make(disk: Disk) -> Node:
        root = linked(disk)
        some = (b"user.some", b"value")
        assert root.children is not None
        for name in [name for name in root.children if name.startswith(b"c")]:
            del root.children[name]
        return directory(
            root.children
            | {b"long": Node(stat.S_IFLNK | 0o777, target=b"t" * 4090), b"n" * 255: disk.file(xattrs=(some,))}
            | {b"fifo": Node(stat.S_IFIFO), b"disk": Node(stat.S_IFBLK, device=(8, 1), xattrs=(some,))}
            | {b"entries": directory({b"entry %d" % i: root.children[b"file"] for i in range(250)})}
        )

    if not SEEDS:
        SEEDS.append(built(folder, make)[1].path.read_bytes())
    return SEEDS


@settings(deadline=None, max_examples=requires.scaled(200, 3_000))
@given(st.data(), st.booleans())
def test_any_bytes_are_a_tree_or_a_format_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, fix: bool
) -> None:
    [seed] = seeds(tmp_path_factory.getbasetemp())
    metadata = int.from_bytes(seed[1064:1068], "little") * BLOCK_SIZE
    hot = [range(SUPERBLOCK_OFFSET, SUPERBLOCK_OFFSET + 88), range(metadata, metadata + 8192)]
    disk = data.draw(damaged([seed], hot=hot))
    disk = with_checksum(disk) if fix else disk

    def read() -> Node:
        files = FileSystem(BytesAt(disk))
        tree = files.tree()
        for path in list(listing(tree))[:50]:
            assert files.lookup(path, follow=False) is not None
        return tree

    value_or_format_error(read)
