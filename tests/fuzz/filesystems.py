# SPDX-License-Identifier: Apache-2.0
"""The fuzz target of the EROFS reader: a disk from its superblock on.

What the reader says of a disk by paths has to be what it says by the tree; and a tree
that the writer takes has to come back from it the same.
"""

from __future__ import annotations

import stat
from contextlib import suppress

from formats.erofs import Metadata
from formats.erofs_disk import COMPRESSED, SUPERBLOCK_OFFSET, superblock_checksum
from formats.erofs_reader import FileSystem
from formats.errors import FormatError
from formats.readat import BytesAt
from formats.tree import Node
from tests.trees import difference, facts_of, listing

FIX = 1  # bit of the first byte: the superblock's checksum is made right
_BLOCK = 4096
_PATHS_MAX = 100
_READ_MAX = 1 << 16


def erofs(content: bytes) -> None:
    """A disk: its bytes from the superblock on, zeros before them."""
    how, written = content[:1], content[1:]
    disk = bytes(SUPERBLOCK_OFFSET) + written.ljust(-(-len(written) // _BLOCK) * _BLOCK, b"\0")
    if how and how[0] & FIX:
        disk = _fixed(disk)
    with suppress(FormatError):
        files = FileSystem(BytesAt(disk))
        _entries(files)
        tree = files.tree()
        _paths(files, tree)
        _written_again(tree)


def _fixed(disk: bytes) -> bytes:
    start = SUPERBLOCK_OFFSET
    size = 1 << (disk[start + 12] & 15) if len(disk) > start + 12 else 0
    covered = disk[start : size if size > start else start + size]
    if len(covered) < 8:
        return disk
    return disk[: start + 4] + superblock_checksum(covered).to_bytes(4, "little") + disk[start + 8 :]


def _entries(files: FileSystem) -> None:
    """Each answer or error by itself, as the first error would end a tree."""
    root = files.root
    with suppress(FormatError):
        for name, nid, _ in files.entries(root):
            with suppress(FormatError):
                inode = files.inode(nid)
                assert inode.nid == nid
                for ask in (files.xattrs, files.readlink):
                    with suppress(FormatError):
                        ask(inode)
                whole = files.read(inode, 0, _READ_MAX)
                assert len(whole) == min(inode.size, _READ_MAX)
                assert files.read(inode, 3, _READ_MAX)[: _READ_MAX - 3] == whole[3:]
                files.lookup(name)


def _paths(files: FileSystem, tree: Node) -> None:
    for path, facts in list(listing(tree).items())[:_PATHS_MAX]:
        inode = files.lookup(path, follow=False)
        assert inode is not None, path
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.links, files.xattrs(inode), inode.size)
        node.target = files.readlink(inode) if inode.kind == stat.S_IFLNK else b""
        node.device = inode.device
        assert facts_of(node).items() <= facts.items(), path
        with suppress(FormatError):
            followed = files.lookup(path)
            assert followed is None or followed.kind != stat.S_IFLNK
        if inode.kind == stat.S_IFREG and inode.layout not in COMPRESSED:
            with suppress(FormatError):
                files.read(inode, 0, _READ_MAX)


def _written_again(tree: Node) -> None:
    stack = [tree]
    while stack:
        node = stack.pop()
        node.block = 1 if node.size else 0
        stack += (node.children or {}).values()
    with suppress(FormatError):
        metadata = Metadata(tree, 1)
        written = b"".join(metadata.pieces())
        again = FileSystem(BytesAt(metadata.superblock(b"") + written)).tree()
        assert difference(listing(again), listing(tree)) == ""
