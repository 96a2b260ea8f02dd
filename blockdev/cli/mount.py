# SPDX-License-Identifier: Apache-2.0
"""ociblk mount: the file system of an image on a directory, or the image itself as a file.

The kernel's part happens here, with the caller's rights and in its namespaces; the owner
gets the /dev/fuse descriptor and serves it. A mount that does not come about is undone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from blockdev import beneath, client, mountoptions, mountpoint
from blockdev.cli import add_image_options, add_upper_options, text
from blockdev.cli.ask import image_request, locate_upper
from blockdev.config import parse_path
from blockdev.errors import DeviceError, UsageError, from_os
from blockdev.fusefile import FuseFile
from blockdev.mountoptions import MountOptions
from blockdev.mountpoint import Mounted
from blockdev.root import Root

_PROGRAM = Path(__file__).resolve().parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_upper_options(parser)
    parser.add_argument("target", metavar="DIR", type=parse_path, help="where to; with --raw a file, made if missing")
    parser.add_argument("-o", dest="options", metavar="OPTS", default="", help="mount options, over nodev,nosuid[,ro]")
    parser.add_argument("--raw", action="store_true", help="show the disk as a file instead of mounting what is on it")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Mount; returns once it is usable."""
    if args.raw and args.options:
        raise UsageError("mounting failed: -o: with --raw nothing is mounted that has options")
    root = Root(args.root)
    target = args.target.absolute()
    options = mountoptions.parse_options(args.options, writable=args.rw)
    with locate_upper(args) as origin:
        body, fds = image_request(args, origin)
        with client.connect(root, text.print_notice) as owner:
            if args.rw:
                _check_independent(owner, root, target)
            opened = owner.call("mount", body, fds)
            with _raw(owner, args, root) if args.raw else _file_system(owner, args, options, root) as mounted:
                how = "" if args.raw else f"{mounted.kind}, {mounted.loop or 'from the file'}"
                owner.call("mounted", {"where": str(target), "how": how, "connection": mounted.connection})
    if args.json:
        text.print_json({"image": args.image, "target": str(target), "size": opened["size"], "how": how})


def _check_independent(owner: client.Connection, root: Root, target: Path) -> None:
    """The owner must not need what it serves: it would wait for itself as soon as memory is short."""
    place = Path(os.path.realpath(target))
    served = {device["connection"] for device in owner.call("ps")["devices"]} - {None}
    needed = {
        "its root": [root.path.resolve()],
        "the program": [Path(sys.executable).resolve(), _PROGRAM],
        "swap": [],
    }
    for what, paths in needed.items():
        if any(place == path or place in path.parents for path in paths):
            raise DeviceError(f"mount failed: {target}: {what} would lie on what the owner serves")
        lies_on = beneath.swap_beneath() if what == "swap" else map(beneath.mounts_beneath, paths)
        for entry in chain.from_iterable(lies_on):
            if mountpoint.connection_of(entry) in served:
                raise DeviceError(f"mount failed: {target}: {what} lies on what the owner serves, at {entry.point}")


@contextlib.contextmanager
def _file_system(
    owner: client.Connection, args: argparse.Namespace, options: MountOptions, root: Root
) -> Iterator[Mounted]:
    """What the image holds, mounted. If the block fails, it is as if it had never been."""
    with FuseFile(writable=args.rw) as file:
        owner.call("fuse", descriptors=[file.fuse_fd])
        file.passed()
        with _explained(owner), mountpoint.mount_filesystem(file, args.target, options, root) as mounted:
            yield mounted


@contextlib.contextmanager
def _explained(owner: client.Connection) -> Iterator[None]:
    """If the block fails since the image cannot be read, the owner may know why."""
    try:
        yield
    except DeviceError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EIO, errno.EUCLEAN):
            with contextlib.suppress(DeviceError):  # it does not
                owner.call("why")
        raise


@contextlib.contextmanager
def _raw(owner: client.Connection, args: argparse.Namespace, root: Root) -> Iterator[Mounted]:
    """The image as a served file. If the block fails, it is as if it had never been."""
    file = mountpoint.vacant(args.target)
    with _made(file), mountpoint.mount_file(file, root, writable=args.rw) as fuse_fd:
        try:
            owner.call("fuse", descriptors=[fuse_fd])
        finally:
            os.close(fuse_fd)  # the owner has it; its end has to end the file
        yield mountpoint.find(file)


@contextlib.contextmanager
def _made(file: Path) -> Iterator[None]:
    """The file is there; if it was made for that, and the block fails, it is gone again."""
    made = False
    try:
        try:
            if not file.exists():
                made = True
                file.touch()
        except OSError as error:
            raise from_os("mount failed", error, str(file)) from None
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # the error that brought us here is the one to tell
                file.unlink()
        raise
