# SPDX-License-Identifier: Apache-2.0
"""ociblk convert: an ordinary OCI image as a block image that starts before it has arrived.

This process fetches, converts and sends; the owner takes what was built into its cache.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockdev import client
from blockdev.cli import add_registry_options, text
from blockdev.cli.ask import certificates
from blockdev.config import parse_size
from blockdev.errors import UsageError
from blockdev.origin import LAYOUT_PREFIX
from blockdev.root import Root

if TYPE_CHECKING:
    from blockdev.build.depot import Depot
    from blockdev.registry.client import Client

BLOCK_SIZE = 16 << 10  # a tenth smaller than 4 KiB; docs/decisions/0010


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="an image in a registry, or oci:DIR[:TAG]")
    parser.add_argument("target", metavar="DST", help="where the block image goes: the same, with a tag")
    parser.add_argument("--fs", choices=["erofs", "ext4"], default="erofs", help="(default %(default)s)")
    parser.add_argument("--codec", choices=["lz4", "zstd"], default="lz4", help="(default %(default)s)")
    parser.add_argument(
        "--block-size", metavar="N", type=parse_size, default=BLOCK_SIZE, help="bytes (default %(default)s)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", help="which image of an index (default: this machine's)"
    )
    which.add_argument("--all-platforms", action="store_true", help="every image of an index")
    parser.add_argument("--referrer", action="store_true", help="to be found from its source, in the same repository")
    parser.add_argument("--jobs", metavar="N", type=int, help="threads that compress (default: one for each core)")
    add_registry_options(parser)


def run(args: argparse.Namespace) -> None:
    """Convert; prints the result by digest."""
    from blockdev.build.convert import Options, convert
    from blockdev.build.disk import all_cores
    from blockdev.build.layerfile import Wrapping
    from blockdev.build.workshop import Workshop

    options = Options(
        None if args.all_platforms else _platform(args.platform),
        args.fs,
        Wrapping(args.codec, args.block_size, tar=True, digests=True),
        all_cores() if args.jobs is None else args.jobs,
        args.referrer,
    )
    options.check()
    shows = {"converted": text.progress("converted"), "pushed": text.progress("pushed")}
    with ExitStack() as stack:
        clients = _Clients(args, stack)
        source, target = clients.depot(args.source), clients.depot(args.target)
        place = clients.place(args.target)
        if place and "@" in args.target:
            raise UsageError(f"converting failed: {args.target}: want a tag to write to, not a digest")
        # The owner first: what cannot be kept shall fail before anything is sent.
        root = Root(args.root)
        owner = stack.enter_context(client.connect(root))

        def adopt(fd: int, digest: str) -> None:
            owner.call("adopt", {"digest": digest, "place": place}, [fd])

        workshop = Workshop(root, adopt)
        stack.callback(workshop.close)
        converted = convert(source, target, workshop, options, lambda stage, done, total: shows[stage](done, total))
    if args.json:
        text.print_json({"reference": target.place, **asdict(converted)})
    else:
        print(f"{target.name}@{converted.digest}" if place else target.place)


class _Clients:
    """Registries by name: source and target may be in one."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        from blockdev.registry.credentials import Provider

        self._provider = Provider.of_environment(os.environ)
        self._ca = certificates(args.ca) or None
        self._plain_http = args.plain_http
        self._stack = stack
        self._clients: dict[str, Client] = {}

    def depot(self, name: str) -> Depot:
        """What SRC or DST stands for."""
        from blockdev.build.layout import Layout
        from blockdev.build.repository import Repository

        if name.startswith(LAYOUT_PREFIX):
            return Layout.parse(name.removeprefix(LAYOUT_PREFIX))
        reference = _reference(name)
        return Repository(self._client(reference.registry), reference)

    def place(self, name: str) -> dict[str, Any] | None:
        """Where the blobs of an image can be had again; None if that is no registry."""
        if name.startswith(LAYOUT_PREFIX):
            return None
        reference = _reference(name)
        return {
            "registry": reference.registry,
            "repository": reference.repository,
            "plain_http": self._plain_http,
        }

    def _client(self, registry: str) -> Client:
        from blockdev.registry.client import Client

        if registry not in self._clients:
            self._clients[registry] = Client(registry, self._provider, ca=self._ca, plain_http=self._plain_http)
            self._stack.callback(self._clients[registry].close)
        return self._clients[registry]


def _reference(name: str) -> Any:
    from formats.errors import FormatError
    from formats.oci import Reference

    try:
        return Reference.parse(name)
    except FormatError as error:
        raise UsageError(f"reading the image name failed: {name}: {error}") from None


def _platform(text: str | None) -> Any:
    from blockdev.origin import own_platform
    from formats.oci import Platform

    if text is None:
        return own_platform()
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"reading --platform failed: {text}: want OS/ARCH or OS/ARCH/VARIANT")
    return Platform(*parts)
