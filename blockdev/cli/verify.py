# SPDX-License-Identifier: Apache-2.0
"""ociblk verify: check every checksum there is, or prove that two images hold the same files.

verify IMAGE        reads all of an image or layer file, and checks it
verify SRC DST      compares every path, attribute and byte of two images or directories
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from blockdev.cli import add_image_options, text
from blockdev.cli.ask import ask_owner
from blockdev.origin import Origin, locate

_HEADING = ("SIZE", "DECODED", "BLOCK CHECKSUMS", "DIGEST", "LAYER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE|FILE|DIR")
    parser.add_argument("other", metavar="DST", nargs="?", help="what must hold the same files: an image, FILE or DIR")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was checked or compared; the first thing that is wrong, or differs, is the error."""
    if args.other is None:
        _check(args)
    else:
        _compare(args)


def _check(args: argparse.Namespace) -> None:
    """All of one image. Of a local one without an owner."""
    show = text.progress("checked")
    with locate(args.image) as origin:
        layers = _verify(origin, show) if origin.local else ask_owner(args, "verify", origin, show=show)["layers"]
    if args.json:
        text.print_json({"image": args.image, "layers": layers})
    else:
        text.print_table([_HEADING, *map(_row, layers)])


def _compare(args: argparse.Namespace) -> None:
    from blockdev.build.compare import compare
    from blockdev.cli.sides import Sides

    with ExitStack() as undo:
        sides = Sides(args, undo)
        equal = compare(sides.open(args.image), sides.open(args.other), text.progress("compared"))
    if args.json:
        text.print_json({"source": args.image, "target": args.other, **asdict(equal)})
    else:
        print(f"equal: {equal.entries} paths, {equal.files} files with {text.size(equal.content)}")


def _verify(origin: Origin, show: text.Show) -> list[dict[str, Any]]:
    from blockdev.engine import Engine
    from blockdev.stack import open_local

    with Engine() as engine, open_local(engine, origin) as stack:
        return [asdict(layer) for layer in stack.verify(engine, show)]


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    return (
        text.size(layer["size"]),
        text.size(layer["plain_size"]),
        "right" if layer["checksums"] else "it has none",
        layer["digest"],
        layer["name"],
    )
