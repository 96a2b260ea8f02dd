# SPDX-License-Identifier: Apache-2.0
"""ociblk mount: the file system of an image on a directory, or the image itself as a file.

The kernel's part happens here, with the caller's rights and in its namespaces; the owner
gets the /dev/fuse descriptor and serves it. A mount that does not come about is undone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from blockdev import beneath, client, mountpoint
from blockdev.cli import add_image_options, add_upper_options, text
from blockdev.cli.ask import image_request, locate_upper
from blockdev.config import parse_path
from blockdev.errors import BlockdevError, DeviceError, UsageError, from_os
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
    options = mountpoint.parse_options(args.options, writable=args.rw)
    with locate_upper(args) as origin:
        body, fds = image_request(args, origin)
        with client.connect(root, text.print_notice) as owner:
            if args.rw:
                _check_independent(owner, root, target)
            opened = owner.call("mount", body, fds)
            file = target if args.raw else root.mounts / f"{opened['id']}-{os.getpid()}"
            with _fuse_file(owner, file, writable=args.rw):
                how = ""
                if not args.raw:
                    mounted = mountpoint.mount_filesystem(file, args.target, options, writable=args.rw)
                    how = f"{mounted.kind}, {mounted.loop or 'from the file'}"
                owner.call("mounted", {"where": str(target), "how": how})
    if args.json:
        text.print_json({"image": args.image, "target": str(target), "size": opened["size"], "how": how})


def _check_independent(owner: client.Connection, root: Root, target: Path) -> None:
    """The owner must not need what it serves: it would wait for itself as soon as memory is short."""
    place = target.resolve()
    served = {Path(device["where"]) for device in owner.call("ps")["devices"]}
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
            if Path(entry.point) in served or root.mounts in Path(entry.point).parents:
                raise DeviceError(f"mount failed: {target}: {what} lies on what the owner serves, at {entry.point}")


@contextlib.contextmanager
def _fuse_file(owner: client.Connection, file: Path, *, writable: bool) -> Iterator[None]:
    """The image as a served file. If the block fails, it is as if it had never been."""
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        made = not file.exists()
        file.touch()
    except OSError as error:
        raise from_os("mount", error, str(file)) from None
    with contextlib.ExitStack() as undo:
        if made:
            undo.callback(file.unlink)
        fuse_fd = mountpoint.mount_file(file, writable=writable)
        undo.callback(_unmount, file)
        try:
            owner.call("fuse", descriptors=[fuse_fd])
        finally:
            os.close(fuse_fd)  # the owner has it; its end has to end the file
        yield
        undo.pop_all()


def _unmount(file: Path) -> None:
    with contextlib.suppress(BlockdevError):  # the error that brought us here is the one to tell
        mountpoint.force_umount(file)
