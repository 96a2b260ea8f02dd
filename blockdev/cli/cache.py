# SPDX-License-Identifier: Apache-2.0
"""ociblk cache: what the root keeps of which blob; taking blobs in, and removing what nobody uses."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockdev import client
from blockdev.cli import text
from blockdev.config import parse_path
from blockdev.errors import NotFound, UsageError, from_os
from blockdev.origin import LAYOUT_PREFIX, open_file
from blockdev.root import Root

_HEADING = ("BLOB", "SIZE", "HERE", "ON DISK", "STATE")
_DIGEST_NAME = re.compile(r"(?:(sha256|sha512)[:-])?([0-9a-f]{64}|[0-9a-f]{128})")
_HEX_DIGITS = {64: "sha256", 128: "sha512"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="stat|prune|add",
        choices=["stat", "prune", "add"],
        help="list the blobs; remove those not in use; take in blobs that were fetched otherwise",
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        help=f"add: a blob, or {LAYOUT_PREFIX}DIR for all blobs of an image layout",
    )


def run(args: argparse.Namespace) -> None:
    """Ask the owner, which alone may touch the cache."""
    if bool(args.files) != (args.action == "add"):
        raise UsageError(f"cache {args.action} failed: {' '.join(args.files) or 'FILE'}: add takes files, and only add")
    with client.connect(Root(args.root)) as owner:
        if args.action == "add":
            blobs = [_add(owner, path) for file in args.files for path in _blobs(file)]
            found: dict[str, Any] = {"blobs": blobs}
        else:
            found = owner.call(f"cache {args.action}")
    if args.json:
        text.print_json({name: value for name, value in found.items() if name != "v"})
    elif args.action == "stat":
        text.print_table([_HEADING, *map(_row, found["blobs"])])
    elif args.action == "add":
        print("\n".join(blob["digest"] for blob in found["blobs"]))
    else:
        kept = f", {len(found['kept'])} in use and kept" if found["kept"] else ""
        print(f"removed {len(found['removed'])} blobs, {text.size(found['freed'])}{kept}")


def _blobs(file: str) -> Iterator[Path]:
    """The files that an argument stands for."""
    if not file.startswith(LAYOUT_PREFIX):
        yield Path(file)
        return
    folder = parse_path(file.removeprefix(LAYOUT_PREFIX)) / "blobs"
    try:
        found = sorted(path for kind in folder.iterdir() for path in kind.iterdir() if _digest_of(path))
    except OSError as error:
        raise from_os("adding blobs failed", error, file) from None
    if not found:
        raise NotFound(f"adding blobs failed: {file}: no blobs in it")
    yield from found


def _add(owner: client.Connection, path: Path) -> dict[str, Any]:
    part = open_file(str(path))
    try:
        answer = owner.call("adopt", {"digest": _digest_of(path)}, [part.fd])
    finally:
        os.close(part.fd)
    return {"file": str(path), "digest": answer["digest"], "size": part.size}


def _digest_of(path: Path) -> str:
    """The digest that a file's name promises, as download tools and image layouts have it; "" if it promises none."""
    match = _DIGEST_NAME.fullmatch(path.name)
    return f"{match[1] or _HEX_DIGITS[len(match[2])]}:{match[2]}" if match else ""


def _row(blob: dict[str, Any]) -> tuple[str, ...]:
    state = [*(["verified"] if blob["verified"] else []), *(["in use"] if blob["in_use"] else [])]
    return (
        blob["digest"],
        text.size(blob["size"]),
        f"{100 * blob['present'] // blob['size'] if blob['size'] else 100} %",
        text.size(blob["allocated"]),
        ", ".join(state) or "-",
    )
