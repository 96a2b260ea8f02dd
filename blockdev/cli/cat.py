# SPDX-License-Identifier: Apache-2.0
"""ociblk cat: files of an image on stdout, without a mount."""

from __future__ import annotations

import argparse
import os
import sys

from blockdev.cli import add_image_options, stdio
from blockdev.cli.disk import opened_disk
from blockdev.files import Files
from blockdev.origin import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a regular file in the image")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Write the files one after the other, once all of them are found."""
    stdio.content_stream("stdout", "writing files", terminal=True)
    with locate(args.image) as origin, opened_disk(args, origin) as disk:
        files = Files(disk, args.image)
        contents = [files.content(files.find(os.fsencode(path))) for path in args.paths]
        for content in contents:
            for piece in content:
                sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
