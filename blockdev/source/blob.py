# SPDX-License-Identifier: Apache-2.0
"""A blob in a registry, as a Source: ranged GETs, and what to do when ranges are ignored.

A registry that answers 200 to a range sends the whole blob. That body is read once, to its end:
the reader whose request it answers gets its bytes from it, all of it goes to `spill`, and other
readers wait. One of these whose range has passed by ends with Spilled, since the bytes are where
the spill put them. So that no two readers start a whole body, the first request of a blob is
alone until its status is known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.errors import SourceError
from blockdev.registry.client import Body, Client, Part
from blockdev.source import PROGRESS_SIZE, Spilled

SPILL_SIZE = 4 * PROGRESS_SIZE  # bytes of one spill(), from a multiple of it: whole extents, in few calls
# A whole body may take longer than the read that started it. It gets the time that a slow but
# living line needs, so that a sender of one byte a second is given up in the end.
WHOLE_BODY_RATE = 64 << 10  # bytes a second
WHOLE_BODY_SECONDS = 60.0


@dataclass
class _Stream:
    """A whole body: how many of its bytes have been spilled, and whether it has ended."""

    passed: int = 0
    over: bool = False


class RegistryBlob:
    """One blob of one repository. Thread-safe.

    `spill(offset, bytes)` takes what nobody asked for; the bytes are valid during the call only.
    It runs in a reader's thread, and what it raises ends that read.
    """

    def __init__(
        self, client: Client, repository: str, digest: str, size: int, spill: Callable[[int, memoryview], object]
    ) -> None:
        self.size = size
        self.name = f"{client.registry}/{repository}@{digest}"
        self.host = client.registry
        self._client = client
        self._repository = repository
        self._digest = digest
        self._spill = spill
        self._closed = False
        self._turn = threading.Condition()
        self._ranges = False  # the last answer was a range: requests need not be alone
        self._alone = False  # a request whose answer is not known, or a whole body, is under way
        self._stream = _Stream(over=True)  # the last one

    def close(self) -> None:
        """Let a whole body that is under way end now; its readers fail."""
        self._closed = True

    def probe(self, deadline: float) -> None:
        """As Source.probe(): ask for one byte."""
        if self.size:
            with self._client.open_part(self._part(0, 1), deadline) as body:
                self._check(body)
        else:
            self._client.blob_size(self._repository, self._digest)

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """As Source.read_into(). Spilled if the bytes passed by in another read's stream."""
        if not 0 <= offset <= offset + len(buffer) <= self.size:
            raise ValueError(f"range {offset}+{len(buffer)} is not within {self.size} bytes")
        if not buffer:
            return
        part = self._part(offset, len(buffer))
        alone = self._await_turn(part, deadline)
        try:
            with self._client.open_part(part, deadline) as body:
                self._check(body)
                if body.whole and not alone:
                    alone = self._await_turn(part, deadline, alone=True)
                if body.whole:
                    self._read_stream(body, part, buffer, progress)
                    return
                self._ranges = True
                if alone:
                    alone = False
                    self._end_turn()
                self._read_range(body, buffer, progress)
        finally:
            if alone:
                self._end_turn()

    def _part(self, offset: int, length: int) -> Part:
        return Part(self._repository, self._digest, offset, length)

    def _check(self, body: Body) -> None:
        if body.total is not None and body.total != self.size:
            sizes = f"the registry has {body.total} bytes of it, the image says {self.size}"
            raise SourceError(f"reading a blob failed: {self.name}: {sizes}")

    # ---- turns -----------------------------------------------------------------------------

    def _await_turn(self, part: Part, deadline: float, *, alone: bool = False) -> bool:
        """Wait until a request may be sent; True if it is to be alone, and _end_turn() is due.

        Spilled as soon as a stream that was or came under way in the meantime has passed the part.
        """
        with self._turn:
            before = self._stream if self._stream.over else None
            while self._alone:
                if self._passed(part, before):
                    break
                if not self._turn.wait(deadline - time.monotonic()):
                    raise SourceError(f"reading a blob failed: {self.name}: no time left while others read it")
            if self._passed(part, before):
                raise Spilled(f"reading a blob failed: {self.name} at {part.offset}: another read has had these bytes")
            self._alone = alone or not self._ranges
            return self._alone

    def _passed(self, part: Part, before: _Stream | None) -> bool:
        return self._stream is not before and self._stream.passed >= part.offset + part.length

    def _end_turn(self) -> None:
        with self._turn:
            self._alone = False
            self._stream.over = True
            self._turn.notify_all()

    # ---- bytes -------------------------------------------------------------------------------

    def _read_range(self, body: Body, buffer: memoryview, progress: Callable[[int], None]) -> None:
        filled = told = 0
        while filled < len(buffer):
            filled += self._read(body, buffer[filled:])
            if filled - told >= PROGRESS_SIZE or filled == len(buffer):
                told = filled
                progress(filled)

    def _read_stream(self, body: Body, part: Part, buffer: memoryview, progress: Callable[[int], None]) -> None:
        """Spill the whole blob, and fill the buffer as its bytes come by."""
        body.reply.extend(time.monotonic() + WHOLE_BODY_SECONDS + self.size / WHOLE_BODY_RATE)
        stream = _Stream()
        with self._turn:
            self._stream = stream
            self._ranges = False
        piece = memoryview(bytearray(min(SPILL_SIZE, self.size)))
        told = 0
        for start in range(0, self.size, SPILL_SIZE):
            whole = piece[: min(SPILL_SIZE, self.size - start)]
            filled = 0
            while filled < len(whole):
                filled += self._read(body, whole[filled:])
            done = _copy_overlap(whole, start, buffer, part.offset)
            if done > told:
                told = done
                progress(told)
            self._spill(start, whole)
            with self._turn:
                stream.passed = start + len(whole)
                self._turn.notify_all()

    def _read(self, body: Body, into: memoryview) -> int:
        if self._closed:
            raise SourceError(f"reading a blob failed: {self.name}: it is being closed")
        count = body.reply.read_piece(into)
        if count == 0:
            raise SourceError(f"reading a blob failed: {self.name}: the answer ended early")
        return count


def _copy_overlap(piece: memoryview, piece_start: int, buffer: memoryview, buffer_start: int) -> int:
    """Copy what the two have in common; how far the buffer is filled then, 0 if they have nothing in common."""
    start = max(piece_start, buffer_start)
    end = min(piece_start + len(piece), buffer_start + len(buffer))
    if start >= end:
        return 0
    buffer[start - buffer_start : end - buffer_start] = piece[start - piece_start : end - piece_start]
    return end - buffer_start
