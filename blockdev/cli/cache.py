# SPDX-License-Identifier: Apache-2.0
"""ociblk cache: what the root keeps of which blob, and removing what nobody uses."""

from __future__ import annotations

import argparse
from typing import Any

from blockdev import client
from blockdev.cli import text
from blockdev.root import Root

_HEADING = ("BLOB", "SIZE", "HERE", "ON DISK", "STATE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["stat", "prune"], help="list the blobs; or remove those not in use")


def run(args: argparse.Namespace) -> None:
    """Ask the owner, which alone may touch the cache."""
    with client.connect(Root(args.root)) as owner:
        found = owner.call(f"cache {args.action}")
    if args.json:
        text.print_json({name: value for name, value in found.items() if name != "v"})
    elif args.action == "stat":
        text.print_table([_HEADING, *map(_row, found["blobs"])])
    else:
        kept = f", {len(found['kept'])} in use and kept" if found["kept"] else ""
        print(f"removed {len(found['removed'])} blobs, {text.size(found['freed'])}{kept}")


def _row(blob: dict[str, Any]) -> tuple[str, ...]:
    state = [*(["verified"] if blob["verified"] else []), *(["in use"] if blob["in_use"] else [])]
    return (
        blob["digest"],
        text.size(blob["size"]),
        f"{100 * blob['present'] // blob['size'] if blob['size'] else 100} %",
        text.size(blob["allocated"]),
        ", ".join(state) or "-",
    )
