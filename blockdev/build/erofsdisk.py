# SPDX-License-Identifier: Apache-2.0
"""The EROFS disk of an image, made layer by layer from its archives (docs/formats/erofs-image.md)."""

from __future__ import annotations

from typing import BinaryIO

from blockdev.build.blocklayer import LATE, BlockLayer, Contents, Nowhere
from blockdev.build.depot import Read
from blockdev.build.layerfile import LayerFile, Wrapping
from blockdev.build.tree import Tree
from blockdev.build.workshop import Written
from formats.archive import Archive
from formats.erofs import Metadata
from formats.lsmt import Head

FILE_SYSTEM = "erofs"


class ErofsDisk:
    """Grows by a layer with each write() or follow(), bottom first. FormatError for an archive that is none."""

    def __init__(self, wrapping: Wrapping, jobs: int) -> None:
        self._wrapping = wrapping
        self._jobs = jobs
        self._tree = Tree()
        self._contents = Contents()
        self._next_block = 1  # block 0 is every layer's
        self._uuid = bytes(16)  # of the file system so far

    def write(self, read: Read, head: Head, file: BinaryIO, name: str) -> Written:
        """The layer that an archive stands for, into an empty file. head: the UUIDs; name: for messages."""
        start = self._next_block
        with LayerFile(file.fileno(), self._wrapping, self._jobs, LATE) as out:
            layer = BlockLayer(out, head, self._contents, start)
            self._tree.apply(Archive(read), layer.store, name)
            metadata = Metadata(self._tree.root, layer.next_block)
            layer.put(metadata.pieces())
            layer.finish(metadata.superblock(self._uuid))
            size = out.finish()
        self._next_block, self._uuid = layer.next_block, metadata.uuid
        annotations = out.table.place.annotations() if out.table else {}
        return Written(size, start, layer.next_block, self._uuid.hex(), annotations)

    def fits(self, below: Written | None, written: Written) -> bool:
        """As Disk.fits(): equal archives give equal layers."""
        return True

    def follow(self, read: Read, written: Written, file: BinaryIO, name: str) -> None:
        """Go on from a layer that was written before, from the same archive."""
        layer = BlockLayer(Nowhere(), Head(0, 0), self._contents, written.start)
        self._tree.apply(Archive(read), layer.store, name)
        self._next_block, self._uuid = written.end, bytes.fromhex(written.state)
