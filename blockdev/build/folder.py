# SPDX-License-Identifier: Apache-2.0
"""A directory of this machine as a tree of nodes: a mount, or what an unpacker has written.

Assumes that nobody changes it meanwhile; a file that is another one when it is read is an
error. Symbolic links are never followed. Whoever may not read all of it is refused, and
xattrs of the namespaces `trusted` and `security` are seen by root only: the kernel hides them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from blockdev.errors import DeviceError, UsageError, from_os
from formats.tree import Node, Xattrs

_DOING = "reading a directory failed"
_UNCOUNTED = 1  # links of a directory in a file system that does not count them (btrfs, overlayfs)


class Folder:
    """One side of a comparison (compare.Side)."""

    def __init__(self, path: str) -> None:
        """Read all names and attributes. AccessDenied, NotFound, UsageError."""
        self.name = path
        if not Path(path).is_dir():
            raise UsageError(f"{_DOING}: {path}: no directory")
        try:
            self.root = _tree(path)
        except OSError as error:
            raise from_os(_DOING, error) from None

    def digest(self, path: bytes, node: Node) -> bytes:
        """As compare.Side."""
        place = f"{self.name}/{os.fsdecode(path)}"
        try:
            fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_size != node.size:
                    raise DeviceError(f"{_DOING}: {place}: it was changed meanwhile")
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise from_os(_DOING, error, place) from None


def _tree(top: str) -> Node:
    """All below a directory. A name that leads to an inode met before leads to its node."""
    linked: dict[tuple[int, int], Node] = {}
    root = _node(top, Path(top).stat())
    waiting = [(top, root)]
    while waiting:
        place, parent = waiting.pop()
        parent.children = {}
        with os.scandir(place) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                inode = found.st_dev, found.st_ino
                node = linked.get(inode) or _node(entry.path, found)
                parent.children[os.fsencode(entry.name)] = node
                if stat.S_ISDIR(node.mode):
                    waiting.append((entry.path, node))
                elif node.links > 1:
                    linked[inode] = node
        if parent.links == _UNCOUNTED:
            parent.links = 2 + sum(stat.S_ISDIR(child.mode) for child in parent.children.values())
    return root


def _node(path: str, found: os.stat_result) -> Node:
    mode = found.st_mode
    device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return Node(
        mode=mode,
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_ns=found.st_mtime_ns,
        links=found.st_nlink,
        xattrs=_xattrs(path),
        size=found.st_size if stat.S_ISREG(mode) else 0,
        target=os.fsencode(os.readlink(path)) if stat.S_ISLNK(mode) else b"",  # noqa: PTH115 - Path tidies it up
        device=(os.major(found.st_rdev), os.minor(found.st_rdev)) if device else (0, 0),
    )


def _xattrs(path: str) -> Xattrs:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # a file system that has none
            return ()
        raise
    return tuple(sorted((os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names))
