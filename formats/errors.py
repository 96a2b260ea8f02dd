# SPDX-License-Identifier: Apache-2.0
"""The one error of this room: bytes that break their format.

Every parser in formats/ answers any input with a value or a FormatError. Builders
raise it too, for values that the format has no bytes for.
"""

from __future__ import annotations


class FormatError(Exception):
    """`what` is wrong, in a few words; `offset` is where, in bytes of the object parsed (None: no one place)."""

    def __init__(self, what: str, offset: int | None = None) -> None:
        super().__init__(what if offset is None else f"{what} (at byte {offset})")
        self.what = what
        self.offset = offset


class Unsupported(FormatError):
    """The format is kept, by a part of it that is not read here."""
