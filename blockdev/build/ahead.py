# SPDX-License-Identifier: Apache-2.0
"""A stream that a thread of its own reads ahead, so that fetching and unpacking overlap with what its reader does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

Read = Callable[[int], bytes]  # the next bytes, at most so many; nothing at the end

PIECE = 1 << 20  # bytes asked for at a time
DEPTH = 8 << 20  # bytes read and not yet taken
LEAVE_SECONDS = 2.0  # for a step of a thread's that is under way when all is over; a stuck registry is left behind


class Ahead:
    """Reads what `opened` gives, from now on. read() is for one thread; what reading raises, it raises."""

    def __init__(self, opened: Callable[[], AbstractContextManager[Read]], name: str) -> None:
        self._opened = opened
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes in them
        self._changed = threading.Condition()
        self._over = False
        self._closed = False
        self._error: BaseException | None = None
        self._piece = b""
        self._at = 0  # of the piece, taken
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def read(self, length: int) -> bytes:
        """The next bytes, at most so many; nothing at the end."""
        if self._at == len(self._piece):
            self._piece, self._at = self._next(), 0
        if self._at == 0 and len(self._piece) <= length:
            self._at = len(self._piece)
            return self._piece
        start = self._at
        self._at = min(start + length, len(self._piece))
        return self._piece[start : self._at]

    def close(self) -> None:
        """Let the thread end, which it does at its next piece; one whose read takes too long is left. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(LEAVE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._over)
            if self._pieces:
                piece = self._pieces.popleft()
                self._waiting -= len(piece)
                self._changed.notify_all()
                return piece
            if self._error:
                raise self._error
            return b""

    def _run(self) -> None:
        error = None
        try:
            with self._opened() as read:
                while piece := read(PIECE):
                    if not self._give(piece):
                        break
        except BaseException as raised:  # noqa: BLE001 - the reader gets it
            error = raised
        with self._changed:
            self._error, self._over = error, True
            self._changed.notify_all()

    def _give(self, piece: bytes) -> bool:
        """Whether somebody may still want it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < DEPTH or self._closed)
            self._pieces.append(piece)
            self._waiting += len(piece)
            self._changed.notify_all()
            return not self._closed
