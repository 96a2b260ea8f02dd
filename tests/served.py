# SPDX-License-Identifier: Apache-2.0
"""An image served over NBD from this process, with somebody who takes the engine's events."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockdev.engine import Engine, EventKind, Image
from blockdev.transport.nbd import NEGOTIATION_SECONDS, NbdServer

STOP_WAIT = 20.0  # seconds for a server to answer what it has in hand, on a busy machine


def unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def tcp_listener() -> tuple[socket.socket, int]:
    """On a free port of the loopback, which is returned too."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


@contextmanager
def served(
    engine: Engine,
    image: Image,
    listener: socket.socket,
    *,
    name: str = "",
    negotiation_seconds: float = NEGOTIATION_SECONDS,
) -> Iterator[NbdServer]:
    """The image behind a listening socket. The only one to take this engine's events."""
    server = NbdServer(listener, image, name=name, negotiation_seconds=negotiation_seconds)
    server.start()
    wake = os.eventfd(0)
    events = threading.Thread(target=_pass_on, args=(engine, server, wake), name="events")
    events.start()
    try:
        yield server
    finally:
        server.stop(time.monotonic() + STOP_WAIT)
        os.eventfd_write(wake, 1)
        events.join()
        os.close(wake)


def _pass_on(engine: Engine, server: NbdServer, wake: int) -> None:
    while True:
        ready, _, _ = select.select([engine.event_fd, wake], [], [])
        while event := engine.next_event():
            if event.kind is EventKind.NBD_CLOSED:
                server.connection_closed(event.id)
        if wake in ready:
            return
