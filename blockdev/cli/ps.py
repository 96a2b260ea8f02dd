# SPDX-License-Identifier: Apache-2.0
"""ociblk ps: what the owner of the root has mounted and exported. Starts no owner."""

from __future__ import annotations

import argparse
from typing import Any

from blockdev import client
from blockdev.cli import text
from blockdev.root import Root

_HEADING = ("ID", "IMAGE", "AT", "FRONT END", "MODE", "CHECKED", "LOCAL", "FETCHED", "REQUESTS", "ERROR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> None:
    """Print one row a device; with --json all that is known of each."""
    owner = client.connect_to_live(Root(args.root))
    devices = []
    if owner:
        with owner:
            devices = owner.call("ps")["devices"]
    if args.json:
        text.print_json({"devices": devices})
    else:
        text.print_table([_HEADING, *map(_row, devices)])


def _row(device: dict[str, Any]) -> tuple[str, ...]:
    how = f" ({device['how']})" if device["how"] else ""
    blobs = device["blob_bytes"]
    return (
        str(device["id"]),
        device["image"],
        device["where"] or f"({device['state']})",
        device["front_end"] + how,
        f"{device['mode']}: {device['reason']}",
        device["checked"],
        f"{100 * device['local_bytes'] // blobs if blobs else 100} %",
        text.size(device["fetched_bytes"]),
        str(device["requests"]),
        device["error"] or device["remark"] or "-",
    )
