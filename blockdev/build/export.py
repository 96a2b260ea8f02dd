# SPDX-License-Identifier: Apache-2.0
"""An image as a flattened raw disk.

Memory is bounded by _PIECE. A regular file comes out sparse: what is not mapped, zeroed
or stored as zeros is not written. Everything else gets every byte, in order.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from blockdev.engine import RunKind, zero_run
from blockdev.errors import from_os
from blockdev.image import OpenImage
from blockdev.ranges import write_at

_PIECE = 1 << 20  # bytes of one read
_GRAIN = 64 << 10  # zeros are looked for in units of this: larger than any file system's block

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def export_image(image: OpenImage, fd: int, name: str, progress: Progress | None = None) -> None:
    """Write the disk to fd, which messages call `name`, from its start on.

    A regular file is emptied first and ends at the disk's size.

    CorruptImage, SourceError; BrokenPipeError if the reader of a pipe leaves; what else writing meets, such as
    a full disk, as from_os() says.
    """
    try:
        sparse = stat.S_ISREG(os.fstat(fd).st_mode)
        if sparse:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, image.size)
        _copy(image, fd, progress or _silent, sparse=sparse)
    except BrokenPipeError:  # the reader has had enough, which is no failure of ours
        raise
    except OSError as error:
        raise from_os("write disk", error, name) from error


def _copy(image: OpenImage, fd: int, progress: Progress, *, sparse: bool) -> None:
    buffer = memoryview(bytearray(_PIECE))
    zeros = memoryview(bytes(_PIECE))
    at = 0
    while at < image.size:
        for run in image.runs(at, image.size - at):
            end = run.offset + run.length
            if sparse and run.kind is not RunKind.DATA:
                at = end
            while at < end:
                piece = buffer[: min(_PIECE, end - at)]
                if run.kind is RunKind.DATA:
                    image.read_into(at, piece)
                _put(fd, piece if run.kind is RunKind.DATA else zeros[: len(piece)], at if sparse else None)
                at += len(piece)
                progress(at, image.size)
    progress(image.size, image.size)


def _put(fd: int, content: memoryview, place: int | None) -> None:
    """All of the content: at `place` but for its zeros, or, if that is None, as the next bytes."""
    if place is None:
        done = 0
        while done < len(content):
            done += os.write(fd, content[done:])
        return
    at = 0
    while at < len(content):
        start, end = zero_run(content[at:], _GRAIN)
        write_at(fd, content[at : at + start], place + at)
        at += end


def _silent(done: int, total: int) -> None:
    pass
