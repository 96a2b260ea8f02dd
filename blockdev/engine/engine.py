# SPDX-License-Identifier: Apache-2.0
"""Threads, the miss queue and events: what blobs and images live in."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from blockdev.config import Policy
from blockdev.engine.blob import POLICIES, Blob
from blockdev.engine.border import Handle, check, ffi, lib
from blockdev.engine.fetch import Fetch, Priority
from blockdev.engine.image import Image, LayerTable


class EventKind(IntEnum):
    """What Event.kind can be (native/ob.h says when)."""

    BLOB_COMPLETE = lib.OB_EVENT_BLOB_COMPLETE
    CACHE_WRITE = lib.OB_EVENT_CACHE_WRITE
    BLOB_FAILING = lib.OB_EVENT_BLOB_FAILING
    BLOB_DOWN = lib.OB_EVENT_BLOB_DOWN
    NBD_CLOSED = lib.OB_EVENT_NBD_CLOSED
    FUSE_CLOSED = lib.OB_EVENT_FUSE_CLOSED
    BLOB_DAMAGED = lib.OB_EVENT_BLOB_DAMAGED


@dataclass(frozen=True)
class Event:
    """Something the engine tells its user; id is the blob's, connection's or session's."""

    kind: EventKind
    status: int
    id: int


class Engine(Handle):
    """Threads, the miss queue and events: what blobs and images live in."""

    def __init__(self, *, work_threads: int = 2, readahead_extents: int = 512, fetch_bytes: int = 64 << 20) -> None:
        fields = {"work_threads": work_threads, "readahead_extents": readahead_extents, "fetch_bytes": fetch_bytes}
        out = ffi.new("ob_engine **")
        check(lib.ob_engine_open(ffi.new("ob_engine_config *", fields), out))
        super().__init__(out[0], lib.ob_engine_close)

    def stop(self) -> None:
        """Fail whoever waits with EngineStopped, and go on doing so."""
        lib.ob_engine_stop(self._handle)

    def open_local(self, fd: int, size: int) -> Blob:
        """A file that holds its whole blob; the descriptor is duplicated."""
        out = ffi.new("ob_blob **")
        check(lib.ob_blob_open_local(self._handle, fd, size, out))
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
            "policy": POLICIES[policy.mode],
            "policy_ns": int(policy.seconds * 1e9),
            "unit": unit,
        }
        out = ffi.new("ob_blob **")
        check(lib.ob_blob_open_cached(self._handle, data_fd, map_fd, ffi.new("ob_blob_config *", fields), out))
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
        check(lib.ob_image_open(self._handle, table, len(layers), size, out))
        return Image(out[0])

    def next_fetch(self, lowest: Priority, *, timeout: float) -> Fetch | None:
        """The most urgent fetch of priority lowest or better, or None after timeout seconds."""
        out = ffi.new("ob_fetch **")
        status = lib.ob_fetch_next(self._handle, lowest, int(timeout * 1e9), out)
        if status == -errno.ETIMEDOUT:
            return None
        check(status)
        return Fetch(out[0])

    @property
    def event_fd(self) -> int:
        """A descriptor that polls readable while events wait."""
        return int(lib.ob_event_fd(self._handle))

    def next_event(self) -> Event | None:
        out = ffi.new("ob_event *")
        if not check(lib.ob_event_next(self._handle, out)):
            return None
        return Event(EventKind(out.kind), out.status, out.id)
