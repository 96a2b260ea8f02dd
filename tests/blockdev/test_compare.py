# SPDX-License-Identifier: Apache-2.0
"""verify SRC DST finds any one attribute that was altered, and names path, attribute and both values."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev.build.compare import Equal, compare
from blockdev.build.folder import Folder
from blockdev.errors import CorruptImage, DeviceError, UsageError
from formats.tree import Node
from tests import requires

NOW = 1_700_000_000_123_456_789


@dataclass
class Kept:
    """A side whose contents are in memory, by Node.block."""

    name: str
    root: Node
    contents: dict[int, bytes]

    def digest(self, path: bytes, node: Node) -> bytes:
        return hashlib.sha256(self.contents[node.block]).digest()


def side(name: str) -> Kept:
    """One of each type, links, xattrs, names that are no text."""
    linked = Node(stat.S_IFREG | 0o644, mtime_ns=NOW, links=2, size=3, block=1)
    other = Node(stat.S_IFREG | 0o644, mtime_ns=NOW, links=2, size=3, block=1)
    xattrs = ((b"security.capability", b"\x01\0\0\x02" + bytes(16)), (b"user.a", b"1"))
    deep = Node(stat.S_IFDIR | 0o755, 0, 0, NOW, 2, children={b"file": Node(stat.S_IFREG | 0o600, size=5, block=2)})
    children = {
        b"a": linked,
        b"b": linked,
        b"c": other,
        b"d": other,
        b"char": Node(stat.S_IFCHR | 0o666, device=(1, 3)),
        b"block": Node(stat.S_IFBLK | 0o660, device=(8, 70000)),
        b"dir": deep,
        b"empty": Node(stat.S_IFREG | 0o4755, 3_000_000, 4_000_000, -1),
        b"fifo": Node(stat.S_IFIFO | 0o600),
        b"link": Node(stat.S_IFLNK | 0o777, target=b"a"),
        b"ping": Node(stat.S_IFREG | 0o755, xattrs=xattrs, size=5, block=2),
        b"socket": Node(stat.S_IFSOCK | 0o755),
        b"\xff odd\n": Node(stat.S_IFREG | 0o644),
    }
    root = Node(stat.S_IFDIR | 0o755, mtime_ns=NOW, links=3, children=children)
    return Kept(name, root, {1: b"one", 2: b"first", 3: b"other"})


def child(altered: Kept, name: bytes) -> Node:
    assert altered.root.children
    return altered.root.children[name]


def _mode(altered: Kept) -> None:
    child(altered, b"empty").mode &= ~0o4000


def _type(altered: Kept) -> None:
    child(altered, b"char").mode = stat.S_IFBLK | 0o666


def _owner(altered: Kept) -> None:
    child(altered, b"empty").uid += 1 << 16


def _group(altered: Kept) -> None:
    child(altered, b"empty").gid = 0


def _time(altered: Kept) -> None:
    child(altered, b"empty").mtime_ns += 1


def _time_of_root(altered: Kept) -> None:
    altered.root.mtime_ns -= 1


def _xattr_value(altered: Kept) -> None:
    ping = child(altered, b"ping")
    ping.xattrs = (ping.xattrs[0], (b"user.a", b"2"))


def _xattr_missing(altered: Kept) -> None:
    ping = child(altered, b"ping")
    ping.xattrs = ping.xattrs[1:]


def _xattr_more(altered: Kept) -> None:
    child(altered, b"link").xattrs = ((b"trusted.x", bytes(100)),)


def _count(altered: Kept) -> None:
    child(altered, b"socket").links = 7


def _count_of_directory(altered: Kept) -> None:
    child(altered, b"dir").links = 3


def _which_linked(altered: Kept) -> None:
    assert altered.root.children
    a, c = child(altered, b"a"), child(altered, b"c")
    altered.root.children |= {b"b": c, b"d": a}


def _linked_without_counting(altered: Kept) -> None:
    assert altered.root.children
    plain = Node(stat.S_IFREG | 0o644, mtime_ns=NOW, links=2, size=3, block=1)
    altered.root.children[b"b"] = plain


def _device(altered: Kept) -> None:
    child(altered, b"block").device = (8, 70001)


def _target(altered: Kept) -> None:
    child(altered, b"link").target = b"b"


def _size(altered: Kept) -> None:
    child(altered, b"ping").size = 6


def _content(altered: Kept) -> None:
    child(altered, b"ping").block = 3


def _gone(altered: Kept) -> None:
    deep = child(altered, b"dir")
    assert deep.children
    del deep.children[b"file"]


def _added(altered: Kept) -> None:
    assert altered.root.children
    altered.root.children[b"aa"] = Node(stat.S_IFREG | 0o644)


def _renamed(altered: Kept) -> None:
    assert altered.root.children
    altered.root.children[b"\xfe odd\n"] = altered.root.children.pop(b"\xff odd\n")


ALTERED: list[tuple[Callable[[Kept], None], str]] = [
    (_mode, "'/empty': mode: 4755 in left, 0755 in right"),
    (_type, "'/char': type: character device in left, block device in right"),
    (_owner, "'/empty': owner: 3000000 in left, 3065536 in right"),
    (_group, "'/empty': group: 4000000 in left, 0 in right"),
    (_time, "'/empty': time: -1.999999999 in left, 0.000000000 in right"),
    (_time_of_root, "'/': time: 1700000000.123456789 in left, 1700000000.123456788 in right"),
    (_xattr_value, "'/ping': xattr 'user.a': 0x31 in left, 0x32 in right"),
    (_xattr_missing, f"'/ping': xattr 'security.capability': 0x01000002{'00' * 16} in left, absent in right"),
    (_xattr_more, f"'/link': xattr 'trusted.x': absent in left, 0x{'00' * 64}… (100 bytes) in right"),
    (_count, "'/socket': link count: 1 in left, 7 in right"),
    (_count_of_directory, "'/dir': link count: 2 in left, 3 in right"),
    (_which_linked, "'/b': hard link: of '/a' in left, of no earlier name in right"),
    (_linked_without_counting, "'/b': hard link: of '/a' in left, of no earlier name in right"),
    (_device, "'/block': device number: 8:70000 in left, 8:70001 in right"),
    (_target, "'/link': target: 'a' in left, 'b' in right"),
    (_size, "'/ping': size: 5 in left, 6 in right"),
    (
        _content,
        f"'/ping': content: sha256:{hashlib.sha256(b'first').hexdigest()} in left, "
        f"sha256:{hashlib.sha256(b'other').hexdigest()} in right",
    ),
    (_gone, "'/dir/file': path: file in left, absent in right"),
    (_added, "'/aa': path: absent in left, file in right"),
    (_renamed, "'/\\udcfe odd\\n': path: absent in left, file in right"),
]


def test_equal_sides_are_equal_and_counted() -> None:
    shown: list[tuple[int, int]] = []
    found = compare(side("left"), side("right"), lambda done, total: shown.append((done, total)))
    # Each inode's content counts once: a, c, dir/file, ping.
    assert found == Equal(15, 4, 16)
    assert shown == [(3, 16), (6, 16), (11, 16), (16, 16)]


@pytest.mark.parametrize(("alter", "difference"), ALTERED, ids=[alter.__name__[1:] for alter, _ in ALTERED])
def test_one_altered_attribute_is_named_with_both_values(alter: Callable[[Kept], None], difference: str) -> None:
    altered = side("right")
    alter(altered)
    with pytest.raises(CorruptImage) as refusal:
        compare(side("left"), altered)
    assert str(refusal.value) == f"comparing failed: {difference}"


def test_every_attribute_of_a_node_has_such_a_test() -> None:
    named = {difference.split(": ")[1].split(" '")[0] for _, difference in ALTERED}
    assert named == {
        *("type", "mode", "owner", "group", "time", "link count", "hard link", "size", "target"),
        *("device number", "xattr", "content", "path"),
    }


def test_an_inode_that_hides_its_second_name_is_found() -> None:
    altered = side("right")
    assert altered.root.children
    for name in (b"left", b"right"):
        altered.root.children[name] = child(altered, b"fifo")
    wanted = side("left")
    assert wanted.root.children
    wanted.root.children |= {b"left": Node(stat.S_IFIFO | 0o600), b"right": Node(stat.S_IFIFO | 0o600)}
    with pytest.raises(CorruptImage, match="'/left': hard link: of no earlier name in left, of an inode that has one"):
        compare(wanted, altered)


def test_attributes_of_all_paths_come_before_contents() -> None:
    altered = side("right")
    child(altered, b"a").block = 3
    child(altered, b"socket").mode |= 0o4000
    with pytest.raises(CorruptImage, match="socket': mode"):
        compare(side("left"), altered)
    child(altered, b"socket").mode &= ~0o4000
    with pytest.raises(CorruptImage, match="'/a': content"):
        compare(side("left"), altered)


def test_ten_thousand_directories_in_each_other_are_compared() -> None:
    def chain() -> Kept:
        node = Node(stat.S_IFDIR | 0o755, links=2, children={})
        for _ in range(10_000):
            node = Node(stat.S_IFDIR | 0o755, links=3, children={b"d": node})
        return Kept("deep", node, {})

    assert compare(chain(), chain()).entries == 10_001


# ---- directories ----


def fill(top: Path) -> Path:
    """Everything that whoever runs this may make, in one order of names."""
    (top / "sub/deeper").mkdir(parents=True)
    (top / "file").write_bytes(b"content")
    os.link(top / "file", top / "sub/again")
    (top / "link").symlink_to("./nowhere//at/all")
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(top / "socket"))
    Path(os.fsdecode(os.fsencode(top) + b"/\xff")).write_bytes(b"odd")
    (top / "empty").touch()
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, NOW + number), follow_symlinks=False)
    os.utime(top, ns=(0, NOW))
    return top


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return fill(tmp_path / "one"), fill(tmp_path / "two")


def test_equal_directories_are_equal(folders: tuple[Path, Path]) -> None:
    one, two = folders
    assert compare(Folder(str(one)), Folder(str(two))) == Equal(10, 2, 10)


@pytest.mark.parametrize(
    ("alter", "difference"),
    [
        (lambda two: (two / "sub").chmod(0o700), "'/sub': mode: 0755 in .*one, 0700 in .*two"),
        (lambda two: os.utime(two / "link", ns=(0, 5), follow_symlinks=False), "'/link': time: .* 0.000000005 in"),
        (lambda two: (two / "empty").unlink(), "'/empty': path: file in .*one, absent in .*two"),
        (lambda two: os.utime(two / "fifo", ns=(0, -1)), "'/fifo': time: .* -1.999999999 in"),
    ],
    ids=["mode", "time", "path", "before 1970"],
)
def test_a_difference_between_directories_is_named(
    folders: tuple[Path, Path], alter: Callable[[Path], None], difference: str
) -> None:
    one, two = folders
    alter(two)
    os.utime(two, ns=(0, NOW))
    with pytest.raises(CorruptImage, match=difference):
        compare(Folder(str(one)), Folder(str(two)))


def test_a_byte_that_differs_is_found(folders: tuple[Path, Path]) -> None:
    one, two = folders
    time = (two / "file").stat().st_mtime_ns
    (two / "file").write_bytes(b"conteNt")
    os.utime(two / "file", ns=(0, time))
    with pytest.raises(CorruptImage, match=r"'/file': content: sha256:[0-9a-f]{64} in .*one, sha256:"):
        compare(Folder(str(one)), Folder(str(two)))


def test_a_copy_is_not_a_link(folders: tuple[Path, Path]) -> None:
    one, two = folders
    (two / "sub/again").unlink()
    (two / "sub/again").write_bytes(b"content")
    with pytest.raises(CorruptImage, match=r"'/file': link count: 2 in .*one, 1 in .*two"):
        compare(Folder(str(one)), Folder(str(two)))


def test_xattrs_of_files_are_compared(folders: tuple[Path, Path]) -> None:
    one, two = folders
    for path in folders:
        os.setxattr(path / "file", "user.same", b"\0\1")
    assert compare(Folder(str(one)), Folder(str(two))).entries == 10
    os.setxattr(two / "file", "user.more", b"")
    with pytest.raises(CorruptImage, match=r"'/file': xattr 'user.more': absent in .*one, 0x in .*two"):
        compare(Folder(str(one)), Folder(str(two)))


def test_device_numbers_of_files_are_compared(folders: tuple[Path, Path]) -> None:
    requires.requires_root()
    one, two = folders
    for path, minor in ((one, 3), (two, 70_000)):
        os.mknod(path / "device", stat.S_IFCHR | 0o600, os.makedev(1, minor))
        os.utime(path / "device", ns=(0, NOW))
        os.utime(path, ns=(0, NOW))
    with pytest.raises(CorruptImage, match=r"'/device': device number: 1:3 in .*one, 1:70000 in .*two"):
        compare(Folder(str(one)), Folder(str(two)))


def test_a_file_that_changes_meanwhile_is_no_difference_but_an_error(folders: tuple[Path, Path]) -> None:
    one = Folder(str(folders[0]))
    (folders[0] / "file").write_bytes(b"longer than before")
    with pytest.raises(DeviceError, match="file: it was changed meanwhile"):
        compare(one, Folder(str(folders[1])))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "absent"):
        with pytest.raises(UsageError, match=f"{name}: no directory"):
            Folder(str(tmp_path / name))
