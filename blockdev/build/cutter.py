# SPDX-License-Identifier: Apache-2.0
"""A disk, or a part of one, as it goes into a layer: runs of data, and of zeros that are not stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from blockdev.engine import zero_run
from formats.lsmt import SECTOR, CommitWriter

GRAIN = 4096  # where zeros are looked for: a file system's block
HOLE_MIN = 32 << 10  # shorter runs of zeros are stored: an entry costs more than they do once compressed


class Out(Protocol):
    """Where the bytes of a layer go: blockdev.build.layerfile.LayerFile."""

    def buffer(self) -> bytearray: ...
    def write(self, content: bytes | memoryview) -> None: ...
    def rewrite(self, content: bytes) -> None: ...


class Cutter:
    """Cuts a disk into runs of data and of zeros: data go to the layer as they come, runs to the writer in order."""

    def __init__(self, writer: CommitWriter, layer: Out, *, mask: bool, start: int = 0) -> None:
        """mask: zeros hide what lies below. start: where on the disk the first bytes belong."""
        self._writer = writer
        self._layer = layer
        self._mask = mask
        self._start = start  # of the run at hand, in the disk
        self._length = 0  # of it, written
        self._zeros = 0  # that follow it, not decided yet
        self.stored = 0

    def add(self, buffer: bytearray, length: int) -> None:
        """The next bytes of the disk: the first `length` of the buffer."""
        content = memoryview(buffer)[:length]
        at = 0
        for start, end in _zero_runs(content):
            self._store(content[at:start])
            self.skip(end - start)
            at = end
        self._store(content[at:])

    def skip(self, length: int) -> None:
        """The next bytes of the disk are zeros."""
        self._zeros += length

    def finish(self) -> None:
        """The disk ends here."""
        if self._zeros < HOLE_MIN:
            self._write_zeros()
        self._end_run()

    def _store(self, content: memoryview) -> None:
        if not content:
            return
        if self._zeros >= HOLE_MIN:
            self._end_run()
        else:
            self._write_zeros()
        self._layer.write(content)
        self._length += len(content)

    def _write_zeros(self) -> None:
        """Too few zeros for a hole: they belong to the run."""
        if self._zeros:
            self._layer.write(bytes(self._zeros))
            self._length += self._zeros
            self._zeros = 0

    def _end_run(self) -> None:
        """Tell the writer of the run, then of the zeros after it."""
        self._writer.stored(self._start // SECTOR, self._length // SECTOR)
        self.stored += self._length
        self._start += self._length
        self._length = 0
        if self._mask and self._zeros:
            self._writer.zeroed(self._start // SECTOR, self._zeros // SECTOR)
        self._start += self._zeros
        self._zeros = 0


def _zero_runs(content: memoryview) -> Iterator[tuple[int, int]]:
    """Grains that are zero, joined: those too few for a hole only at either end, where more may follow."""
    end = 0
    while end < len(content):
        start, end = (end + place for place in zero_run(content[end:], GRAIN))
        if end - start >= HOLE_MIN or (end > start and (start == 0 or end == len(content))):
            yield start, end
