# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that reads requests and answers with bytes, right HTTP or not, at any pace."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, Self

Talk = Callable[["Visit"], object]


class Visit:
    """One connection, from its first request on."""

    def __init__(self, connection: socket.socket, stream: BinaryIO, closing: threading.Event) -> None:
        self.connection = connection
        self._stream = stream
        self._closing = closing

    def requests(self) -> Iterator[bytes]:
        """The head of each request as it comes, without its line ends. A body is for take()."""
        while head := b"".join(iter(lambda: self._stream.readline().strip(b"\r\n"), b"")):
            yield head

    def take(self, count: int) -> bytes:
        return self._stream.read(count)

    def say(self, text: bytes) -> None:
        self.connection.sendall(text)

    def pause(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def drip(self, piece: bytes, pause: float = 0.02) -> None:
        """Again and again, until the client leaves or the server is closed."""
        while not self._closing.wait(pause):
            self.say(piece)


class RawServer:
    """Serves from construction to close(). `talk` runs once for each connection, which is closed after it.

    What the clients send ahead of take() is little: they are kept waiting.
    """

    def __init__(self, talk: Talk, tls: ssl.SSLContext | None = None) -> None:
        self._talk = talk
        self._tls = tls
        self._closing = threading.Event()
        self._visitors: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def visits(self) -> int:
        return len(self._visitors)

    def close(self) -> None:
        self._closing.set()
        for visitor in (self._listener, *self._visitors):
            with contextlib.suppress(OSError):  # the client was first
                socket.socket.shutdown(visitor, socket.SHUT_RDWR)  # under the TLS
        for thread in self._threads:
            thread.join(20)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                visitor, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(visitor,), daemon=True))
                self._threads[-1].start()

    def _serve(self, visitor: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has left
            connection = self._tls.wrap_socket(visitor, server_side=True) if self._tls else visitor
            self._visitors.append(connection)
            with connection, connection.makefile("rb") as stream:
                self._talk(Visit(connection, stream, self._closing))
