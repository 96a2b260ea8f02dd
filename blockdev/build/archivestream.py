# SPDX-License-Identifier: Apache-2.0
"""The archive of a layer, fetched, unpacked and checked by a thread of its own, ahead of who reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from blockdev.build.ahead import Ahead
from blockdev.build.depot import Depot, Read
from blockdev.build.plain import plain
from blockdev.build.sourceimage import Archived
from blockdev.errors import CorruptImage
from formats import oci
from formats.errors import FormatError

_REST = 1 << 20  # bytes read at a time of what follows an archive's end


class _Closed(Exception):
    """Nobody wants the archive any more."""


class ArchiveStream:
    """Begins at once. read() for one thread; finish() once the archive's end was read; close() in any case."""

    def __init__(self, source: Depot, layer: Archived, counting: Callable[[Read], Read]) -> None:
        """counting: wraps the reading of the blob."""
        self.name = f"{source.name}@{layer.blob.digest}"
        self._source = source
        self._layer = layer
        self._counting = counting
        self._checksum = hashlib.new(oci.parse_digest(layer.diff_id)[0])
        self._closed = False
        self._ahead = Ahead(self._opened, "unpack")

    def read(self, length: int) -> bytes:
        """The next bytes, at most so many. CorruptImage if they cannot be unpacked, and what the source raises."""
        try:
            return self._ahead.read(length)
        except FormatError as error:
            raise CorruptImage(f"converting a layer failed: {self.name}: {error}") from None

    def finish(self) -> None:
        """Read what follows the archive's end. CorruptImage if all of it is not what the config says."""
        while self.read(_REST):
            pass
        if self._checksum.hexdigest() != oci.parse_digest(self._layer.diff_id)[1]:
            why = f"unpacked it has another digest than the config says, {self._layer.diff_id}"
            raise CorruptImage(f"converting a layer failed: {self.name}: {why}")

    def close(self) -> None:
        """No more is read of the blob. Idempotent."""
        self._closed = True
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _opened(self) -> Iterator[Read]:
        with self._source.opened(self._layer.blob) as blob:
            read = self._counting(self._while_open(blob))
            unpacked = plain(read)

            def read_hashed(length: int) -> bytes:
                piece = unpacked(length)
                self._checksum.update(piece)
                return piece

            yield read_hashed
            while read(_REST):  # what is behind the compressed archive is the blob's, too
                pass

    def _while_open(self, blob: Read) -> Read:
        def read(length: int) -> bytes:
            piece = b"" if self._closed else blob(length)
            if self._closed:
                raise _Closed
            return piece

        return read
