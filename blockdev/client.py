# SPDX-License-Identifier: Apache-2.0
"""A command's side of the control socket: find the owner, start one, ask it.

connect() returns a Connection to a live owner of the root; if there is none and one is
wanted, it is started as this user, in a session of its own, with `/` as its directory.
Commands that start together agree on one through the root's starting() lock. An owner
that dies in the middle of a call is a DeviceError, never a wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from blockdev import control
from blockdev.control import Body, Channel
from blockdev.errors import DeviceError, EngineError
from blockdev.root import Root

log = logging.getLogger(__name__)

HELLO_LIMIT = 10.0  # seconds for an owner to answer at all: it is alive but stopped, or drowning
START_LIMIT = 30.0  # seconds for a new owner: waits up to 10 for an old one to leave, then imports on a busy machine

_POLL = 0.02  # seconds between looks for an owner that begins or leaves

Progress = Callable[[Body], None]
Notice = Callable[[str], None]  # one line that the owner has for the command's user


class OwnerGone(DeviceError):
    """The owner hung up before it answered."""


class OwnerSilent(DeviceError):
    """The owner is there and does not answer."""


class Connection:
    """A conversation with the owner. For one thread."""

    def __init__(self, channel: Channel, root: Root, notice: Notice) -> None:
        self._channel = channel
        self._root = root
        self._notice = notice

    def call(
        self,
        op: str,
        body: Mapping[str, Any] | None = None,
        descriptors: Sequence[int] = (),
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Body:
        """The owner's answer to one request, or the error it had. timeout: seconds of silence allowed."""
        self.send(op, body, descriptors)
        return self.answer(op, progress=progress, timeout=timeout)

    def send(self, op: str, body: Mapping[str, Any] | None = None, descriptors: Sequence[int] = ()) -> None:
        """Ask without waiting for the answer."""
        try:
            self._channel.send({"op": op, **(body or {})}, descriptors)
        except ConnectionError:
            self.answer(op)  # it may have said why
            raise self._gone(op) from None

    def answer(self, op: str, *, progress: Progress | None = None, timeout: float | None = None) -> Body:
        """Wait for the answer to what was sent last."""
        while True:
            try:
                message = self._channel.receive(timeout)
            except TimeoutError:
                holder = self._root.holder() or "it"
                raise OwnerSilent(f"asking the owner failed: {self._root.path}: {holder} does not answer") from None
            if message is None:
                raise self._gone(op)
            message.close()
            control.raise_error(message.body)
            if "notice" in message.body:
                self._notice(message.body["notice"])
            elif "progress" not in message.body:
                return message.body
            elif progress:
                progress(message.body["progress"])

    def open_process(self) -> int:
        """A pidfd of the owner; -1 if it cannot be seen from here (another PID namespace) or has ended."""
        return _open_process(self._channel)

    def fileno(self) -> int:
        """Readable once the owner has something to say, or has gone."""
        return self._channel.fileno()

    def close(self) -> None:
        self._channel.close()

    def _gone(self, op: str) -> OwnerGone:
        return OwnerGone(f"asking the owner failed: {self._root.path}: it ended during {op} (see {self._root.log})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(root: Root, notice: Notice = log.warning) -> Connection:
    """A connection to the root's owner, which is started if there is none."""
    connection = connect_to_live(root, notice=notice)
    if connection:
        return connection
    root.prepare()
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        with root.starting(deadline - time.monotonic()):
            connection = connect_to_live(root, notice=notice)
            if not connection:
                _start_owner(root, deadline)
                connection = connect_to_live(root, notice=notice)
        if connection:  # else it has left already: told to stop by somebody, most likely
            return connection
    raise DeviceError(f"starting the owner failed: {root.path}: it does not stay")


def connect_to_live(
    root: Root, timeout: float = HELLO_LIMIT, *, notice: Notice = log.warning
) -> Connection | None:
    """A connection to the root's owner, or None if there is none. OwnerSilent after `timeout` seconds;
    DeviceError if it lives and does not listen, for longer than it takes to begin or to leave."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = _connect_once(root, timeout, notice)
        except NotADirectoryError:
            return None
        if connection or not root.owned():
            return connection
        if time.monotonic() > deadline:
            holder = root.holder() or "another process"
            raise DeviceError(f"reaching the owner failed: {root.path}: {holder} owns it and does not listen")
        time.sleep(_POLL)


def open_process(root: Root, timeout: float = HELLO_LIMIT) -> int:
    """A pidfd of the root's owner, which need not answer; -1 if nobody listens any more. DeviceError: it cannot be
    seen from here."""
    try:
        channel = control.connect(root.socket, timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        return -1
    with contextlib.closing(channel):
        if not channel.peer_pid():
            holder = root.holder() or "the owner"
            raise DeviceError(f"reaching the owner failed: {root.path}: {holder} is in another PID namespace")
        return _open_process(channel)


def _open_process(channel: Channel) -> int:
    pid = channel.peer_pid()
    try:
        process = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        return -1
    if process >= 0 and channel.gone():  # then it may be another's number by now
        os.close(process)
        return -1
    return process


def _connect_once(root: Root, timeout: float, notice: Notice) -> Connection | None:
    try:
        channel = control.connect(root.socket, timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    connection = Connection(channel, root, notice)
    try:
        connection.call("hello", timeout=timeout)
    except OwnerGone:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _start_owner(root: Root, deadline: float) -> None:
    """Run the owner's process and wait until it listens. Raises the error it had."""
    read, write = os.pipe()
    command = [sys.executable, "-P", "-m", "blockdev", "daemon", "--on-demand", str(write), "--root", str(root.path)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            pass_fds=[write],
        )
    except OSError as error:
        os.close(read)
        raise EngineError(f"starting the owner failed: {sys.executable}: {error.strerror}") from None
    finally:
        os.close(write)
    try:
        answer = _read_to_end(read, deadline)
    finally:
        os.close(read)
    if answer is None:
        process.kill()
        process.wait()
        raise DeviceError(f"starting the owner failed: {root.path}: not ready within {START_LIMIT:g} s")
    if not answer:
        raise EngineError(f"starting the owner failed: {root.path}: it ended with {process.wait()} (see {root.log})")
    control.raise_error(json.loads(answer))
    process.returncode = 0  # it outlives us by design; subprocess need not warn


def _read_to_end(fd: int, deadline: float) -> bytes | None:
    """All that is written before the other end closes; None at the deadline."""
    answer = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        piece = os.read(fd, 65536)
        if not piece:
            return answer
        answer += piece
    return None
