# SPDX-License-Identifier: Apache-2.0
"""ociblk fsck: check every byte that is in the cache, and fetch again what is bad."""

from __future__ import annotations

import argparse
from typing import Any

from blockdev import client, control
from blockdev.cli import add_image_options, stdio, text
from blockdev.cli.ask import registry_access
from blockdev.errors import CorruptImage
from blockdev.root import Root

_HEADING = ("BLOB", "OFFSET", "LENGTH", "STATE", "WHY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="IMAGE|DIGEST", nargs="*", help="check these only (default: the whole cache)")
    parser.add_argument("--repair", action="store_true", help="fetch what is bad again")
    parser.add_argument("--digests", action="store_true", help="compare the digest of verified blobs too")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Ask the owner, print what it found; an error if anything bad is left."""
    body: dict[str, Any] = {"names": args.names, "digests": args.digests, "repair": args.repair}
    if args.repair:
        body |= {"access": registry_access(args), "policy": str(args.on_error)}
    show = text.progress("checked")
    with client.connect(Root(args.root)) as owner:
        found = owner.call("fsck", body, progress=lambda at: show(at["done"], at["total"]))
    if args.json:
        text.print_json({name: value for name, value in found.items() if name != "v"})
    else:
        _print(found)
    _judge(found["bad"], str(args.root))


def _print(found: dict[str, Any]) -> None:
    if found["bad"]:
        text.print_table([_HEADING, *map(_row, found["bad"])])
    for path in found["leftovers"]:
        print(f"not part of the cache: {stdio.printable(path)}")
    repaired = sum(one["state"] == "repaired" for one in found["bad"])
    bad = f"{len(found['bad'])} bad" + (f", {repaired} repaired" if repaired else "")
    hashed = f", {found['hashed']} digests" if found["hashed"] else ""
    print(f"checked {found['blobs']} blobs, {text.size(found['bytes'])}{hashed}: {bad}")


def _row(bad: dict[str, Any]) -> tuple[str, ...]:
    why = f"{bad['why']}; {bad['error']}" if bad["error"] else bad["why"]
    return bad["digest"], str(bad["offset"]), str(bad["length"]), bad["state"], why


def _judge(bad: list[dict[str, Any]], root: str) -> None:
    """CorruptImage while anything bad is there; what kept it from being fetched again otherwise."""
    there = [one for one in bad if one["state"] == "bad"]
    if there:
        hint = there[0]["error"] or "ociblk fsck --repair fetches it again"
        raise CorruptImage(f"checking the cache failed: {root}: {len(there)} bad parts ({hint})")
    dropped = [one for one in bad if one["state"] == "dropped"]
    if dropped:
        why = f"{len(dropped)} bad parts are gone, and not fetched again: {dropped[0]['error']}"
        message = f"repairing the cache failed: {root}: {why}"
        control.raise_error({"error": {"class": dropped[0]["kind"], "message": message}})
