# SPDX-License-Identifier: Apache-2.0
"""Presence maps that never change: formats/presence.py and the engine both have to make these bytes.

The blob has four extents; the last is four bytes whose CRC32C is 0.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

EXTENT = 65536
_CRC_0 = b"\xab\x9b\xe0\x9b"

CONTENT = bytes((place * 7 + (place >> 8) * 31) % 256 for place in range(3 * EXTENT)) + _CRC_0
EXTENTS = [CONTENT[start : start + EXTENT] for start in range(0, len(CONTENT), EXTENT)]
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
PARTIAL = {0, 3}
WHOLE = {0, 1, 2, 3}
REPOSITORY = f"sha256:{hashlib.sha256(b'registry.example/app').hexdigest()}"


def kept(name: str) -> bytes:
    """The map with only the PARTIAL extents ("partial"; "owned": by REPOSITORY), or whole and verified ("sealed")."""
    return (Path(__file__).parent / "data" / f"presence-{name}.map").read_bytes()
