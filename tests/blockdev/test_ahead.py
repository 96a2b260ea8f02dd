# SPDX-License-Identifier: Apache-2.0
"""What is read ahead comes in order, bounded, and with the error that ended it."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from blockdev.build.ahead import DEPTH, PIECE, Ahead, Read
from blockdev.errors import SourceError
from tests.commands import until


def _opened(read: Read) -> Callable[[], contextmanager[Read]]:  # type: ignore[type-arg]
    @contextmanager
    def opened() -> Iterator[Read]:
        yield read

    return opened  # type: ignore[return-value]


def test_all_bytes_come_in_order() -> None:
    content = bytes(range(251)) * 20_000
    with Ahead(_opened(io.BytesIO(content).read), "test") as ahead:
        found = b"".join(iter(lambda: ahead.read(77_777), b""))
        assert found == content
        assert ahead.read(1) == b""


def test_only_so_much_is_read_ahead() -> None:
    given = 0

    def read(length: int) -> bytes:
        nonlocal given
        given += length
        return bytes(length)

    with Ahead(_opened(read), "test") as ahead:
        assert until(lambda: given >= DEPTH)
        for _ in range(100):
            assert len(ahead.read(PIECE)) == PIECE
            assert given <= DEPTH + 102 * PIECE
    assert given <= DEPTH + 102 * PIECE


def test_what_reading_raises_comes_after_the_bytes_before_it() -> None:
    pieces = iter([b"one", b"two"])

    def read(length: int) -> bytes:
        piece = next(pieces, None)
        if piece is None:
            raise SourceError("reading failed: it: gone")
        return piece

    with Ahead(_opened(read), "test") as ahead:
        assert ahead.read(10) + ahead.read(10) == b"onetwo"
        with pytest.raises(SourceError):
            ahead.read(10)


def test_closing_ends_the_thread_and_leaves_the_stream() -> None:
    left = threading.Event()

    @contextmanager
    def opened() -> Iterator[Read]:
        try:
            yield bytes
        finally:
            left.set()

    ahead = Ahead(opened, "test")
    ahead.close()
    assert left.is_set()


def test_closing_leaves_a_read_that_does_not_return() -> None:
    answer = threading.Event()

    def read(length: int) -> bytes:
        answer.wait()
        return b""

    ahead = Ahead(_opened(read), "test")
    closing = threading.Thread(target=ahead.close)
    closing.start()
    try:
        assert until(lambda: not closing.is_alive())
    finally:
        answer.set()
        closing.join()
