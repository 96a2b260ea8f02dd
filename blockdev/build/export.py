# SPDX-License-Identifier: Apache-2.0
"""An image as a flattened raw disk.

Memory is bounded by _PIECE. A file that was made for the disk comes out sparse: what is not
mapped, zeroed or stored as zeros is not written. Everything else gets every byte, in order.
"""

from __future__ import annotations

from collections.abc import Callable

from blockdev.build.sink import Sink
from blockdev.engine import RunKind
from blockdev.errors import from_os
from blockdev.image import OpenImage

_PIECE = 1 << 20  # bytes of one read

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def export_image(image: OpenImage, sink: Sink, progress: Progress | None = None) -> None:
    """Write the disk to the sink, which its owner finishes.

    CorruptImage, SourceError; BrokenPipeError if the reader of a pipe leaves; what else writing meets, such as
    a full disk, as from_os() says.
    """
    try:
        sink.begin(image.size)
        _copy(image, sink, progress or _silent)
    except BrokenPipeError:  # the reader has had enough, which is no failure of ours
        raise
    except OSError as error:
        raise from_os("write disk", error, sink.name) from error


def _copy(image: OpenImage, sink: Sink, progress: Progress) -> None:
    buffer = memoryview(bytearray(_PIECE))
    zeros = memoryview(bytes(_PIECE))
    at = 0
    while at < image.size:
        for run in image.runs(at, image.size - at):
            end = run.offset + run.length
            if sink.made and run.kind is not RunKind.DATA:
                at = end
            while at < end:
                piece = buffer[: min(_PIECE, end - at)]
                if run.kind is RunKind.DATA:
                    image.read_into(at, piece)
                sink.put(piece if run.kind is RunKind.DATA else zeros[: len(piece)], at)
                at += len(piece)
                progress(at, image.size)
    progress(image.size, image.size)


def _silent(done: int, total: int) -> None:
    pass
