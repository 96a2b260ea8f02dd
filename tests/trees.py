# SPDX-License-Identifier: Apache-2.0
"""Trees of nodes for tests: rich ones, ones of a real folder, disks that hold them, and what a kernel shows of them.

A listing is {path: facts}; two listings are compared by difference(), which names the
first path and fact that differ, as pytest takes minutes to print two large ones.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from formats.erofs import Metadata
from formats.erofs_reader import FileSystem
from formats.tree import BLOCK_SIZE, Node

SECOND = 1_000_000_000
Facts = dict[str, Any]
Listing = dict[bytes, Facts]

ACL = bytes.fromhex(  # u::rwx u:1000:rwx g::r-x m::rwx o::r-x
    "02000000" + "01000700ffffffff" + "02000700e8030000" + "04000500ffffffff" + "10000700ffffffff" + "20000500ffffffff"
)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


def directory(children: dict[bytes, Node] | None = None, **fields: Any) -> Node:
    """Its links are counted."""
    children = {} if children is None else children
    links = 2 + sum(stat.S_ISDIR(child.mode) for child in children.values())
    return Node(stat.S_IFDIR | fields.pop("mode", 0o755), links=links, children=children, **fields)


class Disk:
    """A disk being filled: contents first, from block 1 on, then the metadata, then block 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents: dict[Node, bytes] = {}
        self._end = 1
        self._file = path.open("wb")

    def file(self, content: bytes = b"", **fields: Any) -> Node:
        """A regular file with its content on the disk."""
        node = Node(stat.S_IFREG | fields.pop("mode", 0o644), size=len(content), **fields)
        if content:
            node.block = self._end
            self._file.seek(self._end * BLOCK_SIZE)
            self._file.write(content)
            self._end += -(-len(content) // BLOCK_SIZE)
        self.contents[node] = content
        return node

    def finish(self, root: Node, parent_uuid: bytes = b"") -> Metadata:
        """Write what describes the files, and close."""
        metadata = Metadata(root, self._end)
        self._file.seek(self._end * BLOCK_SIZE)
        for piece in metadata.pieces():
            self._file.write(piece)
        assert self._file.tell() == (self._end + metadata.blocks) * BLOCK_SIZE
        self._file.seek(0)
        self._file.write(metadata.superblock(parent_uuid))
        self._file.close()
        return metadata


def rich(disk: Disk, names: int = 3000) -> Node:
    """Every kind of node and attribute there is, and names of every sort."""
    random = Random(names)
    root = directory(mtime_ns=1, xattrs=((b"trusted.overlay.opaque", b"y"),))
    add = root.children.__setitem__ if root.children is not None else None
    assert add is not None
    add(b"empty", disk.file())
    add(b"exact", disk.file(random.randbytes(BLOCK_SIZE)))
    add(b"big", disk.file(random.randbytes(100_001), mode=0o6751, uid=3_000_000, gid=4_000_000))
    twice = disk.file(b"one file, three names\n", links=3, mtime_ns=-5 * SECOND + 7)
    add(b"twice", twice)
    add(b"kinds", directory(_kinds(twice), mode=0o1777, uid=0xFFFFFFFE, gid=1 << 31))
    add(b"times", directory({b"%d" % ns: disk.file(mtime_ns=ns) for ns in _TIMES}, mtime_ns=-1))
    add(b"xattrs", directory(_with_xattrs(disk, random)))
    add(b"names", directory({name: disk.file() for name in _names(random, names)}))
    add(b"deep", _deep(disk, 100))
    add(b"sizes", directory({b"%d" % size: _directory_of(disk, size) for size in _DIRECTORY_SIZES}))
    root.links += sum(stat.S_ISDIR(child.mode) for child in (root.children or {}).values())
    return root


_TIMES = (0, 1, -1, 123456789, -1672531200 * SECOND + 1, 1672531200 * SECOND + 123456789, (1 << 33) * SECOND)
_DIRECTORY_SIZES = (3900, 3950, 4032, 4033, 4095, 4096, 4097, 8000, 8191, 8192, 12_345)  # bytes of entries
_TARGETS = (b"x", b"../..", b"/abs/olute", b"t" * 3000, b"t" * 4031, b"t" * 4032, b"t" * 4033, b"t" * 4095, b"\xff\n")


def _kinds(twice: Node) -> dict[bytes, Node]:
    kinds = {
        b"fifo": Node(stat.S_IFIFO | 0o600),
        b"socket": Node(stat.S_IFSOCK | 0o755),
        b"null": Node(stat.S_IFCHR | 0o666, device=(1, 3)),
        b"whiteout": Node(stat.S_IFCHR, device=(0, 0)),
        b"disk": Node(stat.S_IFBLK | 0o660, gid=6, device=(259, 70_000)),
        b"last-device": Node(stat.S_IFBLK, device=(4095, (1 << 20) - 1)),
        b"fifo-twice": Node(stat.S_IFIFO | 0o7777, links=2),
        b"!twice": twice,
        b"\xfftwice": twice,
    }
    kinds[b"fifo-again"] = kinds[b"fifo-twice"]
    return kinds | {b"link%d" % place: Node(stat.S_IFLNK | 0o777, target=to) for place, to in enumerate(_TARGETS)}


def _with_xattrs(disk: Disk, random: Random) -> dict[bytes, Node]:
    capable = (b"security.capability", CAPABILITY)
    shared = tuple((b"user.shared%03d" % i, b"%d" % i) for i in range(300))  # more than an inode can share
    many = tuple((b"user.many%04d" % i, random.randbytes(i)) for i in range(80))
    acls = ((b"system.posix_acl_access", ACL), (b"system.posix_acl_default", ACL))
    large = (b"trusted.large", random.randbytes(60_000))
    long_link = Node(stat.S_IFLNK | 0o777, target=b"t" * 4000, xattrs=((b"trusted.link", b"l" * 100),))
    return {
        b"capable": disk.file(b"#!", mode=0o755, xattrs=(capable,)),
        b"capable-too": disk.file(b"#!", mode=0o755, xattrs=(capable, (b"user.alone", b""))),
        b"shared": disk.file(xattrs=shared),
        b"shared-too": disk.file(xattrs=shared),
        b"many": disk.file(b"x", xattrs=many),
        b"acl": directory(xattrs=acls, mode=0o775),
        b"acl-file": disk.file(mode=0o775, xattrs=acls[:1]),
        b"large": disk.file(xattrs=(large,)),
        b"large-directory": directory({b"in": disk.file()}, xattrs=(large,)),
        b"long-link": long_link,
        b"link": Node(stat.S_IFLNK | 0o777, target=b"capable", xattrs=((b"trusted.link", b"l" * 100),)),
        b"pipe": Node(stat.S_IFIFO | 0o600, xattrs=((b"security.foo", b"\0\xff"), (b"trusted.empty", b""))),
        b"name": disk.file(xattrs=((b"user." + b"n" * 250, b"v"),)),
    }


def _names(random: Random, count: int) -> set[bytes]:
    """Bytes of all kinds, some that sort before "." and "..", some as long as can be."""
    alphabet = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    names = {b"!", b"-", b" ", b"\1", b"...", b"..a", b".a", b".-", b"\n", b"\xff" * 255, b"a" * 255, "\u00e9".encode()}
    while len(names) < count:
        length = random.choice((1, 2, 3, 8, 16, 40, 255))
        names.add(bytes(random.choices(alphabet, k=length)))
    return names - {b".", b".."}


def _deep(disk: Disk, depth: int) -> Node:
    node = directory({b"bottom": disk.file(b"deep")})
    for level in range(depth):
        node = directory({bytes([97 + level % 26]) * 200: node, b"f": disk.file()})
    return node


def _directory_of(disk: Disk, size: int) -> Node:
    """A directory whose entries take this many bytes, if they were in one run: "." and ".." are 27 of them."""
    children: dict[bytes, Node] = {}
    left = size - 27
    while left >= 12 + 5:
        length = min(left - 12, 100) if left < 112 or left >= 112 + 17 else 50
        children[(b"%05d" % len(children)).ljust(length, b"n")] = disk.file()
        left -= 12 + length
    return directory(children)


# ---- listings ----


def facts_of(node: Node, content: bytes | None = None) -> Facts:
    kind = stat.S_IFMT(node.mode)
    size = len(node.target) if kind == stat.S_IFLNK else node.size if kind == stat.S_IFREG else None
    return {
        "mode": oct(node.mode),
        "owner": (node.uid, node.gid),
        "mtime": node.mtime_ns,
        "links": node.links,
        "xattrs": dict(node.xattrs),
        "target": node.target,
        "device": node.device if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
        "size": size,
        "content": None if content is None else sha256(content).hexdigest(),
    }


def listing(root: Node, contents: Mapping[Node, bytes] | None = None) -> Listing:
    """What a tree says. With contents, files must be among them; `same` names the first path of the same node."""
    found: Listing = {}
    seen: dict[Node, bytes] = {}
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        content = contents[node] if contents is not None and stat.S_ISREG(node.mode) else None
        found[path] = {**facts_of(node, content), "same": seen.setdefault(node, path)}
        children = sorted((node.children or {}).items(), reverse=True)
        stack += [(path + b"/" + name, child) for name, child in children]
    return found


def shown(files: FileSystem) -> Listing:
    """What the reader says of a disk, each path looked up by its name."""
    found: Listing = {}
    seen: dict[int, bytes] = {}
    paths = [b""]
    while paths:
        path = paths.pop()
        inode = files.lookup(path, follow=False)
        assert inode is not None, path
        content = b"".join(files.content(inode)) if inode.kind == stat.S_IFREG else None
        target = files.readlink(inode) if inode.kind == stat.S_IFLNK else b""
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.links, files.xattrs(inode), inode.size)
        node.target, node.device = target, inode.device
        found[path] = {**facts_of(node, content), "same": seen.setdefault(inode.nid, path)}
        if inode.kind == stat.S_IFDIR:
            paths += reversed([path + b"/" + name for name, _, _ in files.entries(inode)])
    return found


def mounted(point: Path) -> Listing:
    """What the kernel says of a mounted tree, by names alone, so that each is looked up; no path is too long."""
    found: Listing = {}
    seen: dict[int, bytes] = {}

    def walk(folder: int, path: bytes) -> None:
        for name in sorted(os.listdir(folder), key=os.fsencode):
            raw = path + b"/" + os.fsencode(name)
            found[raw] = _mounted_facts(folder, name, seen, raw)
            if stat.S_ISDIR(int(found[raw]["mode"], 8)):
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                walk(below, raw)
                os.close(below)

    top = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    found[b""] = _mounted_facts(top, ".", seen, b"")
    walk(top, b"")
    os.close(top)
    return found


def _mounted_facts(folder: int, name: str, seen: dict[int, bytes], path: bytes) -> Facts:
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    magic = f"/proc/self/fd/{folder}/{name}"
    xattrs = os.listxattr(magic, follow_symlinks=False)
    content = None
    if kind == stat.S_IFREG:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
            content = sha256(file.read()).hexdigest()
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    return {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "links": status.st_nlink,
        "xattrs": {os.fsencode(xattr): os.getxattr(magic, xattr, follow_symlinks=False) for xattr in xattrs},
        "target": os.fsencode(os.readlink(name, dir_fd=folder)) if kind == stat.S_IFLNK else b"",
        "device": (os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0),
        "size": status.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else None,
        "content": content,
        "same": seen.setdefault(status.st_ino, path),
    }


def difference(found: Listing, wanted: Listing) -> str:
    """The first path and fact that differ; "" if none does."""
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found or path not in wanted:
            return f"{path!r}: only {'wanted' if path in wanted else 'found'}"
        for fact, value in wanted[path].items():
            if found[path][fact] != value:
                return f"{path!r}: {fact}: found {found[path][fact]!r:.200}, wanted {value!r:.200}"
    return ""


@contextmanager
def mount(image: Path, point: Path) -> Iterator[Path]:
    """An EROFS image through a loop device, which ends with the mount."""
    point.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def fsck(image: Path) -> None:
    """fsck.erofs finds nothing wrong: it exits with 0 whatever it finds, but is silent only if that is nothing."""
    found = subprocess.run(["fsck.erofs", image], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", ""), found.stderr
