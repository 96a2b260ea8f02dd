# SPDX-License-Identifier: Apache-2.0
"""An ordinary image as a tree of nodes: its layers merged, and of each content only the sha256.

Layers are read once, from the bottom to the top, each to its end, so that what is compared
has the digests that the manifest names. Memory grows with the number of files, not with their sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from blockdev.build.depot import Depot, Read
from blockdev.build.plain import plain
from blockdev.build.tree import Tree
from formats.archive import Archive
from formats.oci import Manifest
from formats.tree import Node

Progress = Callable[[int, int], None]  # bytes of blobs read, and to be read in all

_PIECE = 1 << 20  # bytes; of what is read past a tar's end, and of the zeros hashed for a hole
_ZEROS = memoryview(bytes(_PIECE))


class Unpacked:
    """One side of a comparison (compare.Side)."""

    def __init__(self, name: str, depot: Depot, manifest: Manifest, progress: Progress | None = None) -> None:
        """Read all layers. CorruptImage, and what the depot raises."""
        self.name = name
        self._digests: list[bytes] = [b""]  # by Node.block, which is 0 where there is no content
        tree = Tree()
        total = sum(layer.size for layer in manifest.layers)
        before = 0
        for layer in manifest.layers:
            with depot.opened(layer) as blob:
                read = _counted(blob, before, total, progress)
                tree.apply(Archive(plain(read)), self._store, layer.digest)
                while read(_PIECE):  # to the end, where the blob's digest is compared
                    pass
            before += layer.size
        self.root: Node = tree.root

    def digest(self, path: bytes, node: Node) -> bytes:
        """As compare.Side."""
        return self._digests[node.block] if node.size else hashlib.sha256().digest()

    def _store(self, size: int, content: Iterator[tuple[int, bytes | memoryview]]) -> int:
        """Keep a content's sha256; where it is kept."""
        hasher = hashlib.sha256()
        at = 0
        for offset, piece in content:
            _hash_zeros(hasher, offset - at)
            hasher.update(piece)
            at = offset + len(piece)
        _hash_zeros(hasher, size - at)
        self._digests.append(hasher.digest())
        return len(self._digests) - 1


def _hash_zeros(hasher: hashlib._Hash, count: int) -> None:
    while count > 0:
        hasher.update(_ZEROS[:count])
        count -= min(count, _PIECE)


def _counted(read: Read, before: int, total: int, progress: Progress | None) -> Read:
    """The same bytes, and progress as they come."""
    if progress is None:
        return read
    shown, done = progress, before

    def read_counted(length: int) -> bytes:
        nonlocal done
        piece = read(length)
        done += len(piece)
        shown(done, total)
        return piece

    return read_counted
