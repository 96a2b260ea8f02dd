# SPDX-License-Identifier: Apache-2.0
"""ociblk umount: take a mount of ours away.

Of a read-only one it needs no owner, and waits for none. What was written to a writable one
is on its disk before it is taken away; if it cannot get there, the mount stays. What the unmounting itself
writes is flushed after that, and its failure is an error too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from blockdev import client, mountpoint
from blockdev.cli import text
from blockdev.config import parse_path
from blockdev.errors import BlockdevError, DeviceError, EngineError
from blockdev.mountpoint import Mounted
from blockdev.root import Root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DIR", type=parse_path, help="where it is mounted, or mount --raw's file")
    parser.add_argument("--force", action="store_true", help="even if it is in use: its users get errors from now on")


def run(args: argparse.Namespace) -> None:
    try:
        unmount(args.target, Root(args.root), force=args.force)
    except mountpoint.NotMounted:
        if not args.target.exists():
            raise
        text.print_notice(f"{args.target}: not mounted")  # and that is what was asked for
    if args.json:
        text.print_json({"target": str(args.target.absolute())})


def unmount(target: Path, root: Root, *, force: bool) -> None:
    """Unmount. root: whose owner serves it, if that cannot be told from the mount."""
    found = mountpoint.find(target)
    if force:
        mountpoint.force_umount(target)
    elif found.writable:
        with _written(found, Root(found.root) if found.root else root):
            mountpoint.umount(target)
    else:
        mountpoint.umount(target)


@contextlib.contextmanager
def _written(found: Mounted, root: Root) -> Iterator[None]:
    """What is written before the block, and by the unmounting in it, is on its disk afterwards."""
    _sync(found, root)
    owner = client.connect_to_live(root, notice=text.print_notice)
    if owner is None:  # that of another root, given no --root: it has what was synced
        yield
        return
    with owner:
        id = _device_of(owner, found)
        if id is not None:
            owner.call("unmount", {"id": id}, timeout=client.HELLO_LIMIT)
        yield
        if id is not None:
            owner.call("unmounted", timeout=client.HELLO_LIMIT)


def _device_of(owner: client.Connection, found: Mounted) -> int | None:
    for device in owner.call("ps", timeout=client.HELLO_LIMIT)["devices"]:
        if device["connection"] == found.connection:
            return int(device["id"])
    return None


def _sync(found: Mounted, root: Root) -> None:
    """In a thread: an owner that is stopped would be waited for for ever."""
    point = found.point
    failure: list[OSError] = []

    def sync() -> None:
        try:
            mountpoint.sync(found)
        except OSError as error:
            failure.append(error)

    syncing = threading.Thread(target=sync, name="sync", daemon=True)
    syncing.start()
    syncing.join(mountpoint.UMOUNT_DEADLINE)
    while syncing.is_alive():
        try:
            owner = client.connect_to_live(root)
            if owner is None:
                raise DeviceError(f"no owner of {root.path} answers")
        except BlockdevError as error:
            raise EngineError(f"umount failed: {point}: syncing what was written: {error}") from None
        owner.close()
        text.print_notice(f"{point}: waiting for the disk that was written to")
        syncing.join(mountpoint.UMOUNT_DEADLINE)
    if failure:
        why = os.strerror(failure[0].errno or 0)
        raise EngineError(f"umount failed: {point}: syncing what was written: {why} (--force gives it up)")
