# SPDX-License-Identifier: Apache-2.0
"""A real HTTP/1.1 server on loopback that answers what a test says, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

TRICKLE_PAUSE = 1.0  # seconds between two bytes
PIECE_WAIT = 20.0  # seconds an answer waits for its gate at most: longer than any client's patience here


@dataclass(frozen=True)
class Seen:
    """A request, as it arrived. Header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    port: int  # the client's: tells connections apart

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte of `Range: bytes=a-b`."""
        value = self.headers.get("range", "")
        if not value.startswith("bytes="):
            return None
        first, _, last = value.removeprefix("bytes=").partition("-")
        return int(first), int(last)


class Ending(Enum):
    """What comes after `cut` bytes of a body."""

    CLOSE = "the connection is closed in order"
    RESET = "the connection is reset"
    STALL = "nothing, until the client leaves"
    TRICKLE = "the rest, a byte a second, until the client leaves"


@dataclass
class Answer:
    """A reply. `body` is sent up to `cut` bytes, where `ending` says how it goes on; from byte
    `hold_at` on only once `gate` is set. `mute`: not even a head is sent."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    ending: Ending = Ending.CLOSE
    mute: bool = False
    gate: threading.Event | None = None
    hold_at: int = 0


class HttpServer:
    """Serves from construction to close(), which breaks all connections. `answer` runs in the server's threads."""

    def __init__(self, answer: Callable[[Seen], Answer], tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self.connections: list[socket.socket] = []
        self.closing = threading.Event()
        self._scheme = "https" if tls else "http"
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.host}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up, or distrust our certificate, are what some tests are about."""


def _handler(server: HttpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            server.connections.append(self.connection)

        def do_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)  # unread, it would be taken for the next request
            parts = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen = Seen(self.command, parts.path, parts.query, headers, body, self.client_address[1])
            server.seen.append(seen)
            self.reply(server.answer(seen))

        def reply(self, answer: Answer) -> None:
            if not answer.mute:
                self.send_answer(answer)
            if answer.mute or answer.cut is not None:
                self.close_connection = True
                self.end(answer)

        def send_answer(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            body = answer.body[: answer.cut]
            if answer.gate:
                self.wfile.write(body[: answer.hold_at])
                answer.gate.wait(PIECE_WAIT)
                body = body[answer.hold_at :]
            self.wfile.write(body)

        def end(self, answer: Answer) -> None:
            """As the answer's ending says; the connection is closed after it."""
            if answer.ending is Ending.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # at once: the server itself would say goodbye first
            rest = iter(answer.body[answer.cut :])
            while answer.ending in (Ending.STALL, Ending.TRICKLE) and not server.closing.wait(TRICKLE_PAUSE):
                if answer.ending is Ending.TRICKLE:
                    self.wfile.write(bytes([next(rest, 0)]))
                elif _has_left(self.connection):
                    return

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_any

        def log_message(self, format: str, *args: object) -> None:
            """`seen` is the log."""

    return Handler


def _has_left(connection: socket.socket) -> bool:
    """Whether the client has closed; what it sends instead is not read any more."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def ranged(seen: Seen, content: bytes) -> Answer:
    """What an obedient server answers to a GET or HEAD of the content."""
    if seen.range is None:
        return Answer(200, {"Accept-Ranges": "bytes"}, content)
    first, last = seen.range
    if first >= len(content):
        # As docker-registry 2.8 does: the length of the whole, and a few bytes.
        return Answer(416, {"Content-Length": str(len(content))}, b"invalid range\n", cut=14)
    piece = content[first : last + 1]
    return Answer(206, {"Content-Range": f"bytes {first}-{first + len(piece) - 1}/{len(content)}"}, piece)
