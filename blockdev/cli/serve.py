# SPDX-License-Identifier: Apache-2.0
"""ociblk serve: an image as an NBD export, in the foreground.

This process makes the listening socket and hands it to the owner, which does the serving;
the export ends with this process. SIGTERM and SIGINT drain it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from blockdev import client, control
from blockdev.cli import add_image_options, add_upper_options, text
from blockdev.cli.ask import image_request, locate_upper
from blockdev.config import parse_path
from blockdev.errors import AccessDenied, DeviceError, UsageError, from_os
from blockdev.root import Root, lock_within
from blockdev.transport.nbd import tcp_uri, unix_uri

_LOOPBACK = "127.0.0.1"
_BACKLOG = 128
_DRAIN_LIMIT = 10.0  # seconds; the owner gives requests in hand 5
_PROBE_LIMIT = 5.0  # seconds for a server at our path to accept
_TURN_LIMIT = 30.0  # seconds for others who make sockets in the same directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_upper_options(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", metavar="PATH", type=parse_path, help="listen on a Unix socket")
    where.add_argument("--port", metavar="N", type=int, help="listen on a TCP port; 0 picks a free one")
    parser.add_argument("--bind", metavar="ADDR", help=f"with --port: address to listen on (default {_LOOPBACK})")
    parser.add_argument("--export", metavar="NAME", default="", help="name of the export, beside the empty one")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal, or until the owner ends."""
    if args.bind is not None and args.socket:
        raise UsageError("serving failed: --bind: needs --port")
    signals = _Signals()
    with locate_upper(args) as origin, _listening(args) as (listener, uri):
        body, fds = image_request(args, origin)
        with client.connect(Root(args.root), text.print_notice) as owner:
            body |= {"export": args.export, "where": uri}
            owner.call("serve", body, [*fds, listener.fileno()])
            signals.arm()
            listener.close()  # the owner has it
            if args.json:
                text.print_json({"uri": uri})
            else:
                print(uri, flush=True)
            if signals.wait(owner):
                owner.call("end", timeout=_DRAIN_LIMIT)  # of silence: flushing takes what it takes, and says so
            else:
                owner.answer("serve")  # raises: says why it ended, or that it is gone


class _Signals:
    """SIGTERM, SIGINT and SIGHUP: until arm() they end this process, then the first one is waited for."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._armed = False
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, _frame: object) -> None:
        if not self._armed:  # still starting, or asked a second time: no reason to be patient
            sys.exit(128 + number)
        self._armed = False

    def arm(self) -> None:
        """From now on a signal is no reason to leave at once."""
        self._armed = True

    def wait(self, owner: client.Connection) -> bool:
        """True once a signal has come, False once the owner has something to say."""
        ready, _, _ = select.select([self._read.fileno(), owner.fileno()], [], [])
        return self._read.fileno() in ready


@contextlib.contextmanager
def _listening(args: argparse.Namespace) -> Iterator[tuple[socket.socket, str]]:
    """The listening socket and the URI of the export behind it. A socket file is removed in the end."""
    if args.socket:
        path = args.socket.absolute()
        with _listening_at(path) as listener:
            yield listener, unix_uri(str(path), args.export)
    else:
        with _listening_on(_LOOPBACK if args.bind is None else args.bind, args.port) as listener:
            host, port = listener.getsockname()[:2]
            yield listener, tcp_uri(host, port, args.export)


def _listening_on(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 0xFFFF:
        raise UsageError(f"listening failed: {port}: not a port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except socket.gaierror as error:
        raise UsageError(f"listening failed: {host or repr(host)}: {error.strerror}") from None
    except UnicodeError:
        raise UsageError(f"listening failed: {host}: not a host") from None
    except OSError as error:
        kind = {errno.EACCES: AccessDenied, errno.EADDRNOTAVAIL: UsageError}.get(error.errno or 0, DeviceError)
        raise kind(f"listening failed: {host} port {port}: {os.strerror(error.errno or 0)}") from None


@contextlib.contextmanager
def _listening_at(path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    try:
        with _alone_in(path.parent), control.address_of(path) as address:
            _remove_stale(path)
            listener.bind(address)
            listener.listen(_BACKLOG)
            ours = path.lstat()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise DeviceError(f"listening failed: {path}: {error.strerror}") from None
        raise from_os("listening failed", error, str(path)) from None
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(ours, path.lstat()):  # else somebody has put another one there
                path.unlink()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of those who make a socket there: what one finds stale may be another's new one by the time it is removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_within(fd, _TURN_LIMIT):
            raise DeviceError(f"listening failed: {folder}: another process keeps it locked")
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    """Make room where a socket was left behind; refuse where one is in use, or where it is no socket."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise DeviceError(f"listening failed: {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe, control.address_of(path) as address:
        probe.settimeout(_PROBE_LIMIT)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):
            pass
        raise DeviceError(f"listening failed: {path}: a server listens there")
