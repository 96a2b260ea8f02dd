# SPDX-License-Identifier: Apache-2.0
"""An EROFS disk as a side of a comparison: what mkfs.erofs makes of a directory equals that directory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from blockdev.build.compare import compare
from blockdev.build.folder import Folder
from blockdev.build.unmounted import Unmounted
from blockdev.errors import CorruptImage, UsageError
from formats.readat import BytesAt
from tests import requires

NOW = 1_700_000_000_123_456_789


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    (top / "sub").mkdir(parents=True)
    (top / "sub/small").write_bytes(b"behind its inode")
    (top / "blocks").write_bytes(bytes(range(256)) * 64)
    (top / "large").write_bytes(b"tail" * 300_000)
    (top / "empty").touch()
    os.link(top / "large", top / "sub/linked")
    (top / "link").symlink_to("sub/small")
    for path in [top, *top.rglob("*")]:
        os.utime(path, ns=(0, NOW), follow_symlinks=False)
    return top


def disk_of(folder: Path, *options: str) -> bytes:
    requires.requires_command("mkfs.erofs")
    disk = folder.with_name("disk")
    subprocess.run(["mkfs.erofs", "--quiet", "-x0", "-Eforce-inode-extended", *options, disk, folder], check=True)
    return disk.read_bytes()


def test_a_disk_equals_the_directory_it_was_made_of(folder: Path) -> None:
    found = compare(Folder(str(folder)), Unmounted("disk", BytesAt(disk_of(folder))))
    assert (found.entries, found.files, found.content) == (8, 3, 16 + 16384 + 1_200_000)


@pytest.mark.parametrize("place", ["blocks", "large"])
def test_one_other_byte_on_the_disk_is_found(folder: Path, place: str) -> None:
    content = (folder / place).read_bytes()[-16:]
    disk = bytearray(disk_of(folder))
    at = disk.rindex(content)
    disk[at + 15] ^= 1
    with pytest.raises(CorruptImage, match=f"'/{place}': content: sha256:"):
        compare(Folder(str(folder)), Unmounted("disk", BytesAt(bytes(disk))))


def test_another_file_system_is_refused_by_name() -> None:
    ext4 = bytes(1080) + b"\x53\xef" + bytes(4096)
    for disk, what in ((ext4, "ext4"), (bytes(4096), "no file system"), (b"", "no file system")):
        with pytest.raises(UsageError, match=f"some disk: it holds {what}"):
            Unmounted("some disk", BytesAt(disk))


def test_what_erofs_compresses_is_not_said_to_be_damaged(folder: Path) -> None:
    (folder / "text").write_bytes(b"again and again\n" * 10_000)
    disk = disk_of(folder, "-zlz4hc")
    with pytest.raises(UsageError, match=r"some disk: inode [0-9]+: its content is compressed by EROFS"):
        compare(Folder(str(folder)), Unmounted("some disk", BytesAt(disk)))


def test_a_damaged_disk_is_named(folder: Path) -> None:
    disk = disk_of(folder)
    with pytest.raises(CorruptImage, match="reading EROFS failed: some disk: "):
        Unmounted("some disk", BytesAt(disk[:2048]))
