# SPDX-License-Identifier: Apache-2.0
"""The EROFS of a block image as a tree of nodes, read from its disk: no mount, no rights needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from blockdev.errors import CorruptImage, UsageError
from formats.erofs_reader import FileSystem
from formats.errors import FormatError, Unsupported
from formats.readat import ReadAt
from formats.superblock import HEAD_SIZE, file_system
from formats.tree import BLOCK_SIZE, Node

_PIECE = 1 << 20  # bytes read at a time


class Unmounted:
    """One side of a comparison (compare.Side)."""

    def __init__(self, name: str, disk: ReadAt) -> None:
        """Read all names and attributes. CorruptImage; UsageError if it is no EROFS, or what is not read here."""
        self.name = name
        self._disk = disk
        found = file_system(disk.read_at(0, min(HEAD_SIZE, disk.size)))
        if found != "erofs":
            raise UsageError(f"reading EROFS failed: {name}: it holds {found or 'no file system'} (mount it, give DIR)")
        with self._named():
            self._files = FileSystem(disk)
            self.root = self._files.tree()

    def digest(self, path: bytes, node: Node) -> bytes:
        """As compare.Side."""
        hasher = hashlib.sha256()
        with self._named():
            for piece in self._content(path, node):
                hasher.update(piece)
        return hasher.digest()

    def _content(self, path: bytes, node: Node) -> Iterator[bytes]:
        if node.block:
            start, end = node.block * BLOCK_SIZE, node.block * BLOCK_SIZE + node.size
            for at in range(start, end, _PIECE):
                yield self._disk.read_at(at, min(_PIECE, end - at))
            return
        inode = self._files.lookup(path, follow=False)
        if inode is None:
            raise FormatError(f"{path!r} is in the tree and cannot be found")
        yield from self._files.content(inode)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Unsupported as error:
            raise UsageError(f"reading EROFS failed: {self.name}: {error}; mount it, give DIR") from error
        except FormatError as error:
            raise CorruptImage(f"reading EROFS failed: {self.name}: {error}") from error
