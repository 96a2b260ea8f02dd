# SPDX-License-Identifier: Apache-2.0
"""The structures of EROFS as bytes, both ways: superblock, inodes, directory entries, extended attributes.

Builders write what docs/formats/erofs.md describes and raise FormatError for what EROFS
has no bytes for; parsers take what other writers of uncompressed images write as well.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from formats.crc32c import crc32c
from formats.errors import FormatError, Unsupported
from formats.tree import BLOCK_SIZE, Node, Xattrs

MAGIC = 0xE0F5E1E2
SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_SIZE = 128
SLOT = 32  # bytes; a nid counts them from the start of the metadata
INODE_SIZE = 64  # extended
COMPACT_INODE_SIZE = 32
UUID_SIZE = 16
BLOCKS_MAX = 0xFFFFFFFF  # of a disk: block addresses have 32 bits, and the last one means none
NO_BLOCK = 0xFFFFFFFF
ROOT_NID_MAX = 0xFFFF

HAS_CHECKSUM = 1 << 0  # feature_compat
HAS_MTIME = 1 << 1  # inodes carry the time of modification
_KNOWN_INCOMPAT = 0x3F  # chunks, devices, and what matters to compressed files alone

FLAT_PLAIN = 0  # layouts of an inode's content
COMPRESSED = (1, 3)
FLAT_INLINE = 2
CHUNKS = 4

NAME_MAX = 255
TARGET_MAX = 4095  # bytes of a symbolic link: Linux follows no longer ones
ID_MAX = 0xFFFFFFFE  # of users and groups: Linux takes the one above for none
XATTR_VALUE_MAX = 0xFFFF
XATTR_HEADER_SIZE = 12
XATTR_UNIT = 4
SHARED_MAX = 255  # of one inode
_SIZE_MAX = (1 << 63) - 1  # bytes of a file
_BLOCK_BITS = range(9, 17)
_XATTR_AREA_MAX = XATTR_HEADER_SIZE + (0xFFFF - 1) * XATTR_UNIT
_MAJOR_MAX = (1 << 12) - 1
_MINOR_MAX = (1 << 20) - 1
_TIME_MAX = (1 << 63) - 1  # seconds
_SECOND = 1_000_000_000  # nanoseconds

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_INODE = struct.Struct("<HHHxxQIIIIqII16x")
_COMPACT = struct.Struct("<HHHHIIIIHH4x")
_DIRENT = struct.Struct("<QHBx")
_XATTR_HEADER = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")
DIRENT_SIZE = _DIRENT.size
_ACL_HEADER = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_VERSION = 2
_ACL_TAGS = {1, 2, 4, 8, 16, 32}  # owner, a user, group, a group, mask, others

FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}

# What a name starts with -> its index. Linux shows attributes of no other index, and these two only as a whole.
_PREFIXES = {b"user.": 1, b"trusted.": 4, b"security.": 6}
_WHOLE_NAMES = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_STARTS = {index: start for starts in (_PREFIXES, _WHOLE_NAMES) for start, index in starts.items()}


@dataclass(frozen=True)
class Superblock:
    """What describes the file system. Times in seconds and nanoseconds; addresses in blocks."""

    root_nid: int
    inodes: int
    blocks: int
    meta_block: int
    xattr_block: int
    uuid: bytes
    block_bits: int = BLOCK_SIZE.bit_length() - 1
    compat: int = HAS_CHECKSUM | HAS_MTIME
    incompat: int = 0
    epoch: int = 0
    epoch_ns: int = 0

    @property
    def block_size(self) -> int:
        return 1 << self.block_bits

    def build(self) -> bytes:
        """Block 0, with its checksum; of BLOCK_SIZE."""
        if self.root_nid > ROOT_NID_MAX:
            raise FormatError(f"root directory in slot {self.root_nid}: at most {ROOT_NID_MAX} can be said")
        block = bytearray(BLOCK_SIZE)
        _SUPERBLOCK.pack_into(
            block,
            SUPERBLOCK_OFFSET,
            *(MAGIC, 0, self.compat, self.block_bits, 0, self.root_nid, self.inodes, self.epoch, self.epoch_ns),
            *(self.blocks, self.meta_block, self.xattr_block, self.uuid, bytes(16), self.incompat),
            *(0, 0, 0, 0, 0, 0, 0),
        )
        checksum = crc32c(0xFFFFFFFF, memoryview(block)[SUPERBLOCK_OFFSET:])
        block[SUPERBLOCK_OFFSET + 4 : SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
        return bytes(block)

    @classmethod
    def parse(cls, superblock: bytes) -> Superblock:
        """SUPERBLOCK_SIZE bytes; its checksum is the caller's to look at."""
        magic, _, compat, bits, _, root_nid, *numbers, uuid, _, incompat = _SUPERBLOCK.unpack(superblock)[:15]
        inodes, epoch, epoch_ns, blocks, meta_block, xattr_block = numbers
        if magic != MAGIC:
            raise FormatError("no EROFS magic", SUPERBLOCK_OFFSET)
        if bits not in _BLOCK_BITS:
            raise FormatError(f"blocks of 2^{bits} bytes", SUPERBLOCK_OFFSET + 12)
        if incompat & ~_KNOWN_INCOMPAT:
            raise Unsupported(f"EROFS features {incompat:#x}: at most {_KNOWN_INCOMPAT:#x} known", 1104)
        addresses = (root_nid, inodes, blocks, meta_block, xattr_block)
        return cls(*addresses, uuid, bits, compat, incompat, epoch, epoch_ns)


def superblock_checksum(content: bytes) -> int:
    """Of what it covers: the bytes from SUPERBLOCK_OFFSET to the end of that block."""
    return crc32c(0xFFFFFFFF, content[:4] + bytes(4) + content[8:])


# ---- inodes ----


@dataclass(frozen=True, slots=True)
class Inode:
    """An inode as it was found. Sizes and positions in bytes."""

    nid: int
    position: int  # of it on the disk
    size_on_disk: int
    xattr_size: int  # of what follows it
    layout: int
    word: int  # what goes with the layout, or with the type
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    size: int  # of its content

    @property
    def kind(self) -> int:
        """As stat.S_IFMT() has it."""
        return stat.S_IFMT(self.mode)

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor; zeros if it is no device."""
        return decoded_device(self.word) if self.kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0)

    @property
    def behind(self) -> int:
        """Where what follows inode and attributes is."""
        return self.position + self.size_on_disk + self.xattr_size


def inode_size(start: bytes) -> int:
    """How long an inode is that starts with these bytes."""
    return INODE_SIZE if start[0] & 1 else COMPACT_INODE_SIZE


def parse_inode(raw: bytes, nid: int, position: int, superblock: Superblock) -> Inode:
    """An inode of inode_size() bytes, of either form."""
    if len(raw) == INODE_SIZE:
        form, count, mode, size, word, _, uid, gid, seconds, nanoseconds, links = _INODE.unpack(raw)
    else:
        form, count, mode, links, size, seconds, word, _, uid, gid = _COMPACT.unpack(raw)
        seconds, nanoseconds = seconds + superblock.epoch, superblock.epoch_ns
    layout = form >> 1
    if layout > CHUNKS or stat.S_IFMT(mode) not in FILE_TYPES or size > _SIZE_MAX or nanoseconds >= _SECOND:
        raise FormatError(f"inode {nid}: format {form:#x}, mode {mode:o}, size {size}, {nanoseconds} ns", position)
    xattr_size = XATTR_HEADER_SIZE + (count - 1) * XATTR_UNIT if count else 0
    time = seconds * _SECOND + nanoseconds
    return Inode(nid, position, len(raw), xattr_size, layout, word, mode, uid, gid, time, links, size)


def encoded_device(device: tuple[int, int]) -> int:
    """A device number as Linux writes it in 32 bits."""
    major, minor = device
    if not (0 <= major <= _MAJOR_MAX and 0 <= minor <= _MINOR_MAX):
        raise FormatError(f"device {major}:{minor}: Linux has 12 bits for the first number and 20 for the second")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decoded_device(encoded: int) -> tuple[int, int]:
    """Major and minor."""
    return encoded >> 8 & _MAJOR_MAX, encoded & 0xFF | encoded >> 12 & 0xFFF00


def check_node(node: Node) -> None:
    """FormatError unless an inode can hold all of the node; its extended attributes are looked at elsewhere."""
    kind = stat.S_IFMT(node.mode)
    if kind not in FILE_TYPES or node.mode >> 16:
        raise FormatError(f"mode {node.mode:o}: no type of file")
    if not (0 <= node.uid <= ID_MAX and 0 <= node.gid <= ID_MAX):
        raise FormatError(f"owner {node.uid}:{node.gid}: not from 0 to {ID_MAX}")
    if not 0 < node.links <= 0xFFFFFFFF:
        raise FormatError(f"{node.links} links")
    if not -_TIME_MAX <= node.mtime_ns // _SECOND <= _TIME_MAX:
        raise FormatError(f"modified at {node.mtime_ns} ns: more than 64 bits of seconds")
    if kind == stat.S_IFREG:
        blocks = -(-node.size // BLOCK_SIZE)
        if node.size < 0 or (blocks and not 0 < node.block <= BLOCKS_MAX - blocks):
            raise FormatError(f"{node.size} bytes at block {node.block}: at most {BLOCKS_MAX} blocks can be addressed")
    elif kind == stat.S_IFLNK:
        if not 0 < len(node.target) <= TARGET_MAX or b"\0" in node.target:
            raise FormatError(f"target of {len(node.target)} bytes: 1 to {TARGET_MAX} can be followed, without NUL")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        encoded_device(node.device)


def check_name(name: bytes) -> None:
    """FormatError unless Linux can look the name up in a directory."""
    if not 0 < len(name) <= NAME_MAX or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise FormatError(f"{len(name)} bytes that are no name of a file")


@dataclass(frozen=True)
class Content:
    """Where an inode's content is: its size in bytes, its layout, and the word that goes with that."""

    size: int
    layout: int
    word: int


def build_inode(node: Node, content: Content, xattr_size: int) -> bytes:
    """INODE_SIZE bytes of an extended inode, for a checked node."""
    seconds, nanoseconds = divmod(node.mtime_ns, _SECOND)
    return _INODE.pack(
        *(1 | content.layout << 1, xattr_count(xattr_size), node.mode, content.size, content.word, 0),
        *(node.uid, node.gid, seconds, nanoseconds, node.links),
    )


# ---- directories ----


def directory_extent(names: Iterable[bytes]) -> tuple[int, int]:
    """How many blocks are full, and how many bytes of the last one are used, for names in order."""
    full, used = 0, 0
    for name in names:
        length = DIRENT_SIZE + len(name)
        if used + length > BLOCK_SIZE:
            full, used = full + 1, 0
        used += length
    return full, used


def directory_blocks(entries: Iterable[tuple[bytes, int, int]]) -> Iterator[bytes]:
    """The blocks of a directory, without what pads them: of (name, nid, FILE_TYPES) in order of names."""
    gathered: list[tuple[bytes, int, int]] = []
    used = 0
    for entry in entries:
        length = DIRENT_SIZE + len(entry[0])
        if used + length > BLOCK_SIZE:
            yield _directory_block(gathered)
            gathered, used = [], 0
        gathered.append(entry)
        used += length
    yield _directory_block(gathered)


def _directory_block(entries: list[tuple[bytes, int, int]]) -> bytes:
    place = len(entries) * DIRENT_SIZE
    block = bytearray()
    for name, nid, kind in entries:
        block += _DIRENT.pack(nid, place, kind)
        place += len(name)
    return bytes(block) + b"".join(name for name, _, _ in entries)


def parse_directory_block(block: bytes) -> list[tuple[bytes, int, int]]:
    """The entries of one block, cut at the directory's end: (name, nid, type)."""
    count = _DIRENT.unpack_from(block)[1] // DIRENT_SIZE if len(block) >= DIRENT_SIZE else 0
    if not 0 < count * DIRENT_SIZE < len(block):
        raise FormatError("a block without entries")
    records = list(_DIRENT.iter_unpack(block[: count * DIRENT_SIZE]))
    places = [place for _, place, _ in records]
    last_end = block.find(b"\0", places[-1])
    ends = [*places[1:], len(block) if last_end < 0 else last_end]
    if places[0] != count * DIRENT_SIZE:
        raise FormatError(f"names from byte {places[0]} after {count} entries")
    entries: list[tuple[bytes, int, int]] = []
    for (nid, place, kind), end in zip(records, ends, strict=True):
        name = block[place:end] if place < end else b""
        if not 0 < len(name) <= NAME_MAX or b"/" in name or b"\0" in name:
            raise FormatError(f"entry {len(entries)} of a block: {name!r:.80} is no name")
        entries.append((name, nid, kind))
    return entries


# ---- extended attributes ----


def build_xattr(name: bytes, value: bytes) -> bytes:
    """One entry, padded."""
    if name in _WHOLE_NAMES:
        index, rest = _WHOLE_NAMES[name], b""
        _check_acl(name, value)
    else:
        start, dot, rest = name.partition(b".")
        index = _PREFIXES.get(start + dot, 0)
        if not index or not rest or len(name) > NAME_MAX or b"\0" in rest:
            raise FormatError(f"extended attribute {name!r:.300}: EROFS has no way to say this name")
    if len(value) > XATTR_VALUE_MAX:
        raise FormatError(f"extended attribute {name!r}: {len(value)} bytes, at most {XATTR_VALUE_MAX} fit")
    entry = _XATTR.pack(len(rest), index, len(value)) + rest + value
    return entry + bytes(-len(entry) % XATTR_UNIT)


def _check_acl(name: bytes, value: bytes) -> None:
    """An ACL that Linux does not take makes the file one that cannot be opened."""
    entries = value[_ACL_HEADER.size :]
    tags = {tag for tag, _, _ in _ACL_ENTRY.iter_unpack(entries)} if len(entries) % _ACL_ENTRY.size == 0 else set()
    if value[: _ACL_HEADER.size] != _ACL_HEADER.pack(_ACL_VERSION) or not tags or tags - _ACL_TAGS:
        raise FormatError(f"extended attribute {name!r}: {len(value)} bytes that are no ACL of version {_ACL_VERSION}")


def xattr_name(index: int, rest: bytes) -> bytes:
    """The full name of an entry; FormatError if Linux would not show it."""
    start = _STARTS.get(index)
    if start is None or start.endswith(b".") != bool(rest) or b"\0" in rest:
        raise FormatError(f"extended attribute of prefix {index} and name {rest!r}")
    return start + rest


def xattr_area(xattrs: Xattrs, shared: dict[tuple[bytes, bytes], int]) -> bytes:
    """What follows an inode: numbers of shared entries, then the others. Empty without attributes."""
    if not xattrs:
        return b""
    numbers = sorted(shared[xattr] for xattr in xattrs if xattr in shared)[:SHARED_MAX]
    kept = set(numbers)
    if len(dict(xattrs)) < len(xattrs):
        raise FormatError("an extended attribute is there twice")
    area = _XATTR_HEADER.pack(0, len(numbers)) + b"".join(number.to_bytes(4, "little") for number in numbers)
    area += b"".join(build_xattr(*xattr) for xattr in xattrs if shared.get(xattr) not in kept)
    if len(area) > _XATTR_AREA_MAX:
        raise FormatError(f"extended attributes of {len(area)} bytes, at most {_XATTR_AREA_MAX} fit")
    return area


def xattr_count(area_size: int) -> int:
    """How an inode says how large its area is."""
    return (area_size - XATTR_HEADER_SIZE) // XATTR_UNIT + 1 if area_size else 0


def parse_xattr_header(area: bytes) -> tuple[list[int], int]:
    """The numbers of the shared entries, and where the others start."""
    count = _XATTR_HEADER.unpack_from(area)[1]
    end = XATTR_HEADER_SIZE + count * XATTR_UNIT
    if end > len(area):
        raise FormatError(f"{count} shared attributes of an inode with {len(area)} bytes of them")
    return [number for (number,) in struct.iter_unpack("<I", area[XATTR_HEADER_SIZE:end])], end


def xattr_lengths(start: bytes) -> tuple[int, int, int]:
    """What an entry's first XATTR_UNIT bytes say: lengths of name and value after them, and the prefix."""
    name, index, value = _XATTR.unpack(start)
    return name, value, index


def parse_xattrs(area: bytes, at: int) -> list[tuple[bytes, bytes]]:
    """The entries of an area from `at` to its end."""
    found: list[tuple[bytes, bytes]] = []
    while at < len(area):
        name, value, index = xattr_lengths(area[at : at + XATTR_UNIT])
        at += XATTR_UNIT
        if at + name + value > len(area):
            raise FormatError(f"extended attribute of {name} and {value} bytes")
        found.append((xattr_name(index, area[at : at + name]), area[at + name : at + name + value]))
        at += name + value
        at += -at % XATTR_UNIT
    return found
