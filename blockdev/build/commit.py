# SPDX-License-Identifier: Apache-2.0
"""A writable layer as a read-only one: commit.

Only what is live is copied, in the order of the disk, to the byte as overlaybd-commit
does it. The layer is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockdev.build.disk import LayerOptions
from blockdev.build.layerfile import LayerFile
from blockdev.errors import CorruptImage, UsageError, from_os
from blockdev.replacement import replacing
from blockdev.upper import open_pair_files, open_sealed_file
from formats import lsmt
from formats.errors import FormatError
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, Head, Segment
from formats.pair import replay
from formats.readat import ReadAt

Progress = Callable[[int, int], None]  # bytes of data done, and in all


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
            live = lsmt.read_segments(file, sealed)
            return _commit(live, file, sealed.header, out, options, progress)
    with open_pair_files(data, index, change=False) as pair:
        try:
            live = replay(lsmt.read_log(pair.index, pair.log))
        except FormatError as error:
            raise CorruptImage(f"commit: {data} with {index}: {error}") from None
        return _commit(live, pair.data, pair.head, out, options, progress)


def _commit(
    live: Sequence[Segment],
    source: ReadAt,
    head: Head,
    out: Path,
    options: CommitOptions,
    progress: Progress | None,
) -> Committed:
    parent = options.parent_uuid if options.parent_uuid is not None else head.parent_uuid or NULL_UUID
    head = replace(
        head, uuid=options.layer.uuid.upper(), parent_uuid=parent.upper(), user_tag=options.message.encode()
    )
    stored = sum(segment.length for segment in live if not segment.zeroed) * SECTOR
    with replacing(out) as target:
        try:
            head.build()
            with LayerFile(target, options.layer.wrapping, options.layer.jobs) as layer:
                written = -HEAD_SIZE  # the header is not counted

                def write(content: bytes) -> None:
                    nonlocal written
                    layer.write(content)
                    written += len(content)
                    if progress and 0 <= written <= stored:
                        progress(written, stored)

                trailer = lsmt.commit(live, [source], write, head)
                size = layer.finish()
        except FormatError as error:
            raise UsageError(f"commit: {out}: {error.what}") from error
        except OSError as error:
            raise from_os("commit", error, str(out)) from error
    return Committed(trailer.virtual_size, stored, size, trailer.index_count, trailer.uuid, trailer.parent_uuid)
