# SPDX-License-Identifier: Apache-2.0
"""The owner process of a root: from taking the lock to leaving it.

The main thread waits in one selector for callers, engine events and signals, and never
for anything else. Each caller gets a thread (session.py); what they share is in
owner.py. SIGTERM, SIGINT and SIGHUP drain, unless whoever started it ignores them: exports
answer what they have in hand, then everything is closed. What was written to a device is
flushed first, however long its disk takes; all else that has not ended within STOP_LIMIT
is ended by SIGALRM.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

from blockdev import control, syscalls
from blockdev.descriptors import KEPT_FROM_CALLERS, raise_limit, scarce
from blockdev.errors import AccessDenied, BlockdevError, EngineError, from_os
from blockdev.owner import Owner
from blockdev.root import Root
from blockdev.session import Session

log = logging.getLogger(__name__)

NAME = "ociblk-owner"
LINGER = 10.0  # seconds an owner started on demand stays after its last use: the next command starts warm
LEAVE_LIMIT = 10.0  # seconds to wait for an owner that is leaving
STOP_LIMIT = 9  # seconds (whole) for devices to end but for what was written to them
LEAVE_ALARM = 5  # seconds (whole) for all that follows
_DRAIN_LIMIT = 5.0  # seconds of STOP_LIMIT that requests in hand get
_JOIN_LIMIT = 1.0  # seconds for callers' threads to see that we leave
_CALLERS_MAX = 512  # each a thread; whoever only holds an export is not counted, more are refused
_KEPT_FOR_ENDING = 64  # of them, for what looks at and ends what is there
_ACCEPT_PAUSE = 0.5  # seconds; after accept() failed for want of descriptors or memory
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STACK = 512 << 10  # bytes; deepest is a TLS handshake below requests


class Daemon:
    """One owner's life. run() is the main flow."""

    def __init__(self, root: Root, linger: float | None) -> None:
        """linger: seconds to stay after the last use, None for ever."""
        self._root = root
        self._linger = linger
        self._selector = selectors.DefaultSelector()
        self._sessions: set[Session] = set()
        self._sessions_lock = threading.Lock()
        self._accept_after = 0.0  # of time.monotonic()
        self._accept_failed = False
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()

    def run(self, ready: Callable[[], None]) -> None:
        """Own the root until told to stop or no longer needed. Calls ready() once callers are heard.

        Raises, when all is done, the error that kept what was written to a device from its disk.
        """
        self._root.prepare()
        self._root.acquire(NAME, LEAVE_LIMIT if self._linger is not None else 1.0)
        self._root.check_version()
        threading.stack_size(_STACK)
        syscalls.return_large_blocks()
        _never_wait_for_writes()
        raise_limit()
        try:
            listener = control.listen(self._root.socket)
            ours = self._root.socket.lstat()
        except OSError as error:
            raise from_os("listening for commands failed", error, str(self._root.socket)) from None
        self._listen_to_signals()
        owner = Owner(self._root)
        log.info("owner started root=%s pid=%d", self._root.path, os.getpid())
        ready()
        self._serve(listener, owner)
        signal.alarm(STOP_LIMIT)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(ours, self._root.socket.lstat()):  # else the root was removed, and is another's now
                self._root.socket.unlink()
        listener.close()
        owner.drain(_DRAIN_LIMIT)
        signal.alarm(0)
        try:
            owner.finish_writing()
        finally:
            signal.alarm(LEAVE_ALARM)
            self._end_sessions()
            owner.close()
            self._root.release()
            log.info("owner left root=%s", self._root.path)

    # ---- for sessions, in their threads ----

    def stop(self) -> None:
        """Ask the main thread to drain and leave."""
        self._stopping = True
        self._wake()

    def crowded(self) -> bool:
        """Whether what room for callers is left is kept for those who look at and end what is there."""
        return self._room() < _KEPT_FOR_ENDING

    def ended(self, session: Session) -> None:
        """A conversation is over."""
        with self._sessions_lock:
            self._sessions.discard(session)
        self._wake()

    # ---- the main thread ----

    def _serve(self, listener: socket.socket, owner: Owner) -> None:
        listener.setblocking(False)
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        self._selector.register(owner.event_fd, selectors.EVENT_READ, owner.take_events)
        listening = False
        used = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if listening != (now >= self._accept_after):
                listening = not listening
                if listening:
                    self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener, owner))
                else:
                    self._selector.unregister(listener)
            if self._sessions or owner.busy():
                used = now
            leave = math.inf if self._linger is None else used + self._linger
            due = min(leave, owner.retry(now), math.inf if listening else self._accept_after)
            ready = self._selector.select(None if due == math.inf else max(0.0, due - now))
            if not ready and now >= leave:
                return
            for key, _ in ready:
                key.data()

    def _accept(self, listener: socket.socket, owner: Owner) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._accept_after = time.monotonic() + _ACCEPT_PAUSE
            if not self._accept_failed:
                log.warning("callers have to wait reason=%s", error.strerror)
            self._accept_failed = True
            return
        self._accept_failed = False
        channel = control.Channel(sock, control.REQUEST_MAX)
        try:
            control.check_peer(sock)
            if scarce(sock.fileno(), KEPT_FROM_CALLERS):
                raise EngineError(f"asking the owner failed: {self._root.path}: it has too many descriptors open")
            if self._room() <= 0:
                raise EngineError(f"asking the owner failed: {self._root.path}: it has {_CALLERS_MAX} callers already")
            self._begin(Session(channel, owner, self))
        except BlockdevError as error:
            log.warning("caller refused reason=%s", error)
            if not isinstance(error, AccessDenied):  # a stranger is told nothing
                with contextlib.suppress(OSError):
                    channel.send(control.error_body(error))
            channel.close()

    def _begin(self, session: Session) -> None:
        with self._sessions_lock:
            self._sessions.add(session)
        try:
            session.start()
        except RuntimeError:  # Python's word for EAGAIN
            with self._sessions_lock:
                self._sessions.discard(session)
            raise EngineError(f"asking the owner failed: {self._root.path}: it can start no thread") from None

    def _room(self) -> int:
        """For how many more callers."""
        with self._sessions_lock:
            return _CALLERS_MAX - sum(not session.holding for session in self._sessions)

    def _end_sessions(self) -> None:
        with self._sessions_lock:
            sessions = list(self._sessions)
        deadline = time.monotonic() + _JOIN_LIMIT
        for session in sessions:
            session.hang_up()
        for session in sessions:
            session.join(max(0.0, deadline - time.monotonic()))

    def _listen_to_signals(self) -> None:
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        alone = self._linger is not None  # in a session of its own: no terminal and no shell is its business
        for number in _SIGNALS:
            if alone or signal.getsignal(number) is not signal.SIG_IGN:  # else by nohup, or by a script's `&`
                signal.signal(number, lambda _number, _frame: None)
        if alone:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the main thread will wake anyway
            self._wake_write.send(b"\0")

    def _on_wake(self) -> None:
        received = self._wake_read.recv(4096)
        for number in _SIGNALS:
            if number in received:
                log.info("owner stopping signal=%s", number.name)
                self._stopping = True


def _never_wait_for_writes() -> None:
    """Before the first thread, which inherits it."""
    try:
        syscalls.set_io_flusher()
    except OSError as error:
        log.info("memory may be waited for by writing reason=%s", error.strerror)
