# SPDX-License-Identifier: Apache-2.0
"""A file system as a tree of nodes: what the tars of layers add up to, and what EROFS holds."""

from __future__ import annotations

from dataclasses import dataclass

Xattrs = tuple[tuple[bytes, bytes], ...]  # full names and values, sorted by name

BLOCK_SIZE = 4096  # bytes; of the disk's file systems


@dataclass(slots=True, eq=False)
class Node:
    """One inode. Names are the parent's: a node with several names is one object under all of them."""

    mode: int  # st_mode: type and permissions
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0  # nanoseconds since 1970; negative before
    links: int = 1  # names that lead here; of a directory, 2 and its subdirectories
    xattrs: Xattrs = ()
    size: int = 0  # bytes of a regular file
    block: int = 0  # of a regular file that is not empty: where its content starts on the disk, in BLOCK_SIZE
    target: bytes = b""  # of a symbolic link
    device: tuple[int, int] = (0, 0)  # major and minor, of a character or block device
    children: dict[bytes, Node] | None = None  # by name, of a directory
