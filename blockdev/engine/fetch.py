# SPDX-License-Identifier: Apache-2.0
"""Missing ranges on loan, and one way to fill them: a GET by C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from blockdev.engine.border import check, ffi, lib


class Priority(IntEnum):
    """How urgent a fetch is; lower comes first."""

    FOREGROUND = lib.OB_FOREGROUND
    PREFETCH = lib.OB_PREFETCH
    BULK = lib.OB_BULK


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
        check(lib.ob_fetch_advance(self._pointer, filled))

    def get(self, target: HttpTarget, *, timeout: float) -> Refusal | None:
        """Fill all that is not advanced yet with one GET; None: that is done. SourceError keeps what was advanced."""
        out = ffi.new("ob_http_answer *")
        status = lib.ob_fetch_http(self._pointer, target._struct, int(timeout * 1e9), self.held, out)
        self.filled = out.filled
        if check(status):
            return None
        return Refusal(out.status, ffi.string(out.retry_after).decode("latin-1"))

    def finish(self, status: int = 0, *, retry: float = 0.0) -> None:
        """Give it back. status: 0, or an errno; retry: seconds until another attempt, 0 for none."""
        self.buffer.release()
        pointer, self._pointer = self._pointer, None
        check(lib.ob_fetch_finish(pointer, -status, int(retry * 1e9)))
