# SPDX-License-Identifier: Apache-2.0
"""Connections on which nobody waits longer than the request's Limit allows.

A timeout of `requests` bounds one recv(): a server that sends a line now and then keeps its client for ever. Here
each recv() and each piece that is sent looks at the Limit of its thread, so the deadline and the
slowest rate hold for all that comes: the head, interim answers, the body, chunks and trailers, a proxy's answer too.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import urllib3
import urllib3.connection
from requests.adapters import HTTPAdapter

CONNECTIONS_MAX = 32  # kept open per host: every fetch thread's, and a few commands'
SLOWEST_RATE = 1 << 10  # bytes a second; an answer that is slower over a stall time counts as stalled
HEAD_SIZE_MAX = 64 << 10  # of an answer, with the interim ones before it; registries send 1 KiB
SENT_SIZE = 64 << 10  # bytes that a server has the stall time to take

_EARLY_HINTS, _FINAL = 102, 200  # the statuses between are followed by another; http.client knows 100 only
_thread = threading.local()


class TooSlow(TimeoutError):
    """Next to nothing came within a stall time."""


class HeadTooLong(OSError):
    """More than HEAD_SIZE_MAX before the body."""


@dataclass
class Limit:
    """How long one request may wait. Within its `with` block it holds for what the thread sends and receives.

    `deadline` is monotonic; `stall` is the longest silence, and the seconds of waiting within which
    SLOWEST_RATE has to be kept up.
    """

    deadline: float
    stall: float
    fresh: bool = False  # a connection that has been used before will not do
    reused: bool = False  # the connection has been used before
    received: int = 0  # bytes
    in_head: bool = True
    _waited: float = 0.0  # seconds of the stall time that runs ...
    _came: int = 0  # ... and bytes in it

    def __enter__(self) -> Self:
        _thread.limit = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _thread.limit

    def patience(self) -> float:
        """Seconds to wait for what comes next. TimeoutError if there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TooSlow
        return min(left, self.stall)

    def came(self, count: int, waited: float) -> None:
        """So many bytes have come, after so many seconds."""
        self.received += count
        if self.in_head and self.received > HEAD_SIZE_MAX:
            raise HeadTooLong
        self._came += count
        self._waited += waited
        if self._waited >= self.stall:
            if self._came < SLOWEST_RATE * self.stall:
                raise TooSlow
            self._waited, self._came = 0.0, 0


class _Socket(socket.socket):
    def recv_into(self, *args: Any) -> int:
        limit, begin = self._await()
        count = super().recv_into(*args)
        limit.came(count, time.monotonic() - begin)
        return count

    def recv(self, *args: Any) -> bytes:
        """What TLS within a proxy's TLS calls."""
        limit, begin = self._await()
        content = super().recv(*args)
        limit.came(len(content), time.monotonic() - begin)
        return content

    def _await(self) -> tuple[Limit, float]:
        limit: Limit = _thread.limit
        self.settimeout(limit.patience())
        return limit, time.monotonic()

    def sendall(self, content: Any, flags: int = 0) -> None:
        limit: Limit = _thread.limit
        rest = memoryview(content)
        while rest:
            self.settimeout(limit.patience())
            super().sendall(rest[:SENT_SIZE], flags)
            rest = rest[SENT_SIZE:]


class _TlsSocket(_Socket, ssl.SSLSocket):
    pass


class _Response(http.client.HTTPResponse):
    def begin(self) -> None:
        super().begin()
        while _EARLY_HINTS <= self.status < _FINAL:
            self.headers = None  # type: ignore[assignment]  # so that it begins once more
            super().begin()


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        made = super()._new_conn()
        timeout = made.gettimeout()
        ours = _Socket(made.family, made.type, made.proto, made.detach())
        ours.settimeout(timeout)
        return ours


class _TlsConnection(_Connection, urllib3.connection.HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)
        limit: Limit = _thread.limit
        if limit.fresh:
            connection.close()
        limit.reused = not connection.is_closed
        return connection


class _TlsPool(_Pool, urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Adapter(HTTPAdapter):
    """Sends what `requests` prepares, over such connections. Trusts what `trust` does, besides the
    certificates that requests brings."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        self._trust = trust
        self._trust.sslsocket_class = _TlsSocket
        super().__init__(pool_connections=CONNECTIONS_MAX, pool_maxsize=CONNECTIONS_MAX, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._trust, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def close(self) -> None:
        """Here and now: urllib3 leaves it to the garbage collector, which an idle process may not need for hours."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 - it cannot be iterated itself
                pool = manager.pools.get(key)
                if pool:
                    pool.close()
        super().close()

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._trust, **kwargs)
        if not proxy.startswith("socks"):  # whose connections go their own way
            manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
        return manager
