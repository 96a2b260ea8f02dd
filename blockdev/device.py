# SPDX-License-Identifier: Apache-2.0
"""A device: an image attached through a transport.

    ATTACHING ──attach()──► LIVE ──drain()──► DRAINING ──► GONE
        └──────── failed, or drain() ─────────────────────►┘

A device owns its stack and its transport and closes both on its way to GONE, once. The
state moves under a lock, so a drain and an end that the kernel reports may meet: the
second waits for the first. attach() of a device that is past ATTACHING is refused.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from typing import Any, ClassVar, Protocol

from blockdev.engine import BlobStat
from blockdev.errors import BlockdevError, DeviceError, EngineError
from blockdev.image import OpenImage
from blockdev.layer import NamedBlob
from blockdev.stack import Stack
from blockdev.transport.nbd import NbdServer

log = logging.getLogger(__name__)


class State(Enum):
    """Where a device is in its life."""

    ATTACHING = "attaching"
    LIVE = "live"
    DRAINING = "draining"
    GONE = "gone"


class Transport(Protocol):
    """How the kernel or a client reaches an image. Control only: the I/O loop is C."""

    name: ClassVar[str]

    def attach(self, image: OpenImage) -> None:
        """Begin to answer requests. Once."""
        ...

    def detach(self, *, timeout: float) -> None:
        """Take no more requests, answer those in hand within `timeout` seconds, end. Idempotent,
        and right after an attach() that failed too."""
        ...


class NbdTransport:
    """A listening socket whose clients get the image as an NBD export."""

    name: ClassVar[str] = "nbd"

    def __init__(self, listener: socket.socket, export: str) -> None:
        """Takes the listener over."""
        self._listener = listener
        self._export = export
        self._server: NbdServer | None = None

    def attach(self, image: OpenImage) -> None:
        self._server = NbdServer(self._listener, image.image, name=self._export)
        self._server.start()

    def detach(self, *, timeout: float) -> None:
        if self._server:
            self._server.stop(time.monotonic() + timeout)
        self._listener.close()

    def connection_closed(self, id: int) -> bool:
        """A connection of the engine has ended; False if it was not one of these."""
        return self._server is not None and self._server.connection_closed(id)


class Device:
    """One image and the transport that serves it. where, how and error are for people to read."""

    def __init__(self, id: int, stack: Stack, on_gone: Callable[[Device], None]) -> None:
        """on_gone is called once, when the device has gone, by the thread that ended it."""
        self.id = id
        self.stack = stack
        self.size = stack.image.size
        self.transport: Transport | None = None
        self.where = ""  # the NBD URI, the directory: what its user calls it by
        self.how = ""  # such as "ext4, /dev/loop0"
        self.connection: int | None = None  # of a FUSE file: its number in the kernel of who mounted it
        self.error = ""  # the last thing that went wrong on its behalf
        self.since = time.time()
        self._state = State.ATTACHING
        self._lock = threading.Lock()
        self._on_gone = on_gone
        self._gone = threading.Event()
        self._stack_lock = threading.Lock()  # of closing the stack, and of flushing it before
        self._lost: BlockdevError | None = None  # why what was written last is not on its disk

    @property
    def state(self) -> State:
        return self._state

    def attach(self, transport: Transport) -> None:
        """The main flow: the image is open, the transport begins to serve it, the device is live.

        If it cannot, the device is GONE, the transport detached, and the error is the caller's. EngineError: it is
        LIVE or GONE already, and stays so.
        """
        with self._lock:
            free = self._state is State.ATTACHING and not self.transport
            if free:
                self.transport = transport
        if not free:
            transport.detach(timeout=0)
            raise EngineError(f"attaching failed: device {self.id}: it is {self._state.value}")
        try:
            transport.attach(self.stack.image)
        except BaseException:
            self.drain(0)
            raise
        with self._lock:
            if self._state is State.ATTACHING:
                self._state = State.LIVE
                return
        transport.detach(timeout=0)
        raise DeviceError(f"attaching failed: {self.stack.name}: it was ended meanwhile")

    def drain(self, timeout: float) -> None:
        """End the device: requests in hand are answered within `timeout` seconds, or fail; what was
        written is flushed, however long its disk takes.

        Returns once it has gone, whoever began to end it; if the flush failed, with that error.
        """
        with self._lock:
            first = self._state in (State.ATTACHING, State.LIVE)
            if first:
                self._state = State.DRAINING if self._state is State.LIVE else State.GONE
        if first:
            self._end(timeout)
        self._gone.wait()
        if self._lost:
            raise self._lost

    def _end(self, timeout: float) -> None:
        try:
            if self.transport:
                self.transport.detach(timeout=timeout)
            with self._stack_lock:
                self._close_stack()
        finally:
            self._state = State.GONE
            self._on_gone(self)
            self._gone.set()

    def _close_stack(self) -> None:
        try:
            self.stack.close()
        except BlockdevError as error:
            log.error("device lost writes id=%d where=%s reason=%s", self.id, self.where, error)
            self._lost = error

    def wait(self, timeout: float | None = None) -> bool:
        """Until it has gone; False if it has not within `timeout` seconds."""
        return self._gone.wait(timeout)

    def flush(self) -> None:
        """What was written so far is on its disk once this returns, whether the device lives or has gone."""
        with self._stack_lock:
            if self._lost:
                raise self._lost
            if not self.stack.closed:
                self.stack.image.flush()

    def describe(self) -> dict[str, Any]:
        """What `ps` shows of it, as JSON values; sizes in bytes."""
        stats = self.stack.stats()
        size = sum(stat.size for stat in stats)
        present = sum(stat.present_bytes for stat in stats)
        missing = sum(stat.present_bytes < stat.size for stat in stats)
        return {
            "id": self.id,
            "image": self.stack.name,
            "state": self._state.value,
            "front_end": self.transport.name if self.transport else "",
            "where": self.where,
            "how": self.how,
            "connection": self.connection,
            "since": self.since,
            "mode": "lazy" if missing else "local",
            "reason": f"{missing} of {len(stats)} blobs still in the registry" if missing else "every blob is here",
            "size": self.size,
            "writable": self.stack.writable,
            "checked": self.stack.checked,
            "blob_bytes": size,
            "local_bytes": present,
            "fetched_bytes": sum(stat.fetched_bytes for stat in stats),
            "requests": sum(stat.fetches for stat in stats),
            "remark": self.stack.remark,
            "error": self.error,
            "blobs": [_describe(named, stat) for named, stat in zip(self.stack.blobs, stats, strict=False)],
        }


def _describe(named: NamedBlob, stat: BlobStat) -> dict[str, Any]:
    mismatches = named.units.mismatches if named.units else 0
    return {"name": named.name, "checked": named.checked, "mismatches": mismatches, **asdict(stat)}
