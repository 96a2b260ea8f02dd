# SPDX-License-Identifier: Apache-2.0
"""ociblk convert: an ordinary OCI image as a block image that starts before it has arrived.

This process fetches, converts and sends; the owner takes what was built into its cache.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from blockdev import client
from blockdev.cli import add_registry_options, text
from blockdev.config import parse_jobs, parse_size
from blockdev.errors import UsageError
from blockdev.root import Root

if TYPE_CHECKING:
    from blockdev.build.convert import MakeDisk

BLOCK_SIZE = 16 << 10  # a tenth smaller than 4 KiB; docs/decisions/0010


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="an image in a registry, or oci:DIR[:TAG]")
    parser.add_argument("target", metavar="DST", help="where the block image goes: the same, without a digest")
    parser.add_argument("--fs", choices=["erofs", "ext4"], default="erofs", help="(default %(default)s)")
    parser.add_argument("--codec", choices=["lz4", "zstd"], default="lz4", help="(default %(default)s)")
    parser.add_argument(
        "--block-size", metavar="N", type=parse_size, default=BLOCK_SIZE, help="bytes (default %(default)s)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", help="which image of an index (default: this machine's)"
    )
    which.add_argument("--all-platforms", action="store_true", help="every image of an index")
    parser.add_argument("--referrer", action="store_true", help="to be found from its source, in the same repository")
    parser.add_argument("--jobs", metavar="N", type=parse_jobs, help="threads that compress (default: one a core)")
    add_registry_options(parser)


def run(args: argparse.Namespace) -> None:
    """Convert; prints the result by digest."""
    from blockdev.build.convert import Options, convert
    from blockdev.build.disk import all_cores
    from blockdev.build.layerfile import Wrapping
    from blockdev.build.workshop import Workshop
    from blockdev.cli.depots import Depots

    shows = {"converted": text.progress("converted"), "pushed": text.progress("pushed")}
    with ExitStack() as stack:
        options = Options(
            None if args.all_platforms else _platform(args.platform),
            args.fs,
            _maker(args, stack),
            Wrapping(args.codec, args.block_size, tar=True, digests=True),
            all_cores() if args.jobs is None else args.jobs,
            args.referrer,
            strict=args.platform is not None,
        )
        options.check()
        depots = Depots(args, stack)
        source, target = depots.depot(args.source), depots.depot(args.target)
        place = depots.place(args.target)
        if place and "@" in args.target:
            raise UsageError(f"converting failed: {args.target}: want a tag to write to, not a digest")
        # The owner first: what cannot be kept shall fail before anything is sent.
        root = Root(args.root)
        owner = stack.enter_context(client.connect(root))

        def adopt(fd: int, digest: str) -> None:
            owner.call("adopt", {"digest": digest, "place": place}, [fd])

        workshop = Workshop(root, adopt)
        stack.callback(workshop.close)
        converted = convert(source, target, workshop, options, lambda stage, done, total: shows[stage](done, total))
    if args.json:
        text.print_json({"reference": target.place, **asdict(converted)})
    else:
        print(f"{target.name}@{converted.digest}" if place else target.place)


def _maker(args: argparse.Namespace, undo: ExitStack) -> MakeDisk:
    """What makes the disk of the file system that was asked for."""
    if args.fs == "erofs":
        from blockdev.build.erofsdisk import ErofsDisk

        return ErofsDisk
    from blockdev.build.ext4disk import Ext4Disk, Workplace, check_rights
    from blockdev.cli.attached import attached

    check_rights()
    root = Root(args.root)
    workplace = Workplace(partial(attached, root), root.path, undo)
    return lambda wrapping, jobs: Ext4Disk(wrapping, jobs, workplace)


def _platform(text: str | None) -> Any:
    from blockdev.origin import own_platform
    from formats.oci import Platform

    if text is None:
        return own_platform()
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"reading --platform failed: {text}: want OS/ARCH or OS/ARCH/VARIANT")
    return Platform(*parts)
