# SPDX-License-Identifier: Apache-2.0
"""The fuzz target for layers' blobs: uncompressed, read as a tar, and merged into a tree."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from blockdev.build.plain import plain
from blockdev.build.tree import Tree
from blockdev.errors import CorruptImage
from formats.archive import Archive
from formats.errors import FormatError
from formats.tarheader import BLOCK
from tests.tars import paths, reader, summed

FIX = 1  # bit of the first byte: make checksums right
READ_MAX = 1 << 20  # bytes that are uncompressed


def archive(content: bytes) -> None:
    """A layer's blob, perhaps compressed: its members whatever pieces it comes in, and what it is as two layers."""
    how, blob = content[0] if content else 0, content[1:]
    if how & FIX:
        blob = _fixed_archive(blob)
    with suppress(FormatError):
        assert _plain(blob, READ_MAX) == _plain(blob, 1 + how)
    # Uncompressed here as well: what was compressed is checked by its own sums.
    whole, pieces = _members(blob, READ_MAX), _members(blob, 1 + how)
    assert whole == pieces, "the members depend on the pieces that the tar comes in"
    _merge(blob)


def _fixed_archive(blob: bytes) -> bytes:
    """Every block that has a header's magic, with the checksum it claims."""
    blocks = [blob[at : at + BLOCK] for at in range(0, len(blob), BLOCK)]
    return b"".join(summed(block) if block[257:262] == b"ustar" and len(block) == BLOCK else block for block in blocks)


def _plain(blob: bytes, piece: int) -> bytes:
    read = plain(reader(blob, piece))
    found = bytearray()
    while len(found) < READ_MAX and (part := read(READ_MAX)):
        assert len(part) <= READ_MAX
        found += part
    return bytes(found[:READ_MAX])


def _members(blob: bytes, piece: int) -> list[object]:
    """Every member with its content, and the error at the end if there is one."""
    read: list[object] = []
    tar = Archive(reader(blob, piece))
    try:
        for member in tar:
            stored, end = bytearray(), 0
            for offset, part in tar.content():
                assert end <= offset < offset + len(part) <= member.size, "content outside its file"
                end = offset + len(part)
                stored += part
            read += [member, bytes(stored)]
    except FormatError as error:
        read.append(str(error))
    return read


def _merge(blob: bytes) -> None:
    """Twice over: what is left has its links counted."""
    tree = Tree()
    with suppress(CorruptImage):
        for _ in range(2):
            tree.apply(Archive(reader(blob)), lambda size, content: sum(len(part) for _, part in content))
        names = Counter(node for _, node in paths(tree.root))
        for node, count in names.items():
            folders = [child for child in (node.children or {}).values() if child.children is not None]
            assert node.links == (count if node.children is None else 2 + len(folders))
        assert tree.memory >= 0
