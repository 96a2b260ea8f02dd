# SPDX-License-Identifier: Apache-2.0
"""Where a disk is written to: a file that was made for it, or a stream.

A file is written by place, and zeros are left out, so it comes out sparse. To a stream, which is
anything else, every byte is given after the last one, from wherever its descriptor stands.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from blockdev.engine import zero_run
from blockdev.errors import from_os
from blockdev.ranges import write_at

_GRAIN = 64 << 10  # zeros are looked for in units of this: larger than any file system's block


@dataclass(frozen=True)
class Sink:
    """A descriptor, and what messages call it. made: it is a new, empty file, and nothing else's."""

    fd: int
    name: str
    made: bool

    def begin(self, size: int) -> None:
        """The disk's size, before the first piece. OSError."""
        if self.made:
            os.ftruncate(self.fd, size)

    def put(self, content: memoryview, place: int) -> None:
        """The next bytes of the disk, at `place` in it; in a file that was made, zeros are passed over. OSError."""
        at = 0
        while at < len(content):
            if self.made:
                start, end = zero_run(content[at:], _GRAIN)
                write_at(self.fd, content[at : at + start], place + at)
                at += end
            else:
                at += os.write(self.fd, content[at:])

    def finish(self) -> None:
        """What was written is on its disk, if it goes to one. As from_os() says if it does not get there."""
        mode = os.fstat(self.fd).st_mode
        try:
            if stat.S_ISBLK(mode) or stat.S_ISREG(mode):
                os.fsync(self.fd)
        except OSError as error:
            raise from_os("write disk", error, self.name) from error
