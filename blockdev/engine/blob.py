# SPDX-License-Identifier: Apache-2.0
"""Where bytes are: blobs, and the plain content of layers in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockdev.config import Policy
from blockdev.engine.border import Handle, check, ffi, lib
from blockdev.engine.compress import Codec
from blockdev.engine.fetch import Priority
from blockdev.errors import EngineError, SourceError

POLICIES = {"eio": lib.OB_POLICY_EIO, "retry": lib.OB_POLICY_RETRY, "hang": lib.OB_POLICY_HANG}


@dataclass(frozen=True)
class BlobStat:
    """Numbers of one blob since it was opened (native/ob.h, ob_blob_stat)."""

    size: int
    present_bytes: int
    fetched_bytes: int
    fetches: int
    hits: int
    misses: int
    crc_failures: int
    retired: int
    failing_seconds: float
    down: bool
    write_error: int  # errno of the last write that failed
    write_failures: int
    damaged: bool
    damaged_offset: int  # of the last block that was found wrong for good


@dataclass(frozen=True)
class ZFileHead:
    """A checked ZFile head; offsets count from base, the ZFile's place in its blob."""

    base: int
    length: int
    data_offset: int
    index_offset: int
    block_count: int
    plain_size: int
    block_size: int
    index_crc: int
    codec: Codec
    block_crc: bool
    check_index: bool


class File(Handle):
    """The plain content of one layer: bytes by offset, decoded. A formats ReadAt."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.ob_file_close)

    @property
    def size(self) -> int:
        return int(lib.ob_file_size(self._handle))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset. CorruptImage, SourceError or EngineStopped."""
        check(lib.ob_file_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)


class Blob(Handle):
    """A blob: a local file, or a cache entry that fills by fetches. A formats ReadAt."""

    def __init__(self, pointer: Any, size: int) -> None:
        super().__init__(pointer, lib.ob_blob_close)
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset, waiting for fetches where bytes are missing."""
        check(lib.ob_blob_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def store(self, offset: int, content: bytes | bytearray | memoryview) -> int:
        """Offer bytes that came another way; returns how many extents were taken."""
        return check(lib.ob_blob_store(self._handle, offset, ffi.from_buffer(content), len(content)))

    def offer(self, offset: int, content: bytes | bytearray | memoryview) -> int:
        """As store(), for bytes that can be had again: 0 where the cache cannot be written, which CACHE_WRITE tells."""
        try:
            return self.store(offset, content)
        except (EngineError, SourceError):  # of the disk: EIO too
            return 0

    def drop(self, offset: int, length: int) -> int:
        """Take whole extents of the range out of the cache; returns how many went."""
        return check(lib.ob_blob_drop(self._handle, offset, length))

    def prefetch(self, offset: int, length: int, priority: Priority) -> None:
        """Have a range fetched, without waiting."""
        check(lib.ob_blob_prefetch(self._handle, offset, length, priority))

    def healthy(self) -> None:
        """A probe found the source well again."""
        lib.ob_blob_healthy(self._handle)

    def settle(self) -> None:
        """Wait for writes of its cache that are under way: what has been read of it counts as present then."""
        lib.ob_blob_settle(self._handle)

    def set_host(self, host: int) -> None:
        """Which host its bytes come from, by a number: each has its share of the fetches."""
        lib.ob_blob_set_host(self._handle, host)

    def set_policy(self, policy: Policy) -> None:
        """What becomes of reads whose source does not deliver."""
        check(lib.ob_blob_set_policy(self._handle, POLICIES[policy.mode], int(policy.seconds * 1e9)))

    def stat(self) -> BlobStat:
        out = ffi.new("ob_blob_stat *")
        lib.ob_blob_get_stat(self._handle, out)
        return BlobStat(
            out.size, out.present_bytes, out.fetched_bytes, out.fetches, out.hits, out.misses, out.crc_failures,
            out.retired, out.failing_ns / 1e9, bool(out.down), -out.write_error, out.write_failures,
            bool(out.damaged), out.damaged_offset,
        )  # fmt: skip

    def open_raw(self, base: int, length: int) -> File:
        """length bytes from base as they are."""
        out = ffi.new("ob_file **")
        check(lib.ob_file_open_raw(self._handle, base, length, out))
        return File(out[0])

    def open_zfile(self, head: ZFileHead) -> File:
        """The decoded content of a ZFile. Reads and checks its jump table."""
        fields = {name: getattr(head, name) for name in head.__dataclass_fields__}
        out = ffi.new("ob_file **")
        check(lib.ob_file_open_zfile(self._handle, ffi.new("ob_zfile_head *", fields), out))
        return File(out[0])
