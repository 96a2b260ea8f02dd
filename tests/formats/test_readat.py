# SPDX-License-Identifier: Apache-2.0
"""Ranges are exact or refused."""

from __future__ import annotations

import pytest

from formats.errors import FormatError
from formats.readat import BytesAt, ReadAt, Window

TEN = BytesAt(b"0123456789")


def test_a_window_is_an_object_of_its_own() -> None:
    window = Window(TEN, 2, 5)
    assert (window.size, window.read_at(0, 5), window.read_at(4, 1)) == (5, b"23456", b"6")
    assert Window(window, 1, 2).read_at(0, 2) == b"34"


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (10, 1), (-1, 1), (3, -1), (1 << 70, 1)])
@pytest.mark.parametrize("source", [TEN, Window(BytesAt(b"x0123456789x"), 1, 10)])
def test_a_range_outside_is_refused(source: ReadAt, offset: int, length: int) -> None:
    with pytest.raises(FormatError) as caught:
        source.read_at(offset, length)
    assert caught.value.offset == offset


def test_a_window_past_its_source_is_refused() -> None:
    with pytest.raises(FormatError):
        Window(TEN, 5, 6)


def test_an_error_says_what_and_where() -> None:
    assert str(FormatError("no magic")) == "no magic"
    assert str(FormatError("no magic", 7)) == "no magic (at byte 7)"
