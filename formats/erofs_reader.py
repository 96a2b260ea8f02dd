# SPDX-License-Identifier: Apache-2.0
"""EROFS read: paths, directories, content, links and attributes of a disk, or all of it as a tree.

Takes what Metadata writes, and what mkfs.erofs writes but for the content of compressed
files: either form of inode, content behind inodes, chunks, blocks of 512 bytes to 64 KiB.

Promises: any bytes are an answer or a FormatError; no loop, no recursion; memory is
bounded by _PAGES and _DIRECTORY_BLOCKS, by the largest of what is asked for, and by the limits of a
tree. An object may serve several threads as far as its ReadAt does.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from functools import lru_cache

from formats.erofs_disk import (
    CHUNKS,
    COMPACT_INODE_SIZE,
    COMPRESSED,
    FILE_TYPES,
    FLAT_INLINE,
    FLAT_PLAIN,
    HAS_CHECKSUM,
    NO_BLOCK,
    SLOT,
    SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE,
    TARGET_MAX,
    XATTR_UNIT,
    Inode,
    Superblock,
    inode_size,
    parse_directory_block,
    parse_inode,
    parse_xattr_header,
    parse_xattrs,
    superblock_checksum,
    xattr_lengths,
    xattr_name,
)
from formats.errors import FormatError, Unsupported
from formats.readat import ReadAt, check_range
from formats.tree import BLOCK_SIZE, Node, Xattrs

Entry = tuple[bytes, int, int]  # name, nid, type as FILE_TYPES has it

LINKS_MAX = 40  # symbolic links followed on the way to a file: Linux's own limit
PIECE = 1 << 20  # bytes of content yielded at a time
TREE_ENTRIES_MAX = 4 << 20  # names: a tree of so many takes 2 GiB
TREE_BYTES_MAX = 1 << 30  # of inodes, attributes and directories that a tree is made of: 250 for each of its names
_PAGE = 4096  # metadata are read in such, and the last ones kept
_PAGES = 1024
_DIRECTORY_BLOCKS = 16  # parsed ones that are kept
_CHUNK_BITS = 31  # of a chunk format: log2 of the blocks of a chunk
_CHUNK_INDEXES = 32  # of a chunk format: entries of 8 bytes, not of 4


class FileSystem:
    """The EROFS that a disk holds."""

    def __init__(self, disk: ReadAt) -> None:
        self._disk = disk
        self._page = lru_cache(_PAGES)(self._read_page)
        self._directory_block = lru_cache(_DIRECTORY_BLOCKS)(self._parse_directory_block)
        self._superblock = Superblock.parse(disk.read_at(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE))
        self._block_size = self._superblock.block_size
        if self._superblock.compat & HAS_CHECKSUM:
            self._check_superblock()

    @property
    def uuid(self) -> bytes:
        return self._superblock.uuid

    @property
    def root(self) -> Inode:
        """The directory at the top."""
        root = self.inode(self._superblock.root_nid)
        if root.kind != stat.S_IFDIR:
            raise FormatError("the root is no directory", root.position)
        return root

    def inode(self, nid: int) -> Inode:
        """The inode in a slot."""
        position = self._superblock.meta_block * self._block_size + nid * SLOT
        raw = self._bytes(position, COMPACT_INODE_SIZE)
        if inode_size(raw) > len(raw):
            raw += self._bytes(position + len(raw), inode_size(raw) - len(raw))
        return parse_inode(raw, nid, position, self._superblock)

    # ---- paths ----

    def lookup(self, path: bytes, *, follow: bool = True) -> Inode | None:
        """What a path leads to, from the root on and never out of it; None if it leads nowhere, or in circles.

        follow: if the path ends at a symbolic link, that is followed too.
        """
        way = [self.root]
        ahead = [part for part in reversed(path.split(b"/")) if part]
        links = 0
        while ahead:
            name = ahead.pop()
            if name == b"..":
                way = way[:-1] or way
            if name in (b".", b".."):
                continue
            found = self._find(way[-1], name)
            if found is None:
                return None
            if found.kind == stat.S_IFLNK and (ahead or follow or path.endswith(b"/")):
                links += 1
                target = self.readlink(found)
                if links > LINKS_MAX or not target:
                    return None
                way = way[:1] if target.startswith(b"/") else way
                ahead += [part for part in reversed(target.split(b"/")) if part]
            elif found.kind == stat.S_IFDIR:
                way.append(found)
            else:
                return None if ahead or path.endswith(b"/") else found
        return way[-1]

    def entries(self, directory: Inode) -> Iterator[Entry]:
        """What a directory holds, in order of names; without "." and ".."."""
        before = b""
        for place in range(self._directory_blocks(directory)):
            for entry in self._directory_block(directory, place):
                if entry[0] <= before:
                    raise FormatError(f"directory {directory.nid}: {entry[0]!r} after {before!r}", directory.position)
                before = entry[0]
                if before not in (b".", b".."):
                    yield entry

    def _find(self, directory: Inode, name: bytes) -> Inode | None:
        """By halving, as the kernel does."""
        low, high = 0, self._directory_blocks(directory)
        while high - low > 1:
            middle = (low + high) // 2
            if self._directory_block(directory, middle)[0][0] <= name:
                low = middle
            else:
                high = middle
        entries = self._directory_block(directory, low) if high else []
        nid = next((nid for found, nid, _ in entries if found == name), None)
        return None if nid is None else self.inode(nid)

    def _directory_blocks(self, directory: Inode) -> int:
        return -(-directory.size // self._block_size)

    def _parse_directory_block(self, directory: Inode, place: int) -> list[Entry]:
        block = self.read(directory, place * self._block_size, self._block_size)
        try:
            return parse_directory_block(block)
        except FormatError as error:
            raise FormatError(f"directory {directory.nid}: {error.what}", directory.position) from error

    # ---- content ----

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Content of a file or directory: `length` bytes from offset, or what there is before its end."""
        out = bytearray()
        end = min(offset + length, inode.size)
        while offset < end:
            place, run = self._run(inode, offset)
            count = min(run, end - offset)
            out += bytes(count) if place is None else self._bytes(place, count)
            offset += count
        return bytes(out)

    def content(self, inode: Inode) -> Iterator[bytes]:
        """All of it, in order, in pieces of at most PIECE bytes."""
        for offset in range(0, inode.size, PIECE):
            yield self.read(inode, offset, PIECE)

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        if inode.size > TARGET_MAX:
            raise FormatError(f"inode {inode.nid}: a link of {inode.size} bytes", inode.position)
        return self.read(inode, 0, inode.size)

    def start_block(self, inode: Inode) -> int:
        """Where a regular file's content is, in tree.BLOCK_SIZE; 0 if it is not in one run from such a block on."""
        start = inode.word * self._block_size if inode.size and inode.layout == FLAT_PLAIN else 0
        return 0 if start % BLOCK_SIZE else start // BLOCK_SIZE

    def _run(self, inode: Inode, offset: int) -> tuple[int | None, int]:
        """Where content from offset on lies (None: zeros), and for how long it does so."""
        size = self._block_size
        if inode.layout == CHUNKS:
            return self._chunk(inode, offset)
        if inode.layout in COMPRESSED:
            raise Unsupported(f"inode {inode.nid}: its content is compressed by EROFS", inode.position)
        blocks = -(-inode.size // size) - (inode.layout == FLAT_INLINE)
        if offset < blocks * size:
            return inode.word * size + offset, blocks * size - offset
        place, tail = inode.behind + offset % size, inode.size - offset
        if place % size + tail > size:
            raise FormatError(f"inode {inode.nid}: content behind it crosses a block", inode.position)
        return place, tail

    def _chunk(self, inode: Inode, offset: int) -> tuple[int | None, int]:
        if inode.word & 0xFFFF > _CHUNK_BITS | _CHUNK_INDEXES:
            raise FormatError(f"inode {inode.nid}: chunk format {inode.word:#x}", inode.position)
        chunk_size = self._block_size << (inode.word & _CHUNK_BITS)
        unit = 8 if inode.word & _CHUNK_INDEXES else 4
        first = inode.behind + -inode.behind % unit
        number, within = divmod(offset, chunk_size)
        index = self._bytes(first + number * unit, unit)
        if unit == 8 and any(index[:4]):
            raise Unsupported(f"inode {inode.nid}: a chunk on another device", inode.position)
        block = int.from_bytes(index[-4:], "little")
        return None if block == NO_BLOCK else block * self._block_size + within, chunk_size - within

    # ---- extended attributes ----

    def xattrs(self, inode: Inode) -> Xattrs:
        """Its extended attributes, by name."""
        return self._xattrs(inode, {})

    def _xattrs(self, inode: Inode, known: dict[int, tuple[bytes, bytes]]) -> Xattrs:
        """known: shared ones by number, which this adds to."""
        if not inode.xattr_size:
            return ()
        area = self._bytes(inode.position + inode.size_on_disk, inode.xattr_size)
        try:
            numbers, at = parse_xattr_header(area)
            for number in numbers:
                if number not in known:
                    known[number] = self._shared_xattr(number)
            found = parse_xattrs(area, at) + [known[number] for number in numbers]
        except FormatError as error:
            raise FormatError(f"inode {inode.nid}: {error.what}", inode.position) from error
        if len(dict(found)) < len(found):
            raise FormatError(f"inode {inode.nid}: an extended attribute is there twice", inode.position)
        return tuple(sorted(found))

    def _shared_xattr(self, number: int) -> tuple[bytes, bytes]:
        at = self._superblock.xattr_block * self._block_size + number * XATTR_UNIT
        name, value, index = xattr_lengths(self._bytes(at, XATTR_UNIT))
        both = self._bytes(at + XATTR_UNIT, name + value)
        return xattr_name(index, both[:name]), both[name:]

    # ---- everything ----

    def tree(self) -> Node:
        """All of it. A regular file's block is set where its content is in one run from such a block on, else 0."""
        return _Walk(self, self._disk.size).tree()

    # ---- bytes ----

    def _bytes(self, offset: int, length: int) -> bytes:
        """Small ranges from kept pages, others as they are."""
        check_range(offset, length, self._disk.size)
        first, last = offset // _PAGE, (offset + length - 1) // _PAGE
        if first == last and length:
            return self._page(first)[offset % _PAGE :][:length]
        return self._disk.read_at(offset, length)

    def _read_page(self, number: int) -> bytes:
        start = number * _PAGE
        return self._disk.read_at(start, min(_PAGE, self._disk.size - start))

    def _check_superblock(self) -> None:
        """Of blocks that hold nothing but the superblock, the sum goes over a whole one's length."""
        size = self._block_size
        covered = self._disk.read_at(SUPERBLOCK_OFFSET, size - SUPERBLOCK_OFFSET if size > SUPERBLOCK_OFFSET else size)
        if superblock_checksum(covered) != int.from_bytes(covered[4:8], "little"):
            raise FormatError("the checksum of the superblock is wrong", SUPERBLOCK_OFFSET)


class _Walk:
    """One making of a tree, and what it may cost."""

    def __init__(self, files: FileSystem, disk_size: int) -> None:
        self._files = files
        self._bytes_left = min(disk_size, TREE_BYTES_MAX)
        self._entries_left = TREE_ENTRIES_MAX
        self._nodes: dict[int, Node] = {}
        self._xattrs: dict[int, tuple[bytes, bytes]] = {}  # shared ones

    def tree(self) -> Node:
        files = self._files
        top = files.root
        root = self._node(top)
        stack = [(root, top)]
        while stack:
            parent, directory = stack.pop()
            assert parent.children is not None
            for name, nid, kind in files.entries(directory):
                self._spend(0, 1)
                known = self._nodes.get(nid)
                if known is not None and known.children is None:
                    parent.children[name] = known
                    continue
                if known is not None:
                    raise FormatError(f"directory {nid}: it has another name already", directory.position)
                inode = files.inode(nid)
                if kind and kind != FILE_TYPES[inode.kind]:
                    raise FormatError(f"directory {directory.nid}: {name!r} is of another type", directory.position)
                node = parent.children[name] = self._node(inode)
                if node.children is not None:
                    stack.append((node, inode))
        return root

    def _node(self, inode: Inode) -> Node:
        kind = inode.kind
        known = len(self._xattrs)
        xattrs = self._files._xattrs(inode, self._xattrs)
        if len(self._xattrs) > known:
            new = list(self._xattrs.values())[known:]
            self._spend(sum(len(name) + len(value) for name, value in new), 0)
        behind = inode.size if kind in (stat.S_IFDIR, stat.S_IFLNK) else 0
        self._spend(inode.size_on_disk + inode.xattr_size + behind, 0)
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.links, xattrs, device=inode.device)
        if kind == stat.S_IFREG:
            node.size = inode.size
            node.block = self._files.start_block(inode)
        elif kind == stat.S_IFLNK:
            node.target = self._files.readlink(inode)
        elif kind == stat.S_IFDIR:
            node.children = {}
        self._nodes[inode.nid] = node
        return node

    def _spend(self, size: int, entries: int) -> None:
        """What inodes share is counted once for each, so that bytes used again and again do not grow a tree."""
        self._bytes_left -= size
        self._entries_left -= entries
        if self._bytes_left < 0 or self._entries_left < 0:
            raise FormatError("a tree larger than its disk, or than any that can be held")
