# SPDX-License-Identifier: Apache-2.0
"""ociblk commit: a writable layer as a layer file. Local work; needs no owner."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from blockdev.cli import add_layer_options, text
from blockdev.config import parse_path
from blockdev.replacement import check_apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=parse_path, help="data file, or a sealed layer")
    parser.add_argument("index", metavar="INDEX", type=parse_path, nargs="?", help="index file; none if it is sealed")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Make the layer; it appears once all of it is written."""
    from blockdev.build.commit import commit_pair
    from blockdev.cli.layering import commit_options

    check_apart(args.output, [(str(path), path) for path in (args.data, args.index) if path])
    made = commit_pair(args.data, args.index, args.output, commit_options(args), text.progress("committed"))
    if args.json:
        text.print_json({"layer": str(args.output), **asdict(made)})
