# SPDX-License-Identifier: Apache-2.0
"""What is settled in an ext4: everything that depends on the moment, and nothing else."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from formats import ext4
from formats.errors import FormatError
from tests import requires

SIZE = 64 << 20


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    """As mkfs.ext4 makes it, at no particular moment."""
    requires.requires_command("mkfs.ext4")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    command = ["mkfs.ext4", *ext4.MKFS_OPTIONS, str(path)]
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "MKE2FS_CONFIG": "/dev/null"}
    subprocess.run(command, check=True, env=environment)
    return path.read_bytes()


def superblock(disk: bytes) -> bytes:
    return disk[ext4.SUPERBLOCK_OFFSET :][: ext4.SUPERBLOCK_SIZE]


def test_the_inodes_that_were_used_are_found(disk: bytes) -> None:
    found = ext4.Ext4.parse(superblock(disk))
    assert found == ext4.Ext4(1, SIZE // ext4.BYTES_PER_INODE)
    offset, length = found.descriptors
    ((table, size),) = found.tables(disk[offset : offset + length])
    assert size == 11 * ext4.INODE_SIZE  # the reserved ones, and lost+found
    mode, links = struct.unpack_from("<H24xH", disk, table + ext4.INODE_SIZE)
    assert (mode, links) == (0o40755, 3)


def test_a_settled_superblock_says_nothing_of_its_past(disk: bytes) -> None:
    before = bytearray(superblock(disk))
    used = bytearray(before)
    used[0x2C:0x36] = b"\x99" * 10
    used[0x88:0xC8] = b"/somewhere/mounted".ljust(64, b"\0")
    used[0x178:0x180] = b"\x77" * 8
    settled = ext4.settled_superblock(bytes(used))
    assert settled == ext4.settled_superblock(bytes(before))
    assert settled == ext4.settled_superblock(settled)
    assert struct.unpack_from("<I", settled, 0x30) == (ext4.MOMENT,)
    assert settled[0x38:0x40] == before[0x38:0x40]
    assert settled[0x68:0x78] == before[0x68:0x78]  # UUID


def inode(seed: int, deleted: int = 0) -> bytes:
    raw = bytearray(bytes([seed]) * ext4.INODE_SIZE)
    raw[0x14:0x18] = deleted.to_bytes(4, "little")
    return bytes(raw)


def test_settled_inodes_keep_their_content_and_time_of_modification() -> None:
    settled = ext4.settled_inodes(inode(0xAB) * 3)
    assert settled[: ext4.INODE_SIZE] * 3 == settled
    changed = [at for at in range(ext4.INODE_SIZE) if settled[at] != 0xAB]
    assert changed == [
        *range(0x08, 0x10),  # access and change
        *range(0x14, 0x18),  # deletion, which was 0
        *range(0x24, 0x28),
        *range(0x64, 0x68),
        *range(0x84, 0x88),
        *range(0x8C, 0x9C),
    ]
    moment = ext4.MOMENT.to_bytes(4, "little")
    assert (settled[0x08:0x0C], settled[0x0C:0x10], settled[0x90:0x94]) == (moment,) * 3
    assert ext4.settled_inodes(settled) == settled


def test_of_a_deleted_inode_no_time_stays() -> None:
    table = inode(1) + inode(2, deleted=77)
    settled = ext4.settled_inodes(table)
    assert settled[0x10:0x18] == b"\1" * 4 + bytes(4)
    moment = ext4.MOMENT.to_bytes(4, "little")
    assert settled[ext4.INODE_SIZE + 0x10 : ext4.INODE_SIZE + 0x18] == moment * 2
    assert settled[ext4.INODE_SIZE + 0x88 : ext4.INODE_SIZE + 0x8C] == bytes(4)


@pytest.mark.parametrize(("at", "value"), [(0x38, 0), (0x18, 0), (0x58, 128), (0xFE, 32), (0x20, 0)])
def test_an_ext4_of_another_make_is_refused(disk: bytes, at: int, value: int) -> None:
    other = bytearray(superblock(disk))
    other[at] = value
    if at == 0x20:
        other[0x20:0x24] = bytes(4)
    with pytest.raises(FormatError):
        ext4.Ext4.parse(bytes(other))
