# SPDX-License-Identifier: Apache-2.0
"""A raw disk as a layer: import.

What is zero for 32 KiB or longer is not stored, whether the file has a hole there or
zeros, so equal disks give equal layers. A stream is compressed as it comes: a layer begins
with its disk's size, so its first block is written last. The layer is there whole or not
at all. Memory is bounded by a few pieces for each thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockdev.build.cutter import GRAIN, Cutter
from blockdev.build.layerfile import PIECE, LayerFile, Wrapping
from blockdev.errors import EngineError, UsageError, from_os
from blockdev.ranges import data_ranges
from blockdev.replacement import replacing
from formats.errors import FormatError
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, VIRTUAL_SIZE_MAX, CommitWriter, Head

Progress = Callable[[int, int], None]  # bytes of the disk done, and in all (0 = not known yet)


def all_cores() -> int:
    """How many threads can run at once here."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class LayerOptions:
    """How to make the layer. With a parent, zeros of the disk hide what lies below. jobs: threads that compress."""

    wrapping: Wrapping = field(default_factory=Wrapping)
    uuid: str = NULL_UUID
    parent_uuid: str = NULL_UUID
    jobs: int = field(default_factory=all_cores)


@dataclass(frozen=True)
class Imported:
    """A layer that was made; bytes. `stored` is what of the disk is kept, before compression."""

    disk_size: int
    stored: int
    layer_size: int
    index_entries: int


def import_disk(
    fd: int, name: str, out: Path, options: LayerOptions | None = None, progress: Progress | None = None
) -> Imported:
    """Make a layer at `out` of the raw disk that fd reads from where it stands, to its end, and messages call `name`.

    UsageError if the disk is not whole sectors or cannot be a layer, or an option is bad.
    """
    options = options or LayerOptions()
    head = _head(options)
    file = _File.of(fd, name)
    size = file.size if file else -1
    if size >= 0:
        _check_size(name, size)
    with replacing(out) as target:
        try:
            with LayerFile(target, options.wrapping, options.jobs, HEAD_SIZE if size < 0 else 0) as layer:
                writer = CommitWriter(layer.write, replace(head, virtual_size=max(0, size)))
                cutter = Cutter(writer, layer, mask=head.parent_uuid != NULL_UUID)
                fed = _feed(file, layer, cutter) if file else _feed_stream(fd, layer, cutter)
                for done in fed:
                    (progress or _silent)(done, max(0, size))
                cutter.finish()
                if size < 0:
                    size = done
                    _check_size(name, size)
                    layer.rewrite(writer.resize(size))
                trailer = writer.finish()
                (progress or _silent)(size, size)
                return Imported(size, cutter.stored, layer.finish(), trailer.index_count)
        except FormatError as error:
            raise UsageError(f"import disk: {name}: {error.what}") from error
        except OSError as error:
            raise from_os("import disk", error, f"{name} to {out}") from error


@dataclass(frozen=True)
class _File:
    """A disk in a file or block device, from where its descriptor stood to its end. Offsets are the disk's."""

    fd: int
    name: str
    first: int
    size: int
    tells_holes: bool

    @classmethod
    def of(cls, fd: int, name: str) -> _File | None:
        """None: it is a stream."""
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return None
        first = os.lseek(fd, 0, os.SEEK_CUR)
        return cls(fd, name, first, max(0, os.lseek(fd, 0, os.SEEK_END) - first), stat.S_ISREG(mode))

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Where there may be anything but zeros, on GRAIN borders; all of it if it cannot tell holes."""
        if not self.tells_holes:
            yield 0, self.size
            return
        at = 0
        for begin, end in data_ranges(self.fd, self.first + self.size, self.first):
            start = max(at, (begin - self.first) // GRAIN * GRAIN)
            at = min(-(-(end - self.first) // GRAIN) * GRAIN, self.size)
            if start < at:
                yield start, at

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""
        done = 0
        while done < len(buffer):
            got = os.preadv(self.fd, [buffer[done:]], self.first + offset + done)
            if not got:
                raise EngineError(f"import disk: {self.name}: it ends at {offset + done} while it is read")
            done += got


def _check_size(name: str, size: int) -> None:
    if size == 0 or size % SECTOR or size > VIRTUAL_SIZE_MAX:
        raise UsageError(f"import disk: {name}: {size} bytes are not a whole number of {SECTOR}-byte sectors")


def _head(options: LayerOptions) -> Head:
    """UUIDs as overlaybd writes them: upper case."""
    head = Head(0, 0, uuid=options.uuid.upper(), parent_uuid=options.parent_uuid.upper())
    try:
        head.build()
    except FormatError as error:
        raise UsageError(f"import disk: {error.what}") from error
    if not (head.uuid and head.parent_uuid):
        raise UsageError("import disk: an empty text is no UUID")
    if options.jobs < 1:
        raise UsageError(f"import disk: {options.jobs} jobs: want 1 or more")
    options.wrapping.check()
    return head


def _feed(file: _File, layer: LayerFile, cutter: Cutter) -> Iterator[int]:
    """Give the whole disk to the cutter; yields how far it is."""
    at = 0
    for start, end in file.data_ranges():
        cutter.skip(start - at)
        at = start
        while at < end:
            buffer, length = layer.buffer(), min(PIECE, end - at)
            file.read(at, memoryview(buffer)[:length])
            cutter.add(buffer, length)
            at += length
            yield at
    cutter.skip(file.size - at)


def _feed_stream(fd: int, layer: LayerFile, cutter: Cutter) -> Iterator[int]:
    """The same for a disk of unknown size, to its end."""
    at, length = 0, PIECE
    while length == PIECE:
        buffer, length = layer.buffer(), 0
        view = memoryview(buffer)
        while length < PIECE and (got := os.readv(fd, [view[length:]])):
            length += got
        cutter.add(buffer, length)
        at += length
        yield at


def _silent(done: int, total: int) -> None:
    pass
