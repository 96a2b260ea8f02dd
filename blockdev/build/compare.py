# SPDX-License-Identifier: Apache-2.0
"""Proving that two file systems are the same: every path, attribute and byte.

The first difference is the error. "First" means: attributes of all paths before contents
of any, since these take long to read; each in the order of paths, names by their bytes.
Sizes of directories are no attribute: every file system counts them its own way.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from blockdev.errors import CorruptImage
from formats.tree import Node

Progress = Callable[[int, int], None]  # bytes compared, and to be compared in all

_SHOWN = 64  # bytes of an xattr's value in a message
_NANOSECONDS = 10**9
_ABSENT = "absent"
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_PERMISSIONS = 0o7777


class Side(Protocol):
    """One of the two: a tree of nodes, and a way to hash what a file holds."""

    name: str
    root: Node

    def digest(self, path: bytes, node: Node) -> bytes:
        """sha256 of a regular file's content. `path` is one of its names, from the root, without a leading slash."""
        ...


@dataclass(frozen=True)
class Equal:
    """What was found to be equal. `entries`: names, the root's too; `content`: bytes of all files, each once."""

    entries: int
    files: int
    content: int


@dataclass
class _Pair:
    """Two nodes with one name. A node that is None has no such name."""

    path: bytes
    left: Node | None
    right: Node | None


@dataclass
class _Links:
    """Which names are links of each other, on one side: a node has the name it was first met by."""

    first: dict[int, bytes] = field(default_factory=dict)  # of nodes that have several names by their own account
    single: set[int] = field(default_factory=set)  # met nodes that have one

    def meet(self, path: bytes, node: Node) -> bytes:
        """The first name of a node; empty if it has several names where it claims to have one."""
        if node.links > 1:
            return self.first.setdefault(id(node), path)
        if id(node) in self.single:
            return b""
        self.single.add(id(node))
        return path


def compare(left: Side, right: Side, progress: Progress | None = None) -> Equal:
    """Both hold the same, or CorruptImage says where they first differ, in what, and both values."""
    entries, files, total = _compare_attributes(left, right)
    done = 0
    for path, ours, theirs in _contents(left.root, right.root):
        found = left.digest(path, ours), right.digest(path, theirs)
        if found[0] != found[1]:
            shown = f"sha256:{found[0].hex()}", f"sha256:{found[1].hex()}"
            raise _different(left, right, path, "content", shown)
        done += ours.size
        if progress:
            progress(done, total)
    return Equal(entries, files, total)


def _compare_attributes(left: Side, right: Side) -> tuple[int, int, int]:
    """All but contents. How many names, how many files that are not empty, and how many bytes these have."""
    entries = files = total = 0
    links = _Links(), _Links()
    for pair in _pairs(left.root, right.root):
        difference = _attribute_of(pair) or _link_of(pair, links)
        if difference:
            raise _different(left, right, pair.path, *difference)
        entries += 1
    for _, node, _ in _contents(left.root, right.root):
        files += 1
        total += node.size
    return entries, files, total


def _pairs(left: Node, right: Node) -> Iterator[_Pair]:
    """Every name of either, in order. Without recursion: a hostile image may be as deep as it likes."""
    waiting = [_Pair(b"", left, right)]
    while waiting:
        pair = waiting.pop()
        yield pair
        ours = (pair.left.children if pair.left else None) or {}
        theirs = (pair.right.children if pair.right else None) or {}
        prefix = pair.path + b"/" if pair.path else b""
        for name in sorted(ours.keys() | theirs.keys(), reverse=True):
            waiting.append(_Pair(prefix + name, ours.get(name), theirs.get(name)))


def _contents(left: Node, right: Node) -> Iterator[tuple[bytes, Node, Node]]:
    """Every file with content once, by its first name. Both trees have the same names and links."""
    met: set[int] = set()
    for pair in _pairs(left, right):
        node, other = pair.left, pair.right
        if node is None or other is None or not stat.S_ISREG(node.mode) or not node.size or id(node) in met:
            continue
        if node.links > 1:
            met.add(id(node))
        yield pair.path, node, other


# ---- attributes ----


def _attribute_of(pair: _Pair) -> tuple[str, tuple[str, str]] | None:
    """The first attribute in which two nodes differ, and both values."""
    left, right = pair.left, pair.right
    if left is None or right is None:
        return "path", (_kind(left) if left else _ABSENT, _kind(right) if right else _ABSENT)
    ours, theirs = _attributes(left), _attributes(right)
    for name, value in ours.items():
        if name not in theirs:  # only where the types differ, and that comes first
            break
        if value != theirs[name]:
            return name, (value, theirs[name])
    return _xattr_of(left, right)


def _attributes(node: Node) -> dict[str, str]:
    """All that a node has to be compared by, but xattrs and names; in the order it is compared in."""
    found = {
        "type": _kind(node),
        "mode": f"{node.mode & _PERMISSIONS:04o}",
        "owner": str(node.uid),
        "group": str(node.gid),
        "time": _time(node.mtime_ns),
        "link count": str(node.links),
    }
    if stat.S_ISREG(node.mode):
        found["size"] = str(node.size)
    elif stat.S_ISLNK(node.mode):
        found["target"] = _shown(node.target)
    elif stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        found["device number"] = "{}:{}".format(*node.device)
    return found


def _xattr_of(left: Node, right: Node) -> tuple[str, tuple[str, str]] | None:
    if left.xattrs == right.xattrs:
        return None
    ours, theirs = dict(left.xattrs), dict(right.xattrs)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"xattr {_shown(name)}", (_value(ours.get(name)), _value(theirs.get(name)))
    return "xattrs", (f"{len(left.xattrs)} of them", f"{len(right.xattrs)} of them")  # a name that is there twice


def _link_of(pair: _Pair, links: tuple[_Links, _Links]) -> tuple[str, tuple[str, str]] | None:
    """Whether both names belong to the same inode as the same earlier names."""
    if pair.left is None or pair.right is None or stat.S_ISDIR(pair.left.mode):
        return None
    left, right = links[0].meet(pair.path, pair.left), links[1].meet(pair.path, pair.right)
    if left == right:
        return None
    return "hard link", (_link(pair.path, left), _link(pair.path, right))


def _link(path: bytes, first: bytes) -> str:
    if not first:
        return "of an inode that has one name by its link count"
    return "of no earlier name" if first == path else f"of {_place(first)}"


def _kind(node: Node) -> str:
    return _KINDS.get(stat.S_IFMT(node.mode), f"type {stat.S_IFMT(node.mode):o}")


def _time(nanoseconds: int) -> str:
    """Seconds since 1970 and their nine decimals, which count upwards before 1970 too, as in struct timespec."""
    return "{}.{:09}".format(*divmod(nanoseconds, _NANOSECONDS))


def _value(value: bytes | None) -> str:
    if value is None:
        return _ABSENT
    cut = value[:_SHOWN].hex()
    return f"0x{cut}" if len(value) <= _SHOWN else f"0x{cut}… ({len(value)} bytes)"


def _shown(text: bytes) -> str:
    """Bytes for a message: all that is no plain text escaped."""
    return repr(text.decode("utf-8", "surrogateescape"))


def _different(left: Side, right: Side, path: bytes, attribute: str, values: tuple[str, str]) -> CorruptImage:
    both = f"{values[0]} in {left.name}, {values[1]} in {right.name}"
    return CorruptImage(f"comparing failed: {_place(path)}: {attribute}: {both}")


def _place(path: bytes) -> str:
    return _shown(b"/" + path)
