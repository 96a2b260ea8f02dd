# SPDX-License-Identifier: Apache-2.0
"""Ranges of a file: data among holes, and errors that are no holes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockdev.ranges import data_ranges, write_at

MIB = 1 << 20


def test_what_was_written_is_data_and_the_rest_is_holes(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        assert write_at(file.fileno(), b"a" * MIB, 4 * MIB) == MIB
        assert write_at(file.fileno(), memoryview(b"b" * 10), 9 * MIB) == 10
        found = list(data_ranges(file.fileno(), 9 * MIB + 10))
    covered = [any(start <= at < end for start, end in found) for at in (0, 4 * MIB, 5 * MIB - 1, 7 * MIB, 9 * MIB)]
    assert covered == [False, True, True, False, True]
    assert found[-1][1] == 9 * MIB + 10


def test_an_end_that_is_all_hole_has_no_data(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        os.truncate(file.fileno(), MIB)
        assert list(data_ranges(file.fileno(), MIB)) == []


def test_a_file_that_cannot_say_where_its_data_are_is_an_error_and_no_hole() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            list(data_ranges(reader, MIB))
    finally:
        os.close(reader)
        os.close(writer)
