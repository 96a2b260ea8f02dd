# SPDX-License-Identifier: Apache-2.0
"""How a command tells the owner of an image: its origin, the way to its registry, the policy."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockdev import client
from blockdev.cli import text
from blockdev.control import Body
from blockdev.errors import UsageError, from_os
from blockdev.origin import Origin, locate
from blockdev.registry.credentials import Provider
from blockdev.root import Root

_CA_MAX = 1 << 20  # bytes; the system's whole bundle is 200 KiB
_ENVIRONMENT_MAX = 2560 << 10  # bytes as JSON: what a process can be given where its stack may have 8 MiB, and some


def ask_owner(
    args: argparse.Namespace,
    op: str,
    origin: Origin,
    descriptors: Sequence[int] = (),
    *,
    extra: Mapping[str, Any] | None = None,
    show: text.Show | None = None,
) -> Body:
    """One request about an image. `descriptors` follow those of the origin."""
    body, fds = image_request(args, origin)
    with client.connect(Root(args.root), text.print_notice) as owner:
        progress = (lambda at: show(at["done"], at["total"])) if show else None
        return owner.call(op, {**body, **(extra or {})}, [*fds, *descriptors], progress=progress)


def locate_upper(args: argparse.Namespace) -> Origin:
    """What add_upper_options() took."""
    return locate(args.image, args.upper, write=args.rw)


def image_request(args: argparse.Namespace, origin: Origin) -> tuple[Body, list[int]]:
    """What of a request tells the owner how to open the image."""
    image, fds = origin.to_wire()
    body = {"image": image, "policy": str(args.on_error)}
    return (body if origin.local else {**body, "access": registry_access(args)}), fds


def registry_access(args: argparse.Namespace) -> dict[str, Any]:
    """How this caller reaches registries: what blockdev.remote.Access.from_wire() reads."""
    provider = Provider.of_environment(os.environ)
    credentials = provider.to_json()
    size = len(json.dumps(credentials["environment"]))
    if size > _ENVIRONMENT_MAX:
        why = f"{size} bytes as JSON, and what credential helpers are given is at most {_ENVIRONMENT_MAX}"
        raise UsageError(f"reaching registries failed: the environment: {why}")
    return {"plain_http": args.plain_http, "ca": certificates(args.ca), "credentials": credentials}


def certificates(path: Path | None) -> str:
    """The content of --ca: the owner opens no file of ours."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            content = file.read(_CA_MAX + 1)
    except OSError as error:
        raise from_os("reading certificates failed", error, str(path)) from None
    if len(content) > _CA_MAX or b"-----BEGIN CERTIFICATE-----" not in content:
        raise UsageError(f"reading certificates failed: {path}: no PEM certificates in it")
    return content.decode(errors="replace")
