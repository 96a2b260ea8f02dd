# SPDX-License-Identifier: Apache-2.0
"""ociblk verify: read all of an image or layer file, and check every checksum there is."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from blockdev.cli import add_image_options, text
from blockdev.cli.ask import ask_owner
from blockdev.origin import Origin, locate

_HEADING = ("SIZE", "DECODED", "BLOCK CHECKSUMS", "DIGEST", "LAYER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE|FILE")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was checked; the first thing that is wrong is the error. Local images need no owner."""
    show = text.progress("checked")
    with locate(args.image) as origin:
        layers = _verify(origin, show) if origin.local else ask_owner(args, "verify", origin, show=show)["layers"]
    if args.json:
        text.print_json({"image": args.image, "layers": layers})
    else:
        text.print_table([_HEADING, *map(_row, layers)])


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
