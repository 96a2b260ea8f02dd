# SPDX-License-Identifier: Apache-2.0
"""ociblk inspect: what an image or a layer file is made of."""

from __future__ import annotations

import argparse
from typing import Any

from blockdev.cli import add_image_options, stdio, text
from blockdev.cli.ask import ask_owner
from blockdev.origin import Origin, locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE|FILE")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the description; of a local image without an owner."""
    with locate(args.image) as origin:
        found = _inspect(origin) if origin.local else ask_owner(args, "inspect", origin)
    if args.json:
        text.print_json({name: value for name, value in found.items() if name != "v"})
    else:
        _print(found)


def _inspect(origin: Origin) -> dict[str, Any]:
    from blockdev.engine import Engine
    from blockdev.stack import open_local

    with Engine() as engine, open_local(engine, origin) as stack:
        return stack.describe()


def _print(found: dict[str, Any]) -> None:
    print(f"image   {stdio.printable(found['image'])}")
    print(f"size    {found['size']} ({text.size(found['size'])})")
    rows = [("layer", "kind", "blob", "disk", "wrapped in", "checked", "entries", "name")]
    for place, layer in enumerate(found["layers"]):
        wrapping = [*(["tar"] if "tar" in layer else []), *([_zfile(layer["zfile"])] if "zfile" in layer else [])]
        rows.append(
            (
                str(place),
                layer["kind"],
                text.size(layer["size"]),
                text.size(layer["virtual_size"]),
                " ".join(wrapping) or "-",
                layer.get("checked", "-"),
                str(layer["lsmt"]["index_entries"]) if "lsmt" in layer else "-",
                layer["name"],
            )
        )
    text.print_table(rows)


def _zfile(head: dict[str, Any]) -> str:
    return f"{head['codec']}/{head['block_size']}{'' if head['crc'] else ' without checksums'}"
