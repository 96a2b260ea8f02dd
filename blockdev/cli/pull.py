# SPDX-License-Identifier: Apache-2.0
"""ociblk pull: have an image here before it is used: what opening it takes, or all of it."""

from __future__ import annotations

import argparse
import time

from blockdev import client
from blockdev.cli import add_image_options, text
from blockdev.cli.ask import image_request
from blockdev.origin import locate
from blockdev.root import Root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--complete", action="store_true", help="every blob, verified: the image needs no registry from then on"
    )
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Return once it is here; what has arrived stays if it is cut off."""
    started = time.monotonic()
    shown = text.Transfer()
    with locate(args.image) as origin:
        body, fds = image_request(args, origin)
        with client.connect(Root(args.root)) as owner:
            answer = owner.call("pull", {**body, "complete": args.complete}, fds, progress=shown.show)
    blobs = answer["blobs"]
    result = {
        "image": args.image,
        "complete": all(blob["present"] == blob["size"] for blob in blobs),
        "verified": all(blob["verified"] for blob in blobs),
        "bytes": sum(blob["size"] for blob in blobs),
        "present": sum(blob["present"] for blob in blobs),
        "fetched": sum(blob["fetched"] for blob in blobs),
        "seconds": round(time.monotonic() - started, 3),
        "blobs": blobs,
    }
    if args.json:
        text.print_json(result)
    else:
        here = f"{text.size(result['present'])} of {text.size(result['bytes'])} here"
        state = ", verified" if result["verified"] else ""
        print(f"{len(blobs)} blobs, {here}{state}; fetched {text.size(result['fetched'])}")
