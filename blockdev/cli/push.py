# SPDX-License-Identifier: Apache-2.0
"""ociblk push: layer files as an image in a registry, kept in the local cache too.

This process talks to the registry; the owner takes the blobs into its cache.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from blockdev import client
from blockdev.cli import add_registry_options, text
from blockdev.cli.ask import certificates
from blockdev.config import parse_path
from blockdev.errors import UsageError
from blockdev.root import Root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layers", metavar="LAYER", nargs="+", type=parse_path, help="layer files, bottom first")
    parser.add_argument("reference", metavar="REFERENCE", help="where to, with a tag")
    add_registry_options(parser)


def run(args: argparse.Namespace) -> None:
    """Push; prints the reference by digest."""
    from blockdev.build.push import push
    from blockdev.registry.client import Client
    from blockdev.registry.credentials import Provider
    from formats.errors import FormatError
    from formats.oci import Reference

    try:
        reference = Reference.parse(args.reference)
    except FormatError as error:
        raise UsageError(f"reading the image name failed: {args.reference}: {error}") from None
    provider = Provider.of_environment(os.environ)
    show = text.progress("pushed")
    # The owner first: what cannot be kept shall fail before anything is sent.
    place = {"registry": reference.registry, "repository": reference.repository, "plain_http": args.plain_http}
    with client.connect(Root(args.root)) as owner:

        def adopt(fd: int, digest: str) -> None:
            owner.call("adopt", {"digest": digest, "place": place}, [fd])

        registry = Client(reference.registry, provider, ca=certificates(args.ca) or None, plain_http=args.plain_http)
        pushed = push(
            registry,
            reference,
            args.layers,
            adopt=adopt,
            progress=lambda _layer, done, total: show(done, total),
        )
    if args.json:
        text.print_json(asdict(pushed))
    else:
        print(f"{reference.registry}/{reference.repository}@{pushed.digest}")
