# SPDX-License-Identifier: Apache-2.0
"""ociblk commit: a writable layer as a layer file. Local work; needs no owner."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from blockdev.cli import text
from blockdev.config import parse_size

_NULL_UUID = "00000000-0000-0000-0000-000000000000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=Path, help="data file, or a sealed layer")
    parser.add_argument("index", metavar="INDEX", type=Path, nargs="?", help="index file; none for a sealed layer")
    parser.add_argument("-o", "--output", metavar="LAYER", type=Path, required=True)
    parser.add_argument("-m", "--message", metavar="TEXT", default="", help="kept in the head, at most 256 bytes")
    parser.add_argument("--codec", choices=["none", "lz4", "zstd"], default="lz4", help="(default %(default)s)")
    parser.add_argument("--block-size", metavar="N", type=parse_size, default=4096, help="bytes (default %(default)s)")
    parser.add_argument("--jobs", metavar="N", type=int, help="threads that compress (default: one for each core)")
    parser.add_argument("--tar", action="store_true", help="wrap the layer in a tar, as registries have it")
    parser.add_argument("--uuid", metavar="U", default=_NULL_UUID, help="of the layer (default: all zeros)")
    parser.add_argument("--parent-uuid", metavar="P", help="of the layer below it (default: the writable layer's)")


def run(args: argparse.Namespace) -> None:
    """Make the layer; it appears once all of it is written."""
    from blockdev.build.commit import CommitOptions, commit_pair
    from blockdev.build.disk import LayerOptions, all_cores
    from blockdev.build.layerfile import Wrapping

    jobs = all_cores() if args.jobs is None else args.jobs
    layer = LayerOptions(Wrapping(args.codec, args.block_size, args.tar), args.uuid, jobs=jobs)
    options = CommitOptions(layer, args.parent_uuid, args.message)
    made = commit_pair(args.data, args.index, args.output, options, text.progress("committed"))
    if args.json:
        text.print_json({"layer": str(args.output), **asdict(made)})
