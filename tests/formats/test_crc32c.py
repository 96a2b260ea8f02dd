# SPDX-License-Identifier: Apache-2.0
"""The check values of both forms."""

from __future__ import annotations

from formats.crc32c import crc32c, standard


def test_the_check_values() -> None:
    assert crc32c(0, b"123456789") == 0x58E3FA20
    assert crc32c(100007, b"123456789") == 0x3C9BD4E0
    assert standard(b"123456789") == 0xE3069283


def test_results_chain_as_seeds() -> None:
    assert crc32c(crc32c(5, b"1234"), b"56789") == crc32c(5, b"123456789")
