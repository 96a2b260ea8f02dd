# SPDX-License-Identifier: Apache-2.0
"""EROFS metadata: golden bytes, equal trees equal bytes, and one error for each thing that EROFS cannot hold."""

from __future__ import annotations

import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from formats.erofs import Metadata
from formats.errors import FormatError
from formats.tree import BLOCK_SIZE, Node, Xattrs
from tests.trees import Disk, directory, rich

SAME = (b"user.same", b"v")
ACL = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000000ffffffff")

# Offset in the metadata -> 16 bytes; what is not here is zero. Slot 1 is the root, 7 the file, 10 the device.
GOLDEN = """
  32 05000000ed4100006600000000000000
  48 ffffffff000000000000000000000000
  64 00cdb063000000000000000003000000
  96 07000000000000005400010001000000
 112 00000000590002000100000000000000
 128 5a00020011000000000000005c000200
 144 07000000000000005f0001000a000000
 160 00000000600003000e00000000000000
 176 64000700216c696e6b2e2e2e64697266
 192 6e756c6c746f00000000000000000000
 224 01000200ed8900008813000000000000
 240 0100000000000000e8030000c0c62d00
 256 ffffffffffffffffffc99a3b02000000
 288 00000000010000000000000000000000
 320 01000d00b62100000000000000000000
 336 70031111000000000000000000000000
 352 00000000000000000000000001000000
 384 0000000000000000000000000a060200
 400 6361706162696c697479010200021c00
 416 0200000001000700ffffffff04000500
 432 ffffffff20000000ffffffff00000000
 448 05000000ffa100000800000000000000
 464 ffffffff000000000000000000000000
 480 00000000000000000000000001000000
 512 6469722f2e2e2f660000000000000000
 544 05000200ff4300001b00000000000000
 560 ffffffff000000000000000000000000
 576 00000000000000000000000002000000
 608 00000000010000000000000000000000
 624 11000000000000001800020001000000
 640 00000000190002002e2e2e0000000000
4096 0401010073616d657600000000000000
"""
GOLDEN_SUPERBLOCK = """
1024 e2e1f5e09192f7e9030000000c000100
1040 05000000000000000000000000000000
1056 00000000050000000300000004000000
1072 b44c0af4ada5a3d3872bfe503ace1e0b
"""


def from_dump(dump: str, size: int) -> bytes:
    out = bytearray(size)
    for line in dump.split("\n"):
        if line:
            at, row = line.split()
            out[int(at) : int(at) + 16] = bytes.fromhex(row)
    return bytes(out)


def small() -> Node:
    file = Node(stat.S_IFREG | 0o4755, 1000, 3_000_000, -1, 2, (SAME,), 5000, 1)
    capable = ((b"security.capability", b"\1\2"), (b"system.posix_acl_access", ACL))
    children = {
        b"f": file,
        b"!link": file,
        b"dir": directory(mode=0o1777, xattrs=(SAME,)),
        b"to": Node(stat.S_IFLNK | 0o777, target=b"dir/../f"),
        b"null": Node(stat.S_IFCHR | 0o666, device=(259, 70_000), xattrs=capable),
    }
    return directory(children, mtime_ns=1_672_531_200_000_000_000)


def written(root: Node, first_block: int = 1) -> bytes:
    return b"".join(Metadata(root, first_block).pieces())


def test_the_golden_bytes_of_a_small_tree() -> None:
    metadata = Metadata(small(), 3)
    assert metadata.blocks == 2
    assert metadata.inodes == 5
    assert b"".join(metadata.pieces()) == from_dump(GOLDEN, 2 * BLOCK_SIZE)
    assert metadata.superblock(bytes(16)) == from_dump(GOLDEN_SUPERBLOCK, BLOCK_SIZE)
    assert metadata.uuid == bytes.fromhex("b44c0af4ada5a3d3872bfe503ace1e0b")


def test_the_uuid_is_that_of_parent_and_metadata() -> None:
    found = set()
    for parent, first_block in ((b"", 1), (b"p" * 16, 1), (b"", 2)):
        metadata = Metadata(small(), first_block)
        digest = sha256(b"".join(metadata.pieces())).digest()
        metadata.superblock(parent)
        assert metadata.uuid == sha256(parent + digest).digest()[:16]
        found.add(metadata.uuid)
    assert len(found) == 2, "the place of the metadata is in the superblock alone"


def reversed_tree(node: Node) -> Node:
    if node.children is not None:
        node.children = {name: reversed_tree(child) for name, child in reversed(node.children.items())}
    return node


def test_equal_trees_are_equal_bytes_in_whatever_order_they_grew(tmp_path: Path) -> None:
    first, second = (rich(Disk(tmp_path / name), 300) for name in ("a", "b"))
    assert sha256(written(first)).digest() == sha256(written(reversed_tree(second))).digest()


def test_pieces_are_all_blocks_and_can_be_taken_twice(tmp_path: Path) -> None:
    metadata = Metadata(rich(Disk(tmp_path / "a"), 6000), 1)
    pieces = list(metadata.pieces())
    assert sum(map(len, pieces)) == metadata.blocks * BLOCK_SIZE
    assert max(map(len, pieces)) < 1 << 20
    assert sha256(b"".join(pieces)).digest() == sha256(b"".join(metadata.pieces())).digest()


def xattr(name: bytes, value: bytes = b"") -> dict[str, Xattrs]:
    return {"xattrs": ((name, value),)}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"mode": 0o644}, "no type"),
        ({"mode": 0o1000000 | stat.S_IFREG}, "no type"),
        ({"uid": -1}, "owner"),
        ({"gid": 0xFFFFFFFF}, "owner"),
        ({"links": 0}, "links"),
        ({"links": 1 << 32}, "links"),
        ({"mtime_ns": 10**9 << 63}, "modified"),
        ({"size": 1}, "block 0"),
        ({"size": -1}, "-1 bytes"),
        ({"size": 4097, "block": 0xFFFFFFFE}, "addressed"),
        ({"size": 1 << 44, "block": 1}, "addressed"),
        ({"mode": stat.S_IFLNK}, "target"),
        ({"mode": stat.S_IFLNK, "target": b"t" * 4096}, "4096"),
        ({"mode": stat.S_IFLNK, "target": b"a\0b"}, "NUL"),
        ({"mode": stat.S_IFCHR, "device": (4096, 0)}, "device 4096:0"),
        ({"mode": stat.S_IFBLK, "device": (0, 1 << 20)}, "device"),
        ({"mode": stat.S_IFBLK, "device": (-1, 0)}, "device"),
        (xattr(b"user."), "name"),
        (xattr(b"user"), "name"),
        (xattr(b"com.apple.quarantine"), "name"),
        (xattr(b"system.posix_acl"), "name"),
        (xattr(b"system.posix_acl_access2"), "name"),
        (xattr(b"user.a\0b"), "name"),
        (xattr(b"user." + b"n" * 251), "name"),
        (xattr(b"user.a", bytes(65536)), "65536"),
        (xattr(b"system.posix_acl_access", b""), "no ACL"),
        (xattr(b"system.posix_acl_access", ACL[:4]), "no ACL"),
        (xattr(b"system.posix_acl_default", ACL[:-1]), "no ACL"),
        (xattr(b"system.posix_acl_default", b"\1" + ACL[1:]), "no ACL"),
        (xattr(b"system.posix_acl_default", ACL[:4] + b"\3" + ACL[5:]), "no ACL"),
        ({"xattrs": ((b"user.a", b""), (b"user.a", b"x"))}, "twice"),
        ({"xattrs": tuple((b"user.%d" % i, bytes(60_000)) for i in range(5))}, "attributes of"),
    ],
)
def test_what_an_inode_cannot_hold_is_one_error_that_names_the_file(fields: dict[str, Any], why: str) -> None:
    node = Node(**{"mode": stat.S_IFREG | 0o644, **fields})
    with pytest.raises(FormatError, match=why) as caught:
        Metadata(directory({b"a": directory({b"b": node})}), 1)
    assert caught.value.what.startswith("/a/b: ")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"n" * 256])
def test_a_name_that_cannot_be_looked_up_is_refused(name: bytes) -> None:
    with pytest.raises(FormatError, match="no name"):
        Metadata(directory({name: Node(stat.S_IFIFO)}), 1)


def test_a_directory_has_one_name() -> None:
    twice = directory()
    with pytest.raises(FormatError, match=r"/b: .*another name"):
        Metadata(directory({b"a": twice, b"b": twice}), 1)
    loop = directory()
    assert loop.children is not None
    loop.children[b"a"] = loop
    with pytest.raises(FormatError, match="another name"):
        Metadata(loop, 1)


@pytest.mark.parametrize("first_block", [0, 0xFFFFFFFF, 1 << 40])
def test_metadata_have_to_be_where_they_can_be_addressed(first_block: int) -> None:
    with pytest.raises(FormatError, match="addressed"):
        Metadata(directory(), first_block)


def test_the_root_is_a_directory() -> None:
    with pytest.raises(FormatError, match="root"):
        Metadata(Node(stat.S_IFREG | 0o644), 1)
