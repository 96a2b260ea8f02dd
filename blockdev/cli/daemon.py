# SPDX-License-Identifier: Apache-2.0
"""ociblk daemon: own the root in the foreground, or end the process that owns it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import time

from blockdev import client, control, journal, mountpoint
from blockdev.cli import text
from blockdev.cli.umount import unmount
from blockdev.errors import BlockdevError, DeviceError, EngineError, UsageError, from_os
from blockdev.root import Root

STOP_LIMIT = 10.0  # seconds until the owner has gone, not counting what it says it waits for a disk
_ANSWER_LIMIT = 4.0  # seconds of silence after which a forced stop stops asking
_POLL = 0.02  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stop", action="store_true", help="end the owner of the root, if there is one")
    parser.add_argument("--force", action="store_true", help="with --stop: even if it has live mounts or exports")
    parser.add_argument("--on-demand", metavar="FD", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Be the owner until told to stop; with --stop, tell it."""
    root = Root(args.root)
    if args.force and not args.stop:
        raise UsageError("--force: daemon: needs --stop")
    if args.stop:
        _stop(root, force=args.force)
    else:
        _own(root, args.on_demand, debug=args.debug)


def _own(root: Root, ready_fd: int | None, *, debug: bool) -> None:
    os.umask(0o077)
    os.chdir("/")
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(os.fdopen(ready_fd, "w")) if ready_fd is not None else None

        def ready() -> None:
            if answer:
                answer.write(json.dumps({"ready": os.getpid()}))
                answer.close()
            else:
                _notify_manager()

        try:
            root.prepare()
            journal.write_log(root.log if answer else None, debug=debug)
            if answer:
                journal.catch_crashes(root.log)
            from blockdev.daemon import LINGER, Daemon  # the engine: neither --stop nor --help need it

            Daemon(root, LINGER if answer else None).run(ready)
        except BlockdevError as error:
            if answer and not answer.closed:
                answer.write(json.dumps(control.error_body(error)))
            raise


def _notify_manager() -> None:
    """Say to the service manager, if there is one, that callers are heard (sd_notify(3))."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        raise from_os("telling the service manager failed", error, address) from None


def _stop(root: Root, *, force: bool) -> None:
    try:
        _ask_to_stop(root, _ANSWER_LIMIT if force else client.HELLO_LIMIT, force=force)
    except client.OwnerSilent:
        if not force:
            raise
        _end_silent(root)


def _ask_to_stop(root: Root, patience: float, *, force: bool) -> None:
    lost: list[BlockdevError] = []
    with contextlib.ExitStack() as stack:
        process = -1
        connection = client.connect_to_live(root, patience, notice=text.print_notice)
        if connection:
            stack.enter_context(connection)
            process = connection.open_process()
            if process >= 0:
                stack.callback(os.close, process)
            if force:
                lost += _unmount_all(connection, root)
            answer = connection.call("stop", {"force": force}, timeout=_ANSWER_LIMIT)
            stack.callback(control.raise_error, answer.get("lost", {}))
        _await_end(root, process)
    if lost:
        raise lost[0]


def _end_silent(root: Root) -> None:
    """End an owner that does not answer: woken, if somebody has stopped it, it ends in order; else it is killed.

    Not one that has begun to leave: it may be flushing.
    """
    if not _signal(root, signal.SIGCONT):
        _await_end(root, -1)
        return
    try:
        _ask_to_stop(root, client.HELLO_LIMIT, force=True)
    except client.OwnerSilent:
        holder = root.holder() or "it"
        if not _signal(root, signal.SIGKILL):
            raise
        _await_end(root, -1)
        raise EngineError(
            f"stopping the owner failed: {root.path}: {holder} did not answer and was killed: "
            "what it had not flushed is lost"
        ) from None


def _signal(root: Root, number: signal.Signals) -> bool:
    """Send it to the process that listens for the root; False if there is none any more."""
    process = client.open_process(root)
    if process < 0:
        return False
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
    os.close(process)
    return True


def _await_end(root: Root, process: int) -> None:
    """Until nobody owns the root, and the process (a pidfd, or -1) has ended: what it had open is free then."""
    deadline = time.monotonic() + STOP_LIMIT
    gone = select.poll()
    if process >= 0:
        gone.register(process, select.POLLIN)
    while root.owned() or (process >= 0 and not gone.poll(0)):
        if time.monotonic() > deadline:
            raise DeviceError(f"stopping the owner failed: {root.path}: {root.holder() or 'it'} is still there")
        time.sleep(_POLL)


def _unmount_all(connection: client.Connection, root: Root) -> list[BlockdevError]:
    """Take the owner's mounts away with it: without their server they would answer nothing but errors.

    What was written is synced before; the errors are of what could not be.
    """
    lost: list[BlockdevError] = []
    devices = connection.call("ps", timeout=_ANSWER_LIMIT)["devices"]
    connections = {device["connection"] for device in devices}
    for mounted in mountpoint.ours():
        if mounted.connection in connections:
            if mounted.writable:
                try:
                    unmount(mounted.point, root, force=False)
                    continue
                except EngineError as error:  # by the sync before, or by the flush after
                    lost.append(error)
                except BlockdevError:  # synced, and in use
                    pass
            with contextlib.suppress(BlockdevError):  # gone by now
                unmount(mounted.point, root, force=True)
    return lost
