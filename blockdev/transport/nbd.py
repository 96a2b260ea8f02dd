# SPDX-License-Identifier: Apache-2.0
"""An image served over NBD: clients are accepted and negotiated with here, then C has them.

One thread does all of that with a selector, so a client that is slow or says nothing
delays no other. From Go on the connection belongs to native/nbd.c.

The owner of the engine takes its events; it must pass the id of each NBD_CLOSED to
connection_closed(), which gives back what an ended connection held.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from blockdev.descriptors import KEPT_FROM_CLIENTS, scarce
from blockdev.errors import BlockdevError, EngineError, UsageError
from formats.errors import FormatError
from formats.nbdwire import Closed, Export, Go, Negotiation

if TYPE_CHECKING:
    from blockdev.engine import Image, NbdConnection

NEGOTIATION_SECONDS = 10.0  # for the whole of it: a client that says nothing is gone then
NEGOTIATIONS_MAX = 64  # at one time; further clients wait in the listener's backlog
CONNECTIONS_MAX = 256  # of one server: each is a C thread and three descriptors
ACCEPT_PAUSE_SECONDS = 0.5  # after accept() failed for want of descriptors or memory

log = logging.getLogger(__name__)

# The engine's events name a connection by number alone, so all servers share one sequence.
_connection_ids = itertools.count(1)


def unix_uri(path: str, name: str = "") -> str:
    """The NBD URI of an export behind a Unix socket. Clients take a relative path as their own."""
    return f"nbd+unix:///{_quoted(name)}?socket={quote(os.fsencode(path))}"


def tcp_uri(host: str, port: int, name: str = "") -> str:
    """The NBD URI of an export behind a TCP port; host is a name or an address."""
    host = f"[{quote(host, safe=':')}]" if ":" in host else quote(host)
    return f"nbd://{host}:{port}/{_quoted(name)}"


def _quoted(name: str) -> str:
    return quote(os.fsencode(name), safe="")  # a name that is no text is the server's to refuse


@dataclass(eq=False)
class _Guest:
    """A client that is still negotiating."""

    socket: socket.socket
    negotiation: Negotiation
    deadline: float
    outgoing: bytes
    outcome: Go | Closed | None = None


@dataclass(frozen=True)
class _Connection:
    """A client that C serves. Our own descriptor of its socket is kept to end many at one moment."""

    socket: socket.socket
    transmission: NbdConnection


class NbdServer:
    """Serves an image as export `name`, which is the default one too, from start() to stop().

    The listening socket becomes the server's.
    """

    def __init__(
        self, listener: socket.socket, image: Image, *, name: str = "", negotiation_seconds: float = NEGOTIATION_SECONDS
    ) -> None:
        self._listener = listener
        self._image = image
        try:
            self._exports = {name: Export(name, image.size, writable=image.writable)}
        except FormatError as error:
            raise UsageError(f"serve over NBD: export {name[:64]!r}: {error}") from None
        self._name = name
        self._negotiation_seconds = negotiation_seconds
        self._guests: set[_Guest] = set()  # of the server's thread, as is all that follows
        self._selector = selectors.DefaultSelector()
        self._accepting = False
        self._accept_after = 0.0
        self._lock = threading.Lock()  # of what follows
        self._connections: dict[int, _Connection] = {}
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="nbd-accept")

    def start(self) -> None:
        """Begin to accept; connection_closed() has to reach it by now. EngineError: there is no thread."""
        try:
            self._thread.start()
        except RuntimeError:  # Python's word for EAGAIN
            self._stopping = True
            self._selector.close()
            os.close(self._wake)
            raise EngineError(f"serve over NBD: export {self._name!r}: no thread can be started") from None

    @property
    def connections(self) -> int:
        """How many clients are past their negotiation."""
        with self._lock:
            return len(self._connections)

    def connection_closed(self, id: int) -> bool:
        """An NBD_CLOSED event: give the connection back. False if it is not one of this server's."""
        with self._lock:
            connection = self._connections.pop(id, None)
        if connection is None:
            return False
        connection.transmission.close()
        connection.socket.close()
        return True

    def stop(self, deadline: float) -> None:
        """Accept nobody more, answer the requests in hand until deadline (time.monotonic()), hang up.

        The image may be closed afterwards.
        """
        with self._lock:
            stopped, self._stopping = self._stopping, True
        if stopped:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        with self._lock:
            connections = list(self._connections.values())
            self._connections.clear()
        for connection in connections:  # all at once: they answer what they have side by side
            with contextlib.suppress(OSError):  # the client was faster
                connection.socket.shutdown(socket.SHUT_RD)
        for connection in connections:
            connection.transmission.close(timeout=max(0.0, deadline - time.monotonic()))
            connection.socket.close()

    # ---- the server's thread ----

    def _run(self) -> None:
        with self._selector:
            while not self._stopping:
                self._watch_listener()
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Guest):
                        self._advance(key.data)
                now = time.monotonic()
                for guest in [guest for guest in self._guests if guest.deadline <= now]:
                    self._dismiss(guest, f"no end of negotiation within {self._negotiation_seconds:g} s")
            for guest in list(self._guests):
                self._dismiss(guest, "the server stops")
            self._listener.close()

    def _patience(self) -> float | None:
        """Seconds until something is due though nothing arrives."""
        due = [guest.deadline for guest in self._guests]
        if not self._accepting and len(self._guests) < NEGOTIATIONS_MAX:
            due.append(self._accept_after)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _watch_listener(self) -> None:
        wanted = len(self._guests) < NEGOTIATIONS_MAX and time.monotonic() >= self._accept_after
        if wanted and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._accepting and not wanted:
            self._selector.unregister(self._listener)
        self._accepting = wanted

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone again
        except OSError as error:
            log.warning("accept an NBD client: export %r: %s", self._name, error)
            self._accept_after = time.monotonic() + ACCEPT_PAUSE_SECONDS
            return
        if self.connections >= CONNECTIONS_MAX:
            log.warning("accept an NBD client: export %r: it has %d connections already", self._name, CONNECTIONS_MAX)
            accepted.close()
            return
        if scarce(accepted.fileno(), KEPT_FROM_CLIENTS):
            log.warning("accept an NBD client: export %r: the descriptors left are kept for the owner", self._name)
            accepted.close()
            return
        accepted.setblocking(False)
        negotiation = Negotiation(self._exports, self._name)
        deadline = time.monotonic() + self._negotiation_seconds
        guest = _Guest(accepted, negotiation, deadline, negotiation.to_send())
        self._guests.add(guest)
        self._selector.register(accepted, selectors.EVENT_WRITE, guest)

    def _advance(self, guest: _Guest) -> None:
        """The guest's socket is ready: to send what is left to send, else to receive."""
        try:
            if not guest.outgoing:
                content = guest.socket.recv(guest.negotiation.wanted)
                guest.outcome = guest.negotiation.receive(content) if content else Closed("the client hung up")
                guest.outgoing = guest.negotiation.to_send()
            guest.outgoing = guest.outgoing[guest.socket.send(guest.outgoing) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._dismiss(guest, str(error))
            return
        if guest.outgoing:
            self._selector.modify(guest.socket, selectors.EVENT_WRITE, guest)
        elif isinstance(guest.outcome, Go):
            self._hand_over(guest, guest.outcome)
        elif guest.outcome:
            self._dismiss(guest, guest.outcome.reason)
        else:
            self._selector.modify(guest.socket, selectors.EVENT_READ, guest)

    def _dismiss(self, guest: _Guest, reason: str) -> None:
        log.info("negotiate with an NBD client: export %r: %s", self._name, reason)
        self._forget(guest)
        guest.socket.close()

    def _forget(self, guest: _Guest) -> None:
        self._guests.remove(guest)
        self._selector.unregister(guest.socket)

    def _hand_over(self, guest: _Guest, go: Go) -> None:
        """To C, which serves the socket from its next byte on."""
        self._forget(guest)
        id = next(_connection_ids)
        with self._lock:  # a connection that ends at once is in the table before connection_closed() looks
            try:
                transmission = self._image.serve_nbd(
                    guest.socket.fileno(), id=id, structured=go.structured, allocation=go.allocation
                )
            except BlockdevError as error:
                log.warning("serve an NBD client: export %r: %s", self._name, error)
                guest.socket.close()
                return
            self._connections[id] = _Connection(guest.socket, transmission)
