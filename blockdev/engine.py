# SPDX-License-Identifier: Apache-2.0
"""The C engine, as Python objects: the only module that imports the C code.

Promises: every handle is closed once, by close() or a with block; a negative return
becomes one exception (see _check); no call holds the GIL while it waits. Offsets and
lengths are bytes. The manual of what the calls do is native/ob.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

from blockdev._native import ffi, lib
from blockdev.config import Policy
from blockdev.errors import BlockdevError, CorruptImage, EngineError, SourceError

ABI_VERSION = 4
EXTENT_SIZE: int = lib.OB_EXTENT_SIZE
LAYERS_MAX: int = lib.OB_LAYERS_MAX

if lib.ob_abi_version() != ABI_VERSION:
    raise ImportError(f"blockdev._native has ABI {lib.ob_abi_version()}, this package needs {ABI_VERSION}: rebuild it")


class EngineStopped(EngineError):
    """The engine is stopping: nothing waits any more."""


class Priority(IntEnum):
    """How urgent a fetch is; lower comes first."""

    FOREGROUND = lib.OB_FOREGROUND
    PREFETCH = lib.OB_PREFETCH
    BULK = lib.OB_BULK


class EventKind(IntEnum):
    """What Event.kind can be (native/ob.h says when)."""

    BLOB_COMPLETE = lib.OB_EVENT_BLOB_COMPLETE
    CACHE_WRITE = lib.OB_EVENT_CACHE_WRITE
    BLOB_FAILING = lib.OB_EVENT_BLOB_FAILING
    BLOB_DOWN = lib.OB_EVENT_BLOB_DOWN
    NBD_CLOSED = lib.OB_EVENT_NBD_CLOSED
    FUSE_CLOSED = lib.OB_EVENT_FUSE_CLOSED


class RunKind(IntEnum):
    """What a run of an image is: mapped by no layer, zeroed by one, or stored in one."""

    HOLE = lib.OB_RUN_HOLE
    ZERO = lib.OB_RUN_ZERO
    DATA = lib.OB_RUN_DATA


class LayerKind(IntEnum):
    """How a layer maps the disk (native/ob.h, ob_layer)."""

    SEALED = lib.OB_LAYER_SEALED
    LOG = lib.OB_LAYER_LOG
    FLAT = lib.OB_LAYER_FLAT


class Codec(IntEnum):
    """ZFile's codec numbers."""

    LZ4 = lib.OB_CODEC_LZ4
    ZSTD = lib.OB_CODEC_ZSTD


_POLICY = {"eio": lib.OB_POLICY_EIO, "retry": lib.OB_POLICY_RETRY, "hang": lib.OB_POLICY_HANG}

_ERROR_CLASS: dict[int, type[BlockdevError]] = {
    errno.ESHUTDOWN: EngineStopped,
    errno.EBADMSG: CorruptImage,
    errno.EIO: SourceError,
}


def _check(status: int) -> int:
    """A count or 0 as it is; a negative status as the exception it stands for."""
    if status >= 0:
        return status
    text = ffi.string(lib.ob_last_error()).decode(errors="replace")
    raise _ERROR_CLASS.get(-status, EngineError)(text or f"engine: {os.strerror(-status)}")


@dataclass(frozen=True)
class Event:
    """Something the engine tells its user; id is the blob's, connection's or session's."""

    kind: EventKind
    status: int
    id: int


@dataclass(frozen=True)
class Run:
    """A piece of an image's map; layer counts from the bottom and is -1 for a hole."""

    offset: int
    length: int
    kind: RunKind
    layer: int


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


class _Handle:
    """A C object that is closed once."""

    def __init__(self, pointer: Any, close: Any) -> None:
        self._pointer = pointer
        self._close = close

    def close(self) -> None:
        """Give the object back. What was made from it goes on living."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._close(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _handle(self) -> Any:
        if self._pointer is None:
            raise EngineError(f"{type(self).__name__}: used after close")
        return self._pointer


class File(_Handle):
    """The plain content of one layer: bytes by offset, decoded. A formats ReadAt."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.ob_file_close)

    @property
    def size(self) -> int:
        return int(lib.ob_file_size(self._handle))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset. CorruptImage, SourceError or EngineStopped."""
        _check(lib.ob_file_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)


class Blob(_Handle):
    """A blob: a local file, or a cache entry that fills by fetches. A formats ReadAt."""

    def __init__(self, pointer: Any, size: int) -> None:
        super().__init__(pointer, lib.ob_blob_close)
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset, waiting for fetches where bytes are missing."""
        _check(lib.ob_blob_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def store(self, offset: int, content: bytes | bytearray | memoryview) -> int:
        """Offer bytes that came another way; returns how many extents were taken."""
        return _check(lib.ob_blob_store(self._handle, offset, ffi.from_buffer(content), len(content)))

    def drop(self, offset: int, length: int) -> int:
        """Take whole extents of the range out of the cache; returns how many went."""
        return _check(lib.ob_blob_drop(self._handle, offset, length))

    def prefetch(self, offset: int, length: int, priority: Priority) -> None:
        """Have a range fetched, without waiting."""
        _check(lib.ob_blob_prefetch(self._handle, offset, length, priority))

    def healthy(self) -> None:
        """A probe found the source well again."""
        lib.ob_blob_healthy(self._handle)

    def set_policy(self, policy: Policy) -> None:
        """What becomes of reads whose source does not deliver."""
        _check(lib.ob_blob_set_policy(self._handle, _POLICY[policy.mode], int(policy.seconds * 1e9)))

    def stat(self) -> BlobStat:
        out = ffi.new("ob_blob_stat *")
        lib.ob_blob_get_stat(self._handle, out)
        return BlobStat(
            out.size, out.present_bytes, out.fetched_bytes, out.fetches, out.hits, out.misses, out.crc_failures,
            out.retired, out.failing_ns / 1e9, bool(out.down),
        )  # fmt: skip

    def open_raw(self, base: int, length: int) -> File:
        """length bytes from base as they are."""
        out = ffi.new("ob_file **")
        _check(lib.ob_file_open_raw(self._handle, base, length, out))
        return File(out[0])

    def open_zfile(self, head: ZFileHead) -> File:
        """The decoded content of a ZFile. Reads and checks its jump table."""
        fields = {name: getattr(head, name) for name in head.__dataclass_fields__}
        out = ffi.new("ob_file **")
        _check(lib.ob_file_open_zfile(self._handle, ffi.new("ob_zfile_head *", fields), out))
        return File(out[0])


class HttpTarget:
    """Where one GET brings a blob's ranges (native/ob.h, ob_http_target)."""

    def __init__(
        self,
        failed: str,
        url: str,
        headers: Sequence[str],
        *,
        proxy: str,
        trust: Trust,
        connect: float,
        stall: float,
        slowest: int,
    ) -> None:
        """`headers` are whole lines; `proxy` is "" for none; times are seconds, `slowest` bytes a second."""
        lines = [ffi.new("char[]", line.encode()) for line in headers]
        self._kept = [
            lines, trust.certificates, ffi.new("char[]", failed.encode()), ffi.new("char[]", url.encode()),
            ffi.new("char[]", proxy.encode()), ffi.new("char[]", trust.folder.encode()),
        ]  # fmt: skip
        self._struct = ffi.new("ob_http_target *")
        _, certificates, self._struct.failed, self._struct.url, self._struct.proxy, folder = self._kept
        self._struct.headers = lines
        self._struct.ca_path = folder if trust.folder else ffi.NULL
        self._struct.certificates = ffi.from_buffer(certificates)
        self._struct.certificates_size = len(certificates)
        self._struct.connect_ns, self._struct.stall_ns = int(connect * 1e9), int(stall * 1e9)
        self._struct.stall_bytes = int(slowest * stall)


@dataclass(frozen=True)
class Trust:
    """Certificates that are trusted: PEM, and a directory as OpenSSL's c_rehash leaves it, or ""."""

    certificates: bytes = b""
    folder: str = ""


@dataclass(frozen=True)
class Refusal:
    """What a GET was answered instead of the range."""

    status: int
    retry_after: str


class Fetch:
    """A missing range on loan: fill buffer, advance as it fills, finish once.

    `held`: get() advances nothing; whoever set it looks at what has come, `filled` bytes, and advances.
    """

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self.blob_id: int = pointer.blob_id
        self.offset: int = pointer.offset
        self.length: int = pointer.length
        self.priority = Priority(pointer.priority)
        self.attempt: int = pointer.attempt
        self.held = False
        self.filled = 0
        self.buffer = memoryview(ffi.buffer(pointer.buffer, pointer.length))

    def advance(self, filled: int) -> None:
        """The first `filled` bytes are right: whoever waits for them goes on."""
        _check(lib.ob_fetch_advance(self._pointer, filled))

    def get(self, target: HttpTarget, *, timeout: float) -> Refusal | None:
        """Fill all that is not advanced yet with one GET; None: that is done. SourceError keeps what was advanced."""
        out = ffi.new("ob_http_answer *")
        status = lib.ob_fetch_http(self._pointer, target._struct, int(timeout * 1e9), self.held, out)
        self.filled = out.filled
        if _check(status):
            return None
        return Refusal(out.status, ffi.string(out.retry_after).decode("latin-1"))

    def finish(self, status: int = 0, *, retry: float = 0.0) -> None:
        """Give it back. status: 0, or an errno; retry: seconds until another attempt, 0 for none."""
        self.buffer.release()
        pointer, self._pointer = self._pointer, None
        _check(lib.ob_fetch_finish(pointer, -status, int(retry * 1e9)))


class NbdConnection(_Handle):
    """An NBD connection in transmission, served by C."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, None)

    def close(self, *, timeout: float = 0.0) -> None:
        """Take no more requests, answer those in hand within timeout seconds, hang up."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            lib.ob_nbd_close(pointer, int(timeout * 1e9))


@dataclass(frozen=True)
class FuseStat:
    """What a FUSE session has answered since it started."""

    requests: int
    read_bytes: int


class FuseSession(_Handle):
    """A FUSE session, served by C."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.ob_fuse_close)

    def stat(self) -> FuseStat:
        out = ffi.new("ob_fuse_stat *")
        lib.ob_fuse_get_stat(self._handle, out)
        return FuseStat(out.requests, out.read_bytes)


@dataclass(frozen=True)
class LayerTable:
    """One layer of a stack, as native/ob.h's ob_layer describes it."""

    kind: LayerKind
    file: File
    index: File
    index_offset: int = 0
    index_count: int = 0
    data_end: int = 0
    extent_limit: int = 0


class Image(_Handle):
    """A stack of layers as one disk."""

    RUNS_AT_ONCE = 1024

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.ob_image_close)
        self.writable = False

    @property
    def size(self) -> int:
        return int(lib.ob_image_size(self._handle))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from offset, waiting for fetches where bytes are missing."""
        _check(lib.ob_image_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def open_upper(self, data_fd: int, index_fd: int) -> None:
        """Make it writable: writes go to the pair of files (native/ob.h). The descriptors are duplicated."""
        _check(lib.ob_image_open_upper(self._handle, data_fd, index_fd))
        self.writable = True

    def write(self, offset: int, content: bytes | bytearray | memoryview) -> None:
        """Write at any offset; durable after flush()."""
        _check(lib.ob_image_write(self._handle, offset, ffi.from_buffer(content), len(content)))

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        _check(lib.ob_image_zero(self._handle, offset, length))

    def flush(self) -> None:
        """What was written so far outlasts a power cut once this returns."""
        _check(lib.ob_image_flush(self._handle))

    def runs(self, offset: int, length: int) -> list[Run]:
        """The map of the range from its start: RUNS_AT_ONCE runs at most, no gaps."""
        out = ffi.new("ob_run[]", self.RUNS_AT_ONCE)
        count = _check(lib.ob_image_runs(self._handle, offset, length, out, self.RUNS_AT_ONCE))
        return [Run(out[i].offset, out[i].length, RunKind(out[i].kind), out[i].layer) for i in range(count)]

    def serve_nbd(self, fd: int, *, id: int, structured: bool, allocation: bool) -> NbdConnection:
        """Answer NBD requests on a negotiated socket until it closes."""
        config = ffi.new("ob_nbd_config *", {"id": id, "structured": structured, "allocation": allocation})
        out = ffi.new("ob_nbd **")
        _check(lib.ob_nbd_start(self._handle, fd, config, out))
        return NbdConnection(out[0])

    def serve_fuse(self, fuse_fd: int, memfd: int, *, id: int, threads: int, slots: int) -> FuseSession:
        """Answer FUSE requests on a mounted /dev/fuse descriptor until it is unmounted."""
        config = ffi.new("ob_fuse_config *", {"id": id, "threads": threads, "slots": slots})
        out = ffi.new("ob_fuse **")
        _check(lib.ob_fuse_start(self._handle, fuse_fd, memfd, config, out))
        return FuseSession(out[0])


class Engine(_Handle):
    """Threads, the miss queue and events: what blobs and images live in."""

    def __init__(self, *, work_threads: int = 2, readahead_extents: int = 512, fetch_bytes: int = 64 << 20) -> None:
        fields = {"work_threads": work_threads, "readahead_extents": readahead_extents, "fetch_bytes": fetch_bytes}
        out = ffi.new("ob_engine **")
        _check(lib.ob_engine_open(ffi.new("ob_engine_config *", fields), out))
        super().__init__(out[0], lib.ob_engine_close)

    def stop(self) -> None:
        """Fail whoever waits with EngineStopped, and go on doing so."""
        lib.ob_engine_stop(self._handle)

    def open_local(self, fd: int, size: int) -> Blob:
        """A file that holds its whole blob; the descriptor is duplicated."""
        out = ffi.new("ob_blob **")
        _check(lib.ob_blob_open_local(self._handle, fd, size, out))
        return Blob(out[0], size)

    def open_cached(
        self,
        data_fd: int,
        map_fd: int,
        *,
        id: int,
        size: int,
        table_offset: int,
        policy: Policy,
        seal_offset: int = 0,
        unit: int = 1,
    ) -> Blob:
        """A cache entry; both descriptors are duplicated. Offsets are of the map (native/ob.h, ob_blob_config)."""
        fields = {
            "id": id,
            "size": size,
            "table_offset": table_offset,
            "seal_offset": seal_offset,
            "policy": _POLICY[policy.mode],
            "policy_ns": int(policy.seconds * 1e9),
            "unit": unit,
        }
        out = ffi.new("ob_blob **")
        _check(lib.ob_blob_open_cached(self._handle, data_fd, map_fd, ffi.new("ob_blob_config *", fields), out))
        return Blob(out[0], size)

    def open_image(self, layers: Sequence[LayerTable], size: int) -> Image:
        """Stack layers, bottom first, to a disk of size bytes. Reads and checks their indexes."""
        table = ffi.new("ob_layer[]", len(layers))
        for entry, layer in zip(table, layers, strict=True):
            entry.kind = layer.kind
            entry.file = layer.file._handle
            entry.index = layer.index._handle
            entry.index_offset = layer.index_offset
            entry.index_count = layer.index_count
            entry.data_end = layer.data_end
            entry.extent_limit = layer.extent_limit
        out = ffi.new("ob_image **")
        _check(lib.ob_image_open(self._handle, table, len(layers), size, out))
        return Image(out[0])

    def next_fetch(self, lowest: Priority, *, timeout: float) -> Fetch | None:
        """The most urgent fetch of priority lowest or better, or None after timeout seconds."""
        out = ffi.new("ob_fetch **")
        status = lib.ob_fetch_next(self._handle, lowest, int(timeout * 1e9), out)
        if status == -errno.ETIMEDOUT:
            return None
        _check(status)
        return Fetch(out[0])

    @property
    def event_fd(self) -> int:
        """A descriptor that polls readable while events wait."""
        return int(lib.ob_event_fd(self._handle))

    def next_event(self) -> Event | None:
        out = ffi.new("ob_event *")
        if not _check(lib.ob_event_next(self._handle, out)):
            return None
        return Event(EventKind(out.kind), out.status, out.id)


def crc32c(seed: int, content: bytes | bytearray | memoryview) -> int:
    """CRC32C without inversions, as ZFile uses it."""
    return int(lib.ob_crc32c(seed, ffi.from_buffer(content), len(content)))


def zero_run(content: bytes | bytearray | memoryview, grain: int) -> tuple[int, int]:
    """Start and end of the first grains in a row that are all zero; the content's length twice if there are none."""
    end = ffi.new("uint64_t *")
    return int(lib.ob_zero_run(ffi.from_buffer(content), len(content), grain, end)), int(end[0])


class Compressor:
    """Plain bytes to stored ZFile blocks, in memory that is kept for the next call. For one thread at a time."""

    def __init__(self, codec: Codec, block_size: int, *, crc: bool) -> None:
        self._how = codec, block_size
        self._crc = crc
        self._grow(0)

    def _grow(self, size: int) -> None:
        """Make room for what `size` plain bytes become."""
        self._size = size
        self._out = _uncleared("unsigned char[]", max(1, lib.ob_zfile_bound(*self._how, size)))
        self._lengths = _uncleared("uint32_t[]", max(1, -(-size // self._how[1])))

    def compress(self, content: bytes | bytearray | memoryview) -> tuple[memoryview, memoryview]:
        """Content as consecutive blocks: their bytes, and each one's stored length (uint32), until the next call.

        The GIL is free meanwhile.
        """
        size, block_size = len(content), self._how[1]
        if size > self._size:
            self._grow(size)
        plain, room = ffi.from_buffer(content), len(self._out)
        written = _check(lib.ob_zfile_compress(*self._how, self._crc, plain, size, self._out, room, self._lengths))
        lengths = ffi.buffer(self._lengths, 4 * -(-size // block_size))
        return memoryview(ffi.buffer(self._out, written)), memoryview(lengths).cast("I")


_uncleared = ffi.new_allocator(should_clear_after_alloc=False)  # clearing costs as much as writing the result
