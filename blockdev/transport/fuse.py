# SPDX-License-Identifier: Apache-2.0
"""An image as a FUSE file: the owner's half.

The client has mounted a /dev/fuse descriptor (blockdev.mountpoint) and passed it here;
from attach() on native/fuse.c answers what the kernel asks on it, until the file is
unmounted. That end shows as EventKind.FUSE_CLOSED with this transport's id.
"""

from __future__ import annotations

import os
import select
from typing import ClassVar

from blockdev.engine import FuseSession
from blockdev.image import OpenImage

THREADS = 2  # read /dev/fuse and answer hits; misses wait in slots, not in threads
WRITING_THREADS = 4  # writes and syncs wait for the disk on their threads, and reads shall not wait for them
# Requests in hand, those that wait for a registry too: more than the 128 that a loop device keeps in flight, so that
# no number of misses on it keeps what is cached waiting. Memory as they are used: 1 MiB at most for each.
SLOTS = 256
WRITING_SLOTS = 64  # of a writable image, which has all its memory from the start


class FuseTransport:
    """One mounted /dev/fuse descriptor and the session that serves it."""

    name: ClassVar[str] = "fuse"

    def __init__(self, fuse_fd: int, *, id: int) -> None:
        """Takes fuse_fd over: it is closed with the session, or by detach() before one began."""
        self._fuse_fd = fuse_fd
        self._id = id
        self._memfd = -1
        self._session: FuseSession | None = None

    def attach(self, image: OpenImage) -> None:
        """Begin to serve. Once."""
        # Whoever holds this and the descriptor can answer what we had read (native/fuse.c).
        self._memfd = os.memfd_create(f"ociblk-fuse-{self._id}", os.MFD_CLOEXEC)
        threads, slots = (WRITING_THREADS, WRITING_SLOTS) if image.image.writable else (THREADS, SLOTS)
        self._session = image.image.serve_fuse(self._fuse_fd, self._memfd, id=self._id, threads=threads, slots=slots)

    def detach(self, *, timeout: float) -> None:
        """End. Idempotent.

        A FUSE file is drained by unmounting it, so nothing waits for `timeout` here: if
        it is still mounted, what is in hand and all later use of it fails.
        """
        session, self._session = self._session, None
        if session:
            session.close()
        for fd in (self._fuse_fd, self._memfd):
            if fd >= 0:
                os.close(fd)
        self._fuse_fd = self._memfd = -1

    def gone(self) -> bool:
        """Whether the kernel has let go of the file, be it that its end has not been dealt with yet."""
        poll = select.poll()
        if self._fuse_fd >= 0:
            poll.register(self._fuse_fd, 0)  # errors alone
        return self._fuse_fd < 0 or bool(poll.poll(0))

    def requests(self) -> int:
        """Requests answered since attach()."""
        return self._session.stat().requests if self._session else 0
