# SPDX-License-Identifier: Apache-2.0
"""Tars built header by header, so that they can say anything; and the trees that such add up to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from blockdev.build.tree import Tree
from formats.archive import Archive
from formats.tarheader import BLOCK
from formats.tree import Node

END = bytes(2 * BLOCK)
USTAR = b"ustar\x0000"
GNU = b"ustar  \0"
V7 = b""

_PLACES = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "typeflag": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "major": (329, 8),
    "minor": (337, 8),
    "prefix": (345, 155),
    "sparse": (386, 96),
    "goes_on": (482, 1),
    "real_size": (483, 12),
    "trailer": (508, 4),
}


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def binary(value: int, width: int) -> bytes:
    """GNU's form of a number; negative ones too."""
    raw = bytearray((value & ((1 << 8 * width) - 1)).to_bytes(width, "big"))
    raw[0] |= 0x80
    return bytes(raw)


def summed(block: bytes, signed: bool = False) -> bytes:
    """A header with its checksum made right."""
    blanked = block[:148] + b" " * 8 + block[156:]
    total = sum(blanked) - (256 * sum(byte >= 128 for byte in blanked) if signed else 0)
    return blanked[:148] + b"%06o\0 " % (total if total >= 0 else 0) + blanked[156:]


def header(name: bytes, typeflag: bytes = b"0", **fields: bytes | int) -> bytes:
    """One header. Numbers are written in octal, bytes as they are."""
    block = bytearray(BLOCK)
    given: dict[str, bytes | int] = {"mode": 0o644, "uid": 0, "gid": 0, "size": 0, "mtime": 0, "magic": USTAR} | fields
    for field, value in (given | {"name": name, "typeflag": typeflag}).items():
        start, width = _PLACES[field]
        raw = octal(value, width) if isinstance(value, int) else value
        assert len(raw) <= width
        block[start : start + len(raw)] = raw
    return summed(bytes(block))


def padded(body: bytes) -> bytes:
    return body + bytes(-len(body) % BLOCK)


def file(name: bytes, content: bytes = b"", **fields: bytes | int) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)


def folder(name: bytes, **fields: bytes | int) -> bytes:
    return header(name, b"5", **{"mode": 0o755, **fields})


def symlink(name: bytes, target: bytes, **fields: bytes | int) -> bytes:
    return header(name, b"2", link=target, **{"mode": 0o777, **fields})


def hardlink(name: bytes, other: bytes, **fields: bytes | int) -> bytes:
    return header(name, b"1", link=other, **fields)


def pax(records: dict[bytes, bytes] | list[tuple[bytes, bytes]], typeflag: bytes = b"x") -> bytes:
    """A pax header and its records."""
    pairs = list(records.items()) if isinstance(records, dict) else records
    return extension(typeflag, b"".join(_record(key, value) for key, value in pairs))


def _record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length + body) != length:
        length += 1
    return b"%d" % length + body


def extension(typeflag: bytes, body: bytes) -> bytes:
    return header(b"extension", typeflag, size=len(body)) + padded(body)


def reader(tar: bytes, piece: int = 1 << 20) -> Callable[[int], bytes]:
    """A stream of the bytes, that gives at most `piece` at once."""
    stream = io.BytesIO(tar)
    return lambda wanted: stream.read(min(wanted, piece))


# ---- trees ----


class Contents:
    """A store that keeps the files' bytes. Content lies where it says, holes are zeros."""

    def __init__(self) -> None:
        self.files: list[bytes] = [b""]

    def __call__(self, size: int, content: Iterator[tuple[int, bytes | memoryview]]) -> int:
        kept = bytearray()
        for offset, piece in content:
            assert len(kept) <= offset
            kept += bytes(offset - len(kept)) + piece
            assert len(kept) <= size
        self.files.append(bytes(kept) + bytes(size - len(kept)))
        return len(self.files) - 1

    def of(self, node: Node) -> bytes:
        """What a regular file holds."""
        return self.files[node.block]


def merged(*layers: bytes, contents: Contents | None = None) -> Tree:
    """The tree of some tars, bottom first."""
    tree = Tree()
    store = contents or Contents()
    for i, layer in enumerate(layers):
        tree.apply(Archive(reader(layer)), store, f"layer {i}")
    return tree


def paths(root: Node, prefix: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """All paths below the root, in the order of their bytes."""
    for name, node in sorted((root.children or {}).items()):
        yield prefix + name, node
        yield from paths(node, prefix + name + b"/")


def names(tree: Tree) -> list[bytes]:
    return [path for path, _ in paths(tree.root)]
