# SPDX-License-Identifier: Apache-2.0
"""ociblk resize: another size for the disk of a writable layer. Local work; needs no owner."""

from __future__ import annotations

import argparse

from blockdev.cli import text
from blockdev.config import parse_path, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=parse_path)
    parser.add_argument("index", metavar="INDEX", type=parse_path)
    parser.add_argument("--size", metavar="N", type=parse_size, required=True, help="bytes; 0: as the image below it")


def run(args: argparse.Namespace) -> None:
    """Change the size that the layer says."""
    from blockdev.upper import resize_pair

    before = resize_pair(args.data, args.index, args.size)
    if args.json:
        text.print_json({"data": str(args.data), "before": before, "size": args.size})
