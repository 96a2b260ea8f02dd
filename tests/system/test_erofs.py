# SPDX-License-Identifier: Apache-2.0
"""EROFS as written, judged by others: fsck.erofs, and the kernel that mounts it and shows every attribute."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from formats.erofs_reader import FileSystem
from formats.errors import FormatError
from formats.readat import BytesAt
from formats.tree import Node
from tests import requires
from tests.trees import Disk, difference, directory, fsck, listing, mount, mounted, rich, shown

requires.requires_mount()
requires.requires_command("fsck.erofs", "mkfs.erofs")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk")


def test_the_kernel_shows_every_attribute_of_a_rich_tree(disk: Disk, tmp_path: Path) -> None:
    root = rich(disk)
    disk.finish(root)
    fsck(disk.path)
    with mount(disk.path, tmp_path / "mnt") as point:
        assert difference(mounted(point), listing(root, disk.contents)) == ""


def test_every_name_of_a_large_directory_is_found(disk: Disk, tmp_path: Path) -> None:
    count = requires.scaled(10_000, 100_000)
    root = directory({b"in": directory({b"entry-%d" % i: disk.file() for i in range(count)}), b"z": disk.file(b"z")})
    disk.finish(root)
    fsck(disk.path)
    with mount(disk.path, tmp_path / "mnt") as point:
        assert difference(mounted(point), listing(root, disk.contents)) == ""


def test_an_empty_tree_mounts(disk: Disk, tmp_path: Path) -> None:
    root = directory(mode=0o700, uid=1, gid=2)
    disk.finish(root)
    fsck(disk.path)
    with mount(disk.path, tmp_path / "mnt") as point:
        assert difference(mounted(point), listing(root, {})) == ""


def test_a_checker_that_finds_something_fails_the_test(disk: Disk) -> None:
    disk.finish(directory())
    with disk.path.open("r+b") as file:
        file.seek(1024 + 4)  # the superblock's checksum
        file.write(b"\xff" * 4)
    with pytest.raises(AssertionError, match="checksum"):
        fsck(disk.path)


def tame(disk: Disk) -> Node:
    """A rich tree without what mkfs.erofs 1.5 cannot take: some names, paths longer than PATH_MAX."""
    root = rich(disk, 0)
    assert root.children is not None
    del root.children[b"deep"]
    root.links -= 1
    root.children[b"names"] = directory({b"n%d" % size: disk.file(b"x" * size) for size in range(0, 9000, 77)})
    xattrs = root.children[b"xattrs"].children
    assert xattrs is not None
    del xattrs[b"name"]
    return root


@pytest.mark.parametrize("options", [[], ["-T", "5"], ["--chunksize=4096"]], ids=["inline", "compact", "chunks"])
def test_what_mkfs_writes_is_read(disk: Disk, tmp_path: Path, options: list[str]) -> None:
    root = tame(disk)
    disk.finish(root)
    out = tmp_path / "made"
    with mount(disk.path, tmp_path / "mnt") as point:
        subprocess.run(["mkfs.erofs", *options, out, point], check=True, capture_output=True)
    wanted = listing(root, disk.contents)
    if "-T" in options:
        wanted = {path: facts | {"mtime": 5_000_000_000} for path, facts in wanted.items()}
    files = FileSystem(BytesAt(out.read_bytes()))
    assert difference(shown(files), wanted) == ""
    assert listing(files.tree()).keys() == wanted.keys()


def test_what_mkfs_compresses_is_listed_and_not_misread(disk: Disk, tmp_path: Path) -> None:
    root = directory({b"f": disk.file(b"again " * 10_000), b"link": disk.file()})
    disk.finish(root)
    out = tmp_path / "made"
    with mount(disk.path, tmp_path / "mnt") as point:
        subprocess.run(["mkfs.erofs", "-zlz4", out, point], check=True, capture_output=True)
    files = FileSystem(BytesAt(out.read_bytes()))
    assert difference(listing(files.tree()), listing(root)) == ""
    inode = files.lookup(b"f")
    assert inode is not None
    with pytest.raises(FormatError, match="compressed"):
        files.read(inode, 0, 1)
