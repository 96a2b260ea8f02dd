# SPDX-License-Identifier: Apache-2.0
"""Blobs that carry a digest table: any payload in a layer's tar, the table behind it."""

from __future__ import annotations

from formats import tar
from formats.digests import UNIT, Place, TableWriter


def tabled(payload: bytes) -> tuple[bytes, Place]:
    """The blob, and what its descriptor says of its table."""
    covered = tar.wrap_head(len(payload)) + payload + tar.padding(len(payload))
    writer = TableWriter(0)
    writer.add(covered)
    table = writer.finish(covered[:UNIT])
    return covered + table.tail, table.place
