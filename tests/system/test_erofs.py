# SPDX-License-Identifier: Apache-2.0
"""EROFS as written, judged by others: fsck.erofs, and the kernel that mounts it and shows every attribute."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import requires
from tests.trees import Disk, difference, directory, fsck, listing, mount, mounted, rich

requires.requires_mount()
requires.requires_command("fsck.erofs")


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
