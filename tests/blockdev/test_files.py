# SPDX-License-Identifier: Apache-2.0
"""Files of an image without a mount: found as through a mount, or one error that says which and why."""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.errors import CorruptImage, NotFound, UsageError
from blockdev.files import Files
from formats.readat import BytesAt
from formats.tree import BLOCK_SIZE, Node
from tests.trees import Disk, directory, rich

Make = Callable[[Disk], Node]


def files_of(folder: Path, make: Make) -> Files:
    disk = Disk(folder / "disk")
    disk.finish(make(disk))
    return Files(BytesAt(disk.path.read_bytes()), "an-image")


def test_a_walk_meets_every_name_once_in_order(tmp_path: Path) -> None:
    files = files_of(tmp_path, lambda disk: rich(disk, 100))
    walked = list(files.walk(files.find(b"/")))
    paths = [file.path for _, entries in walked for file in entries]
    assert len(paths) == len(set(paths))
    assert [directory.path for directory, _ in walked][:3] == [b"", b"deep", b"deep/" + b"v" * 200]
    for _, entries in walked:
        names = [file.name for file in entries]
        assert names == sorted(names)
    for path in paths[:200]:
        assert files.find(path).path == path


def test_content_comes_in_pieces_and_holes_as_zeros(tmp_path: Path) -> None:
    content = bytes(3 << 20) + b"end"
    files = files_of(tmp_path, lambda disk: directory({b"f": disk.file(content)}))
    pieces = list(files.content(files.find(b"f")))
    assert max(map(len, pieces)) <= 1 << 20
    assert (b"".join(pieces) == content) is True


@pytest.mark.parametrize("path", [b"no", b"d/no", b"f/", b"f/x", b"loop", b"\xff"])
def test_a_path_that_leads_nowhere_is_named(tmp_path: Path, path: bytes) -> None:
    loop = Node(stat.S_IFLNK | 0o777, target=b"loop")
    files = files_of(tmp_path, lambda disk: directory({b"d": directory(), b"f": disk.file(), b"loop": loop}))
    with pytest.raises(NotFound, match="an-image: /"):
        files.find(path)


@pytest.mark.parametrize(("path", "why"), [(b"d", "directory"), (b"fifo", "no regular file"), (b"dev", "no regular")])
def test_what_is_no_regular_file_is_refused_before_anything_is_read(tmp_path: Path, path: bytes, why: str) -> None:
    device = Node(stat.S_IFCHR, device=(1, 3))
    kinds = {b"d": directory(), b"fifo": Node(stat.S_IFIFO), b"dev": device}
    files = files_of(tmp_path, lambda disk: directory(kinds))
    with pytest.raises(UsageError, match=why):
        files.content(files.find(path))


@pytest.mark.parametrize(
    ("disk", "why"),
    [
        (bytes(1080) + b"\x53\xef" + bytes(4096), "is ext4"),
        (b"hsqs" + bytes(4096), "is squashfs"),
        (bytes(8192), "no file system"),
        (b"x" * 100, "no file system"),
        (b"", "no file system"),
    ],
)
def test_another_file_system_is_named(disk: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Files(BytesAt(disk), "an-image")


def test_a_broken_superblock_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="an-image"):
        Files(BytesAt(bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(4096)), "an-image")


def test_a_feature_that_is_not_known_is_not_said_to_be_damage(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    disk.finish(directory({}))
    content = bytearray(disk.path.read_bytes())
    content[1024 + 80] = 0x40
    with pytest.raises(UsageError, match="an-image: /: EROFS features 0x40"):
        Files(BytesAt(bytes(content)), "an-image")


def test_directories_that_lead_into_each_other_end(tmp_path: Path) -> None:
    """An entry of /a/b is made to lead to the root again."""
    disk = Disk(tmp_path / "disk")
    disk.finish(directory({b"a": directory({b"b": directory()})}))
    content = bytearray(disk.path.read_bytes())
    files = Files(BytesAt(bytes(content)), "an-image")
    a = files.find(b"a").inode
    third = a.position + 64 + 2 * 12
    assert struct.unpack_from("<Q", content, third)[0] == files.find(b"a/b").inode.nid
    struct.pack_into("<Q", content, third, files.find(b"/").inode.nid)
    looped = Files(BytesAt(bytes(content)), "an-image")
    with pytest.raises(CorruptImage, match="into each other"):
        list(looped.walk(looped.find(b"/")))


def test_a_file_off_the_disk_is_corrupt(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    node = disk.file(b"x" * 5)
    node.block, node.size = 1 << 20, BLOCK_SIZE
    disk.finish(directory({b"f": node}))
    files = Files(BytesAt(disk.path.read_bytes()), "an-image")
    with pytest.raises(CorruptImage, match="/f: "):
        list(files.content(files.find(b"f")))
