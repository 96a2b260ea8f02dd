# SPDX-License-Identifier: Apache-2.0
"""Which file system a disk holds, by the magic number of its superblock."""

from __future__ import annotations

HEAD_SIZE = 2048  # bytes from the start of a disk that hold every magic below

_MAGICS = (
    ("ext4", 1080, b"\x53\xef"),  # ext2 and ext3 too: ext4 mounts them all
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("xfs", 0, b"XFSB"),
    ("squashfs", 0, b"hsqs"),
)


def file_system(head: bytes) -> str | None:
    """The kernel's name of the file system that starts with these HEAD_SIZE bytes; None if none is known."""
    return next((name for name, offset, magic in _MAGICS if head[offset:].startswith(magic)), None)
