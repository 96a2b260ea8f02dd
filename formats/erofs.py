# SPDX-License-Identifier: Apache-2.0
"""A tree of nodes as EROFS metadata: inodes, directories, links and attributes of all of it in one range of blocks.

File data lie elsewhere on the same disk; nodes say where. No feature is used that a kernel has to know of
but the first version's: 4096-byte blocks, extended inodes, files in whole blocks, small directories and
links within their inodes. docs/formats/erofs.md has the bytes.

Promises: equal trees give equal bytes, whatever the order they grew in; nothing is written before all of
the tree is known to fit the format. Assumes a tree that does not change meanwhile, and says nothing of whether
its link counts are right.
"""

from __future__ import annotations

import hashlib
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from formats.erofs_disk import (
    BLOCKS_MAX,
    FILE_TYPES,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE_SIZE,
    NO_BLOCK,
    SLOT,
    UUID_SIZE,
    XATTR_UNIT,
    Content,
    Superblock,
    build_inode,
    build_xattr,
    check_name,
    check_node,
    directory_blocks,
    directory_extent,
    encoded_device,
    xattr_area,
)
from formats.errors import FormatError
from formats.tree import BLOCK_SIZE, Node

_PIECE = 256 << 10  # bytes yielded at a time, about
_FIRST_SLOT = 1  # slot 0 would be inode number 0, which readdir(3) takes for an entry that is gone
_DOT, _DOTS = b".", b".."


@dataclass(slots=True, eq=False)
class _Directory:
    """A directory on its way into the metadata. The root is its own parent."""

    node: Node
    parent: _Directory | None
    name: bytes
    size: int = 0  # of its entries
    block: int = NO_BLOCK  # where its full blocks start
    blocks: int = 0  # of those
    inline: bool = True  # what does not fill a block lies behind the inode; else it has a block too

    @property
    def children(self) -> dict[bytes, Node]:
        return self.node.children or {}

    def names(self) -> list[bytes]:
        """Of all entries, in their order."""
        return sorted([*self.children, _DOT, _DOTS])

    def path(self, name: bytes) -> str:
        """An entry's, from the root, for people."""
        parts, at = [name], self
        while at.parent:
            parts, at = [at.name, *parts], at.parent
        return "/" + b"/".join(parts).decode("utf-8", "backslashreplace")


class Metadata:
    """The metadata of the tree below `root`, laid out from `first_block` of the disk on. Not thread-safe."""

    def __init__(self, root: Node, first_block: int) -> None:
        """FormatError names the file and what of it EROFS cannot hold."""
        self._first_block = first_block
        self._nids: dict[Node, int] = {}
        self._order: list[Node | _Directory] = []  # as inodes lie
        self._areas: Counter[tuple[bytes, bytes]] = Counter()
        self._gather(root)
        self._shared, self._shared_area = _share(self._areas)
        self._long_links: list[Node] = []  # whose targets have a block of their own
        inode_blocks = self._place_inodes()
        self._xattr_block = self._place_blocks(first_block + inode_blocks)
        end = self._xattr_block + _blocks(len(self._shared_area))
        if not 0 < first_block < end <= BLOCKS_MAX:
            raise FormatError(f"metadata from block {first_block} to {end}: at most {BLOCKS_MAX} can be addressed")
        self._blocks = end - first_block
        self._digest = b""
        self._uuid = b""

    @property
    def blocks(self) -> int:
        """How many of BLOCK_SIZE it takes."""
        return self._blocks

    @property
    def inodes(self) -> int:
        return len(self._order)

    @property
    def uuid(self) -> bytes:
        """The file system's, which superblock() found."""
        return self._uuid

    def pieces(self) -> Iterator[bytes]:
        """All of the metadata in order: blocks * BLOCK_SIZE bytes."""
        digest = hashlib.sha256()
        piece = bytearray()
        for part in self._parts():
            piece += part
            if len(piece) >= _PIECE:
                digest.update(piece)
                yield bytes(piece)
                piece.clear()
        digest.update(piece)
        self._digest = digest.digest()
        yield bytes(piece)

    def superblock(self, parent_uuid: bytes) -> bytes:
        """Block 0 of the disk, once pieces() has been taken to its end.

        The UUID is the first half of the sha256 of parent_uuid and the metadata's sha256.
        """
        assert self._digest, "pieces() comes first"
        self._uuid = hashlib.sha256(parent_uuid + self._digest).digest()[:UUID_SIZE]
        root = self._order[0]
        return Superblock(
            root_nid=self._nids[root.node if isinstance(root, _Directory) else root],
            inodes=self.inodes,
            blocks=self._first_block + self._blocks,
            meta_block=self._first_block,
            xattr_block=self._xattr_block,
            uuid=self._uuid,
        ).build()

    # ---- layout ----

    def _gather(self, root: Node) -> None:
        """Check every node and put it in its place: a directory, its files, then its directories in turn."""
        if not stat.S_ISDIR(root.mode):
            raise FormatError("/: the root is no directory")
        top = _Directory(root, None, b"")
        self._enter(root, top, b"")
        stack = [top]
        while stack:
            directory = stack.pop()
            self._order.append(directory)
            below: list[_Directory] = []
            for name in sorted(directory.children):
                child = directory.children[name]
                if not self._enter(child, directory, name):
                    continue
                if stat.S_ISDIR(child.mode):
                    below.append(_Directory(child, directory, name))
                else:
                    self._order.append(child)
            stack += reversed(below)

    def _enter(self, node: Node, directory: _Directory, name: bytes) -> bool:
        """Whether this is the first of the node's names."""
        try:
            if directory.node is not node:
                check_name(name)
            if node in self._nids:
                if stat.S_ISDIR(node.mode):
                    raise FormatError("a directory has another name already")
                return False
            check_node(node)
            if node.xattrs:
                self._areas.update(node.xattrs)
                xattr_area(node.xattrs, {})
        except FormatError as error:
            raise FormatError(f"{directory.path(name)}: {error.what}") from None
        self._nids[node] = 0
        return True

    def _place_inodes(self) -> int:
        """Give each inode its slot; how many blocks they take. What is read at once never crosses a block."""
        at = _FIRST_SLOT * SLOT
        for item in self._order:
            node = item.node if isinstance(item, _Directory) else item
            fixed = INODE_SIZE + len(xattr_area(node.xattrs, self._shared))
            tail = 0
            if isinstance(item, _Directory):
                tail = _measure(item, BLOCK_SIZE - fixed)
            elif node.target and fixed + len(node.target) <= BLOCK_SIZE:
                tail = len(node.target)
            elif node.target:
                self._long_links.append(node)
            together = fixed + tail if tail else INODE_SIZE
            if at % BLOCK_SIZE + together > BLOCK_SIZE:
                at += -at % BLOCK_SIZE
            self._nids[node] = at // SLOT
            at += fixed + tail
            at += -at % SLOT
        return _blocks(at)

    def _place_blocks(self, at: int) -> int:
        """Give directories and long links their blocks from `at` on; the first block after them."""
        for item in self._order:
            if isinstance(item, _Directory) and item.blocks:
                item.block = at
                at += item.blocks
        self._first_long_link = at
        return at + len(self._long_links)

    # ---- bytes ----

    def _parts(self) -> Iterator[bytes]:
        at = 0
        long_links = {node: self._first_long_link + place for place, node in enumerate(self._long_links)}
        for item in self._order:
            node = item.node if isinstance(item, _Directory) else item
            area = xattr_area(node.xattrs, self._shared)
            content, tail = self._content(item, long_links)
            start = self._nids[node] * SLOT
            part = bytes(start - at) + build_inode(node, content, len(area)) + area + tail
            at += len(part)
            yield part
        yield bytes(-at % BLOCK_SIZE)
        for item in self._order:
            if isinstance(item, _Directory) and item.blocks:
                yield from self._full_blocks(item)
        for node in self._long_links:
            yield node.target.ljust(BLOCK_SIZE, b"\0")
        yield self._shared_area.ljust(_blocks(len(self._shared_area)) * BLOCK_SIZE, b"\0")

    def _content(self, item: Node | _Directory, long_links: dict[Node, int]) -> tuple[Content, bytes]:
        """Where the content is, and what of it lies behind the inode."""
        if isinstance(item, _Directory):
            layout = FLAT_INLINE if item.inline else FLAT_PLAIN
            tail = self._last_block(item) if item.inline else b""
            return Content(item.size, layout, item.block), tail
        if item.target and item in long_links:
            return Content(len(item.target), FLAT_PLAIN, long_links[item]), b""
        if item.target:
            return Content(len(item.target), FLAT_INLINE, NO_BLOCK), item.target
        if stat.S_ISREG(item.mode):
            return Content(item.size, FLAT_PLAIN, item.block if item.size else 0), b""
        return Content(0, FLAT_PLAIN, encoded_device(item.device)), b""

    def _entries(self, directory: _Directory) -> Iterator[bytes]:
        special = {_DOT: directory.node, _DOTS: (directory.parent or directory).node}
        named = ((name, special.get(name) or directory.children[name]) for name in directory.names())
        return directory_blocks((name, self._nids[node], FILE_TYPES[stat.S_IFMT(node.mode)]) for name, node in named)

    def _last_block(self, directory: _Directory) -> bytes:
        *_, last = self._entries(directory)
        return last

    def _full_blocks(self, directory: _Directory) -> Iterator[bytes]:
        for place, block in enumerate(self._entries(directory)):
            if place < directory.blocks:
                yield block.ljust(BLOCK_SIZE, b"\0")


def _blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)


def _measure(directory: _Directory, room: int) -> int:
    """Find out how large a directory is; how much of it goes into the room behind its inode."""
    full, used = directory_extent(directory.names())
    directory.size = full * BLOCK_SIZE + used
    directory.inline = used <= room
    directory.blocks = full if directory.inline else full + 1
    return used if directory.inline else 0


def _share(found: Counter[tuple[bytes, bytes]]) -> tuple[dict[tuple[bytes, bytes], int], bytes]:
    """Attributes that several inodes have: their numbers, and the area that holds them."""
    numbers: dict[tuple[bytes, bytes], int] = {}
    area = bytearray()
    for xattr in sorted(xattr for xattr, count in found.items() if count > 1):
        numbers[xattr] = len(area) // XATTR_UNIT
        area += build_xattr(*xattr)
    return numbers, bytes(area)
