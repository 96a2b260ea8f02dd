# SPDX-License-Identifier: Apache-2.0
"""ociblk merge: all layers of a local image as one layer file. Local work; needs no owner."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from blockdev.cli import add_layer_options, text
from blockdev.errors import UsageError
from blockdev.origin import locate
from blockdev.replacement import check_apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="all of it in local files")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Make the layer; it appears once all of it is written."""
    from blockdev.build.commit import merge_image
    from blockdev.cli.layering import commit_options
    from blockdev.engine import Engine
    from blockdev.stack import open_local

    with locate(args.image) as origin:
        if not origin.local:
            raise UsageError(f"merging failed: {args.image}: its layers are not all in local files")
        check_apart(args.output, origin.files)
        with Engine() as engine, open_local(engine, origin) as stack:
            made = merge_image(stack.image, args.output, commit_options(args), text.progress("merged"))
    if args.json:
        text.print_json({"layer": str(args.output), **asdict(made)})
