# SPDX-License-Identifier: Apache-2.0
"""A blob in a registry, as a Source: ranged GETs, and what to do when ranges are ignored.

A registry that answers 200 to a range sends the whole blob. That body is read once, to its end:
the reader whose request it answers gets its bytes from it, all of it goes to `spill`, and other
readers wait. One of these whose range has passed by ends with Spilled, since the bytes are where
the spill put them. So that no two readers start a whole body, the first request of a blob is
alone until its status is known.

Where the spill keeps nothing (a full disk), each miss would need another whole body. The pause
before the next one doubles: WHOLE_PAUSE, twice that, ..., WHOLE_PAUSE_MAX. So in a time t no blob is
downloaded more often than 2 + log2(t / WHOLE_PAUSE) times, and from then on once in WHOLE_PAUSE_MAX.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.engine import Fetch
from blockdev.errors import BlockdevError, SourceError
from blockdev.registry.backoff import LeftAlone
from blockdev.registry.client import Body, Client, Part
from blockdev.source import PROGRESS_SIZE, Spilled

log = logging.getLogger(__name__)

SPILL_SIZE = 4 * PROGRESS_SIZE  # bytes of one spill(), from a multiple of it: whole extents, in few calls
# A whole body may take longer than the read that started it. It gets the time that a slow but
# living line needs, so that a sender of one byte a second is given up in the end.
WHOLE_BODY_RATE = 64 << 10  # bytes a second
WHOLE_BODY_SECONDS = 60.0

WHOLE_PAUSE = 1.0  # seconds
WHOLE_PAUSE_MAX = 300.0
# A reader may have decided to ask before the spill had its bytes, and come only after the stream's
# end. Sent on, it would start another whole body. Longer than a thread is ever kept from running.
SPILL_MEMORY = 1.0  # seconds


@dataclass
class _Lone:
    """A request that is alone, and what others have to know of it."""

    spilled: int = 0  # bytes from the blob's start
    over: bool = False
    forget_at: float = float("inf")  # monotonic; what was spilled may be gone then
    error: BlockdevError | None = None


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
        self.host = client.host
        self._client = client
        self._repository = repository
        self._digest = digest
        self._spill = spill
        self._closed = False
        self._turn = threading.Condition()
        self._ranges = False  # the last answer was a range: requests need not be alone
        self._lone = _Lone(over=True)  # the last one
        self._wholes = 0  # whole bodies read to their end
        self._next_whole = 0.0  # monotonic: no other whole body before

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
        lone = self._await_turn(part, deadline)
        try:
            with self._client.open_part(part, deadline) as body:
                self._check(body)
                if body.whole and not lone:
                    self._ranges = False
                    lone = self._await_turn(part, deadline, lone=True)
                if body.whole and lone:
                    self._read_stream(body, lone, part, buffer, progress)
                    return
                self._ranges = True
                if lone:
                    self._end(lone)
                    lone = None
                self._read_range(body, buffer, progress)
        except BlockdevError as error:
            if lone:
                lone.error = error
            raise
        finally:
            if lone:
                self._end(lone)

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """As Source.fill(): once a range has been answered with a range, until something else comes."""
        if not self._ranges or not self._lone.over:
            return False
        status = self._client.fill_part(self._part(fetch.offset, fetch.length), fetch, deadline)
        if status == 200:
            self._ranges = False
        return status == 206

    def _part(self, offset: int, length: int) -> Part:
        return Part(self._repository, self._digest, offset, length)

    def _check(self, body: Body) -> None:
        if body.total is not None and body.total != self.size:
            sizes = f"the registry has {body.total} bytes of it, the image says {self.size}"
            raise SourceError(f"reading a blob failed: {self.name}: {sizes}")

    # ---- turns -----------------------------------------------------------------------------

    def _await_turn(self, part: Part, deadline: float, *, lone: bool = False) -> _Lone | None:
        """Wait until no request is alone. If this one is to be, it is from now until _end().

        Spilled as soon as a stream has passed the part. What failed alone has failed for all that
        waited: a registry in trouble is not asked by each of them in turn.
        """
        with self._turn:
            while True:
                other = self._lone
                waited = self._wait(other, part, deadline)
                if other.spilled >= part.offset + part.length and time.monotonic() < other.forget_at:
                    raise Spilled(f"reading a blob failed: {self.name} at {part.offset}: another read has had this")
                if waited and other.error:
                    raise copy.copy(other.error)
                if self._lone.over:
                    break
            if not lone and self._ranges:
                return None
            self._check_pause()
            self._lone = _Lone()
            return self._lone

    def _check_pause(self) -> None:
        wait = self._next_whole - time.monotonic()
        if wait > 0 and not self._ranges:
            why = "the registry ignores ranges, and the cache did not keep the whole blob"
            raise LeftAlone(f"reading a blob failed: {self.name}: {why}: asked again in {wait:.0f} s", seconds=wait)

    def _wait(self, other: _Lone, part: Part, deadline: float) -> bool:
        """Until the request is over or has spilled the part; whether there was anything to wait for."""
        if other.over:
            return False
        end = part.offset + part.length
        if not self._turn.wait_for(lambda: other.over or other.spilled >= end, deadline - time.monotonic()):
            raise SourceError(f"reading a blob failed: {self.name}: no time left while another read has its turn")
        return True

    def _end(self, lone: _Lone) -> None:
        with self._turn:
            lone.over = True
            lone.forget_at = time.monotonic() + SPILL_MEMORY
            self._turn.notify_all()

    # ---- bytes -------------------------------------------------------------------------------

    def _read_range(self, body: Body, buffer: memoryview, progress: Callable[[int], None]) -> None:
        filled = told = 0
        while filled < len(buffer):
            filled += self._read(body, buffer[filled:])
            if filled - told >= PROGRESS_SIZE or filled == len(buffer):
                told = filled
                progress(filled)

    def _read_stream(
        self, body: Body, lone: _Lone, part: Part, buffer: memoryview, progress: Callable[[int], None]
    ) -> None:
        """Spill the whole blob, and fill the buffer as its bytes come by."""
        if not self._wholes:
            log.warning("registry ignores ranges, all of the blob is read source=%s", self.name)
        body.reply.extend(time.monotonic() + WHOLE_BODY_SECONDS + self.size / WHOLE_BODY_RATE)
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
                lone.spilled = start + len(whole)
                self._turn.notify_all()
        self._next_whole = time.monotonic() + min(WHOLE_PAUSE * 2**self._wholes, WHOLE_PAUSE_MAX)
        self._wholes = min(self._wholes + 1, 30)

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
