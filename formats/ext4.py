# SPDX-License-Identifier: Apache-2.0
"""What of an ext4 depends on when it was written, and how to make that the same every time.

For file systems as MKFS_OPTIONS make them: no checksums but those of group descriptors, which
do not cover what is changed here, and no journal. Times of modification are content and stay.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from formats.errors import FormatError

SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_SIZE = 1024
BLOCK_SIZE = 4096
INODE_SIZE = 256
BYTES_PER_INODE = 16384  # mkfs's usual ratio; without a configuration file it would be another
MOMENT = 1_700_000_000  # seconds since 1970: every time that is no content
TIME_MIN, TIME_MAX = -(1 << 31), (1 << 34) - (1 << 31) - 1  # seconds; of inodes of 256 bytes
_UUID = "6f636962-6c6b-4465-8d6f-657874340001"
_HASH_SEED = "6f636962-6c6b-4465-8d6f-657874340002"

_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,uninit_bg,"
    "dir_nlink,extra_isize"
)
_EXTENDED = f"hash_seed={_HASH_SEED},lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard,root_owner=0:0"
# For mkfs.ext4 of e2fsprogs 1.47, on a disk of zeros, with E2FSPROGS_FAKE_TIME=MOMENT.
MKFS_OPTIONS = (
    *("-q", "-F", "-b", str(BLOCK_SIZE), "-I", str(INODE_SIZE), "-i", str(BYTES_PER_INODE), "-m", "0"),
    *("-U", _UUID, "-E", _EXTENDED, "-O", _FEATURES),
)

_MAGIC = b"\x53\xef"
_U32 = struct.Struct("<I")
_DESCRIPTOR_SIZE = 64
_WRITTEN_AT = (0x2C, 0x30, 0x40)  # of the superblock: last mount, write and check
_MOUNTS = slice(0x34, 0x36)
_LAST_MOUNTED = slice(0x88, 0xC8)
_KILOBYTES_WRITTEN = slice(0x178, 0x180)
_HIGH_BYTES = slice(0x274, 0x27A)  # of times

_MOMENTS = (0x08, 0x0C, 0x90)  # of an inode: access, change, creation
_ZEROED = (0x24, 0x64, 0x84, 0x8C, 0x94, 0x98)  # version, generation, and what is finer than a second
_DELETED = 0x14
_MODIFIED, _MODIFIED_FINER = 0x10, 0x88  # content, as long as the inode is in use


@dataclass(frozen=True)
class Ext4:
    """What a superblock says of where inodes are."""

    groups: int
    inodes_per_group: int

    @classmethod
    def parse(cls, superblock: bytes) -> Ext4:
        """FormatError if it is none that MKFS_OPTIONS make."""
        if superblock[0x38:0x3A] != _MAGIC:
            raise FormatError("no ext4", SUPERBLOCK_OFFSET)
        blocks, per_group = _number(superblock, 0x04), _number(superblock, 0x20)
        sizes = 1024 << _number(superblock, 0x18), superblock[0x58] | superblock[0x59] << 8, superblock[0xFE]
        if sizes != (BLOCK_SIZE, INODE_SIZE, _DESCRIPTOR_SIZE) or not per_group:
            raise FormatError("an ext4 that was made in another way", SUPERBLOCK_OFFSET)
        return cls(-(-blocks // per_group), _number(superblock, 0x28))

    @property
    def descriptors(self) -> tuple[int, int]:
        """Where the group descriptors are, and how long: offset and bytes."""
        return BLOCK_SIZE, self.groups * _DESCRIPTOR_SIZE

    def tables(self, descriptors: bytes) -> list[tuple[int, int]]:
        """Offset and length, in bytes, of the inodes that were ever used, of each group that has any."""
        found = []
        for at in range(0, len(descriptors), _DESCRIPTOR_SIZE):
            block = _number(descriptors, at + 0x08) | _number(descriptors, at + 0x28) << 32
            unused = descriptors[at + 0x1C] | descriptors[at + 0x1D] << 8 | descriptors[at + 0x32] << 16
            used = self.inodes_per_group - unused
            if used > 0:
                found.append((block * BLOCK_SIZE, used * INODE_SIZE))
        return found


def settled_superblock(superblock: bytes) -> bytes:
    """The same, as if it had been written at MOMENT and never been mounted."""
    settled = bytearray(superblock)
    for at in _WRITTEN_AT:
        _U32.pack_into(settled, at, MOMENT)
    for place in (_MOUNTS, _LAST_MOUNTED, _KILOBYTES_WRITTEN, _HIGH_BYTES):
        settled[place] = bytes(place.stop - place.start)
    return bytes(settled)


def settled_inodes(table: bytes) -> bytes:
    """The same inodes, with nothing in them that depends on when and in what process they were made."""
    settled = bytearray(table)
    count = len(table) // INODE_SIZE
    moment = _U32.pack(MOMENT)
    for field, value in [*((at, moment) for at in _MOMENTS), *((at, bytes(4)) for at in _ZEROED)]:
        for place in range(4):
            settled[field + place :: INODE_SIZE] = value[place : place + 1] * count
    for start in range(0, len(table), INODE_SIZE):
        if any(table[start + _DELETED : start + _DELETED + 4]):
            for at, value in ((_DELETED, moment), (_MODIFIED, moment), (_MODIFIED_FINER, bytes(4))):
                settled[start + at : start + at + 4] = value
    return bytes(settled)


def _number(content: bytes, at: int) -> int:
    value: int = _U32.unpack_from(content, at)[0]
    return value
