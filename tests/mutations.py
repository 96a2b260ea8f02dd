# SPDX-License-Identifier: Apache-2.0
"""Damaged bytes for parsers: edits, cuts and extensions of good files, and plain noise."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from formats.errors import FormatError

MEMORY_MAX = 24 << 20  # a parser of small files that needs more has believed a count


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], hot: Sequence[range] = ()) -> bytes:
    """A seed with a few bytes changed, half of them in the `hot` places (negative = from the end), maybe cut."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content) - 1))
        if hot and draw(st.booleans()):
            place = draw(st.sampled_from(draw(st.sampled_from(hot)))) % len(content)
        value = draw(st.sampled_from((b"\0", b"\1", b"\xff", b"\x7f")) | st.binary(min_size=1, max_size=9))
        content[place : place + len(value)] = value
    cut = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:cut]) + draw(st.just(b"") | st.binary(max_size=600))


def value_or_format_error(parse: Callable[[], object]) -> object | None:
    """What parse returns, or None if it raises FormatError; any other exception and greed for memory fail the test."""
    tracemalloc.start()
    try:
        return parse()
    except FormatError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_MAX
