# SPDX-License-Identifier: Apache-2.0
"""ociblk import: a raw disk as a layer file. Local work; needs no owner."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from io import FileIO

from blockdev.cli import stdio, text
from blockdev.config import parse_jobs, parse_path, parse_size
from blockdev.errors import from_os
from blockdev.replacement import check_apart

STDIN = "-"
_NULL_UUID = "00000000-0000-0000-0000-000000000000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("disk", metavar="RAW", help=f"file or block device; {STDIN} is stdin")
    parser.add_argument("-o", "--output", metavar="LAYER", type=parse_path, required=True)
    parser.add_argument("--codec", choices=["none", "lz4", "zstd"], default="lz4", help="(default %(default)s)")
    parser.add_argument("--block-size", metavar="N", type=parse_size, default=4096, help="bytes (default %(default)s)")
    parser.add_argument("--jobs", metavar="N", type=parse_jobs, help="threads that compress (default: one a core)")
    parser.add_argument("--tar", action="store_true", help="wrap the layer in a tar, as registries have it")
    parser.add_argument("--uuid", metavar="U", default=_NULL_UUID, help="of the layer (default: all zeros)")
    parser.add_argument("--parent-uuid", metavar="P", default=_NULL_UUID, help="of the layer below it, if any")


def run(args: argparse.Namespace) -> None:
    """Make the layer; it appears once all of it is written."""
    from blockdev.build.disk import LayerOptions, all_cores, import_disk
    from blockdev.build.layerfile import Wrapping

    jobs = all_cores() if args.jobs is None else args.jobs
    options = LayerOptions(Wrapping(args.codec, args.block_size, args.tar), args.uuid, args.parent_uuid, jobs)
    with _open_disk(args.disk) as disk:
        check_apart(args.output, [("stdin" if args.disk == STDIN else args.disk, disk.fileno())])
        made = import_disk(disk.fileno(), args.disk, args.output, options, text.progress("read"))
    if args.json:
        text.print_json({"layer": str(args.output), **asdict(made)})


def _open_disk(path: str) -> FileIO:
    stdin = path == STDIN
    try:
        return FileIO(stdio.content_stream("stdin", "importing") if stdin else path, closefd=not stdin)
    except OSError as error:
        raise from_os("importing failed", error, path) from None
