# SPDX-License-Identifier: Apache-2.0
"""ociblk umount: take a mount of ours away. Needs no owner, and waits for none."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from blockdev import mountpoint
from blockdev.cli import text
from blockdev.root import is_mount_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DIR", type=Path, help="where it is mounted; or the file of mount --raw")
    parser.add_argument("--force", action="store_true", help="even if it is in use: its users get errors from now on")


def run(args: argparse.Namespace) -> None:
    unmount(args.target, force=args.force)
    if args.json:
        text.print_json({"target": str(args.target.absolute())})


def unmount(target: Path, *, force: bool) -> None:
    """Unmount, and remove the file that a mounted file system has below it."""
    unmounted = mountpoint.force_umount(target) if force else mountpoint.umount(target)
    if is_mount_file(unmounted.file):
        with contextlib.suppress(OSError):  # empty, and in nobody's way
            unmounted.file.unlink()
