# SPDX-License-Identifier: Apache-2.0
"""A stack of layers as one disk, and who is served from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from blockdev.engine.blob import File
from blockdev.engine.border import Handle, check, ffi, lib


class RunKind(IntEnum):
    """What a run of an image is: mapped by no layer, zeroed by one, or stored in one."""

    HOLE = lib.OB_RUN_HOLE
    ZERO = lib.OB_RUN_ZERO
    DATA = lib.OB_RUN_DATA


@dataclass(frozen=True)
class Run:
    """A piece of an image's map; layer counts from the bottom and is -1 for a hole."""

    offset: int
    length: int
    kind: RunKind
    layer: int


class LayerKind(IntEnum):
    """How a layer maps the disk (native/ob.h, ob_layer)."""

    SEALED = lib.OB_LAYER_SEALED
    LOG = lib.OB_LAYER_LOG
    FLAT = lib.OB_LAYER_FLAT


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


class NbdConnection(Handle):
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


class FuseSession(Handle):
    """A FUSE session, served by C."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.ob_fuse_close)

    def stat(self) -> FuseStat:
        out = ffi.new("ob_fuse_stat *")
        lib.ob_fuse_get_stat(self._handle, out)
        return FuseStat(out.requests, out.read_bytes)


class Image(Handle):
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
        check(lib.ob_image_read(self._handle, offset, ffi.from_buffer(buffer, require_writable=True), len(buffer)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly length bytes."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def open_upper(self, data_fd: int, index_fd: int) -> None:
        """Make it writable: writes go to the pair of files (native/ob.h). The descriptors are duplicated."""
        check(lib.ob_image_open_upper(self._handle, data_fd, index_fd))
        self.writable = True

    def write(self, offset: int, content: bytes | bytearray | memoryview) -> None:
        """Write at any offset; durable after flush()."""
        check(lib.ob_image_write(self._handle, offset, ffi.from_buffer(content), len(content)))

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        check(lib.ob_image_zero(self._handle, offset, length))

    def flush(self) -> None:
        """What was written so far outlasts a power cut once this returns."""
        check(lib.ob_image_flush(self._handle))

    def runs(self, offset: int, length: int) -> list[Run]:
        """The map of the range from its start: RUNS_AT_ONCE runs at most, no gaps."""
        out = ffi.new("ob_run[]", self.RUNS_AT_ONCE)
        count = check(lib.ob_image_runs(self._handle, offset, length, out, self.RUNS_AT_ONCE))
        return [Run(out[i].offset, out[i].length, RunKind(out[i].kind), out[i].layer) for i in range(count)]

    def serve_nbd(self, fd: int, *, id: int, structured: bool, allocation: bool) -> NbdConnection:
        """Answer NBD requests on a negotiated socket until it closes."""
        config = ffi.new("ob_nbd_config *", {"id": id, "structured": structured, "allocation": allocation})
        out = ffi.new("ob_nbd **")
        check(lib.ob_nbd_start(self._handle, fd, config, out))
        return NbdConnection(out[0])

    def serve_fuse(self, fuse_fd: int, memfd: int, *, id: int, threads: int, slots: int) -> FuseSession:
        """Answer FUSE requests on a mounted /dev/fuse descriptor until it is unmounted."""
        config = ffi.new("ob_fuse_config *", {"id": id, "threads": threads, "slots": slots})
        out = ffi.new("ob_fuse **")
        check(lib.ob_fuse_start(self._handle, fuse_fd, memfd, config, out))
        return FuseSession(out[0])
