# SPDX-License-Identifier: Apache-2.0
"""ociblk seal: a writable layer becomes a read-only one where it is. Local work; needs no owner."""

from __future__ import annotations

import argparse

from blockdev.cli import text
from blockdev.config import parse_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=parse_path)
    parser.add_argument("index", metavar="INDEX", type=parse_path)


def run(args: argparse.Namespace) -> None:
    """Append index and trailer to the data file."""
    from blockdev.upper import seal_pair

    entries = seal_pair(args.data, args.index)
    if args.json:
        text.print_json({"layer": str(args.data), "index_entries": entries})
