# SPDX-License-Identifier: Apache-2.0
"""ociblk compact: take the garbage out of a writable layer. Local work; needs no owner."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from blockdev.cli import text
from blockdev.config import parse_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=parse_path)
    parser.add_argument("index", metavar="INDEX", type=parse_path)


def run(args: argparse.Namespace) -> None:
    """Give back the room of what was overwritten or discarded."""
    from blockdev.upper import compact_pair

    done = compact_pair(args.data, args.index)
    if args.json:
        text.print_json({"data": str(args.data), **asdict(done)})
