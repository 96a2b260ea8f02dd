# SPDX-License-Identifier: Apache-2.0
"""The control socket's wire: one JSON object a line, with descriptors beside it.

Every object carries "v": VERSION. An object that comes with descriptors says how many
in "fds"; they travel as SCM_RIGHTS on bytes of its own line, so the n-th descriptor
received belongs to the first object that still lacks one. Both ends check that the
other has their own uid, since credentials and opened files cross here.

A Channel may be written by one thread and read by one thread at a time. Failures to
understand the peer are DeviceErrors; a peer that has gone is None from receive().
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import math
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blockdev import errors
from blockdev.errors import AccessDenied, BlockdevError, DeviceError, EngineError, UsageError

VERSION = 1
LINE_MAX = 8 << 20  # a full cache's listing takes 1 MiB
REQUEST_MAX = 4 << 20  # an environment and certificates, and 100 KiB for 255 layers; as JSON values thirty times that
DESCRIPTORS_MAX = 1024  # of one object: 255 layers, an upper pair, and room
_BATCH = 250  # Linux refuses more than 253 (SCM_MAX_FD) on one message
_PIECE = 64 << 10  # bytes asked from the kernel at a time
_BACKLOG = 1024  # callers whom the owner has not got round to: a burst of commands
_PATH_MAX = 107  # sun_path without its NUL
_INT = array.array("i").itemsize
_ERROR_CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, BlockdevError)
}

Body = dict[str, Any]
_T = TypeVar("_T")


class Message:
    """One received object and its descriptors, which are closed with it unless taken."""

    def __init__(self, body: Body, descriptors: list[int]) -> None:
        self.body = body
        self.descriptors = descriptors

    def member(self, name: str, kind: type[_T]) -> _T:
        """member() of the object."""
        return member(self.body, name, kind)

    def descriptor(self, place: int) -> int:
        """One of the descriptors, still the message's. UsageError if so many did not come."""
        if not -len(self.descriptors) <= place < len(self.descriptors):
            raise UsageError("asking the owner failed: descriptors: one is missing")
        return self.descriptors[place]

    def take(self) -> list[int]:
        """The descriptors; closing them is now the caller's duty."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        """Close what was not taken."""
        for descriptor in self.take():
            os.close(descriptor)


class Channel:
    """One connected control socket. Owns it."""

    def __init__(self, sock: socket.socket, line_max: int = LINE_MAX) -> None:
        self._socket = sock
        self._line_max = line_max
        self._received = bytearray()
        self._searched = 0  # bytes of it that hold no end of line
        self._descriptors: list[int] = []
        self._hung_up = False

    def send(self, body: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one object; descriptors stay open here. OSError: the peer has gone; EngineError: too long, nothing is
        sent."""
        if len(descriptors) > DESCRIPTORS_MAX:
            raise DeviceError(f"sending to the owner failed: {len(descriptors)} descriptors: at most {DESCRIPTORS_MAX}")
        whole = {"v": VERSION, **body}
        if descriptors:
            whole["fds"] = len(descriptors)
        line = json.dumps(whole, separators=(",", ":")).encode() + b"\n"
        if len(line) > LINE_MAX:
            raise EngineError(f"sending a control message failed: {len(line)} bytes: at most {LINE_MAX}")
        for start in range(0, len(descriptors), _BATCH):
            batch = array.array("i", descriptors[start : start + _BATCH])
            self._socket.sendmsg([line[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])
            line = line[1:]
        self._socket.sendall(line)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next object, or None when the peer has gone. TimeoutError after `timeout` seconds of silence."""
        self._socket.settimeout(timeout)
        try:
            while (end := self._received.find(b"\n", self._searched)) < 0:
                self._searched = len(self._received)
                if self._searched > self._line_max:
                    raise DeviceError(f"reading a control message failed: {self._line_max} bytes: no end of line")
                if not self._receive_piece():
                    return None
        finally:
            self._socket.settimeout(None)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return self._message(line)

    def _receive_piece(self) -> bool:
        try:
            piece, ancillary, flags, _ = self._socket.recvmsg(
                _PIECE, socket.CMSG_SPACE(_BATCH * _INT), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return False
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors += array.array("i", value[: len(value) - len(value) % _INT])
        if flags & socket.MSG_CTRUNC:
            raise DeviceError("reading a control message failed: descriptors: too many are open here")
        if len(self._descriptors) > DESCRIPTORS_MAX:
            raise DeviceError(f"reading a control message failed: descriptors: more than {DESCRIPTORS_MAX}")
        self._received += piece
        return bool(piece)

    def _message(self, line: bytes) -> Message:
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DeviceError(f"reading a control message failed: {line[:40]!r}: {error}") from None
        if not isinstance(body, dict):
            raise DeviceError(f"reading a control message failed: {line[:40]!r}: not an object")
        if body.get("v") != VERSION:
            raise DeviceError(
                f"reading a control message failed: version {body.get('v')!r:.40}: this program speaks {VERSION}"
                " (after an upgrade, end the old owner with ociblk daemon --stop)"
            )
        count = body.pop("fds", 0)
        came = len(self._descriptors)
        if type(count) is not int or not 0 <= count <= came:
            raise DeviceError(f"reading a control message failed: {count!r:.40} descriptors: {came} came")
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return Message(body, descriptors)

    def fileno(self) -> int:
        """For select: readable once the peer has said something or gone."""
        return self._socket.fileno()

    def peer_pid(self) -> int:
        """Of the process at the other end; 0 if it has none here."""
        return _credentials(self._socket)[0]

    def gone(self) -> bool:
        """Whether the peer has hung up, and we have not."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return not self._hung_up and bool(poll.poll(0))

    def hang_up(self) -> None:
        """Make a receive() in another thread return None; sending still works."""
        self._hung_up = True
        with contextlib.suppress(OSError):  # the peer has hung up already
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket and every descriptor that no object has claimed."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())


def member(body: object, name: str, kind: type[_T]) -> _T:
    """What a peer's object has under a name. UsageError: nothing, or not of that kind, or it is no object."""
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not kind:
        raise UsageError(f"asking the owner failed: {name}: {kind.__name__} wanted, {type(value).__name__} given")
    return value


def error_body(error: BlockdevError) -> Body:
    """What tells the peer of an error, by the nearest class that it knows; raise_error() is its inverse."""
    known = next(kind.__name__ for kind in (*type(error).__mro__, EngineError) if kind.__name__ in _ERROR_CLASSES)
    return {"error": {"class": known, "message": str(error)}}


def raise_error(body: Body) -> None:
    """Raise the error a peer sent, as the class it had there. No error: do nothing."""
    error = body.get("error")
    if error is not None:
        raise _ERROR_CLASSES.get(error["class"], EngineError)(error["message"])


def connect(path: Path, timeout: float) -> Channel:
    """A channel to the owner that listens at `path`.

    FileNotFoundError or ConnectionRefusedError: nobody listens. AccessDenied: somebody
    else does. DeviceError: its queue of callers stayed full for `timeout` seconds.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # settimeout() would not wait at all: connect(2) of a full queue is EAGAIN to who does not block.
        _set_send_timeout(sock, timeout)
        with address_of(path) as address:
            sock.connect(address)
        check_peer(sock)
        _set_send_timeout(sock, 0)
    except PermissionError as error:
        sock.close()
        raise AccessDenied(f"reaching the owner failed: {path}: {error.strerror}") from None
    except BlockingIOError:
        sock.close()
        raise DeviceError(f"reaching the owner failed: {path}: it accepts no connection") from None
    except BaseException:
        sock.close()
        raise
    return Channel(sock)


def _set_send_timeout(sock: socket.socket, seconds: float) -> None:
    """Of connect() and send(), which block; 0 = none."""
    fraction, whole = math.modf(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(fraction * 1e6)))


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, replacing what was there. The caller holds the root's lock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        with address_of(path) as address:
            sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def check_peer(sock: socket.socket) -> None:
    """AccessDenied unless the other end runs with our own uid."""
    pid, uid = _credentials(sock)
    if uid != os.geteuid():
        raise AccessDenied(f"talking over the control socket failed: process {pid}: it belongs to uid {uid}")


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and uid at the other end."""
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What to bind or connect to for a socket at `path`, however long its directory's. OSError for too long a name."""
    if len(os.fsencode(path)) <= _PATH_MAX:
        yield os.fspath(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(address)) > _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        yield address
    finally:
        os.close(directory)
