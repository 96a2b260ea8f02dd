# SPDX-License-Identifier: Apache-2.0
"""ociblk create: the two files of an empty writable layer. Local work; needs no owner."""

from __future__ import annotations

import argparse

from blockdev.cli import text
from blockdev.config import parse_path, parse_size

_NULL_UUID = "00000000-0000-0000-0000-000000000000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=parse_path)
    parser.add_argument("index", metavar="INDEX", type=parse_path)
    parser.add_argument(
        "--size", metavar="N", type=parse_size, default=0, help="bytes of the disk (default: as the image below it)"
    )
    parser.add_argument("--parent-uuid", metavar="P", default=_NULL_UUID, help="of the layer below it, if any")


def run(args: argparse.Namespace) -> None:
    """Make the files; refused if there is one already."""
    from blockdev.upper import create_pair

    head = create_pair(args.data, args.index, args.size, args.parent_uuid)
    if args.json:
        text.print_json(
            {"data": str(args.data), "index": str(args.index), "size": head.virtual_size, "uuid": head.uuid}
        )
