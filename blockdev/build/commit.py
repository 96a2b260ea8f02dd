# SPDX-License-Identifier: Apache-2.0
"""Layers made of layers: a writable one as a read-only one (commit), several as one (merge).

Only what is live is copied, in the order of the disk; of a writable layer to the byte as
overlaybd-commit does it. The layer is there whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockdev.build.disk import LayerOptions
from blockdev.build.layerfile import LayerFile
from blockdev.engine import Run, RunKind
from blockdev.errors import CorruptImage, UsageError, from_os
from blockdev.image import OpenImage
from blockdev.replacement import replacing
from blockdev.upper import open_pair_files, open_sealed_file
from formats import lsmt
from formats.errors import FormatError
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, CommitWriter, Head
from formats.readat import ReadAt

_PIECE = 1 << 20  # bytes read at a time; a multiple of COMMIT_STEP

Progress = Callable[[int, int], None]  # bytes done, and in all
Write = Callable[[bytes | memoryview], None]


@dataclass(frozen=True)
class CommitOptions:
    """How the layer is stored, and what its head says. parent_uuid None: that of the writable layer."""

    layer: LayerOptions = field(default_factory=LayerOptions)
    parent_uuid: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Committed:
    """A layer that was made; bytes. `stored` is what it holds before compression."""

    size: int
    stored: int
    layer_size: int
    index_entries: int
    uuid: str
    parent_uuid: str


def commit_pair(
    data: Path, index: Path | None, out: Path, options: CommitOptions | None = None, progress: Progress | None = None
) -> Committed:
    """Make a layer at `out` of a pair that nobody writes; without an index file, of a sealed one.

    CorruptImage if it is none; DeviceError if it is in use.
    """
    options = options or CommitOptions()
    if index is None:
        with open_sealed_file(data) as (file, sealed):
            try:
                table = lsmt.pack(lsmt.read_segments(file, sealed))
            except FormatError as error:
                raise CorruptImage(f"commit: {data}: {error}") from None
            return _commit(table, file, sealed.header, out, options, progress)
    with open_pair_files(data, index, change=False) as pair:
        return _commit(lsmt.pack(pair.replaying()), pair.data, pair.head, out, options, progress)


def merge_image(
    image: OpenImage, out: Path, options: CommitOptions | None = None, progress: Progress | None = None
) -> Committed:
    """Make one layer at `out` of all layers of an image: of its size, and on the parent of the lowest one.

    What one of them zeroes stays zeroed: the layer may come to lie on another. CorruptImage, SourceError.
    """
    options = options or CommitOptions()
    lowest = image.layers[0].lsmt
    head = Head(0, image.size, parent_uuid=lowest.parent_uuid if lowest else NULL_UUID)
    stored = 0

    def copy(write: Write, merged: Head) -> Head:
        nonlocal stored
        writer = CommitWriter(write, merged)
        for run in _runs(image):
            tag = len(image.layers) - 1 - run.layer  # readers ignore it; overlaybd leaves it there
            if run.kind is RunKind.ZERO:
                writer.zeroed(run.offset // SECTOR, run.length // SECTOR, tag)
            elif run.kind is RunKind.DATA:
                stored += run.length
                for start in range(run.offset, run.offset + run.length, _PIECE):
                    content = image.read_at(start, min(_PIECE, run.offset + run.length - start))
                    writer.data(start // SECTOR, content, tag)
            if progress:
                progress(run.offset + run.length, image.size)
        return writer.finish()

    trailer, size = _make(copy, out, _head(head, options), options)
    return Committed(trailer.virtual_size, stored, size, trailer.index_count, trailer.uuid, trailer.parent_uuid)


def _runs(image: OpenImage) -> Iterator[Run]:
    at = 0
    while at < image.size:
        for run in image.runs(at, image.size - at):
            yield run
            at = run.offset + run.length


def _commit(
    table: bytes, source: ReadAt, head: Head, out: Path, options: CommitOptions, progress: Progress | None
) -> Committed:
    """table: the live map, packed, since it may have millions of entries."""
    stored = sum(segment.length for segment in lsmt.unpack(table) if not segment.zeroed) * SECTOR

    def copy(write: Write, committed: Head) -> Head:
        written = -HEAD_SIZE  # the header is not counted

        def counted(content: bytes | memoryview) -> None:
            nonlocal written
            write(content)
            written += len(content)
            if progress and 0 <= written <= stored:
                progress(written, stored)

        return lsmt.commit(lsmt.unpack(table), [source], counted, committed)

    trailer, size = _make(copy, out, _head(head, options), options)
    return Committed(trailer.virtual_size, stored, size, trailer.index_count, trailer.uuid, trailer.parent_uuid)


def _head(head: Head, options: CommitOptions) -> Head:
    """What the options say of it; the rest as it is."""
    parent = options.parent_uuid if options.parent_uuid is not None else head.parent_uuid or NULL_UUID
    return replace(
        head, uuid=options.layer.uuid.upper(), parent_uuid=parent.upper(), user_tag=os.fsencode(options.message)
    )


def _make(
    copy: Callable[[Write, Head], Head], out: Path, head: Head, options: CommitOptions
) -> tuple[Head, int]:
    """Have a layer written; its trailer, and its file's size."""
    with replacing(out) as target:
        try:
            head.build()
            with LayerFile(target, options.layer.wrapping, options.layer.jobs) as layer:
                trailer = copy(layer.write, head)
                return trailer, layer.finish()
        except FormatError as error:
            raise UsageError(f"write layer: {out}: {error.what}") from error
        except OSError as error:
            raise from_os("write layer", error, str(out)) from error
