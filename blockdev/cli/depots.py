# SPDX-License-Identifier: Apache-2.0
"""Where whole images are, by the names that commands take: registry references and oci:DIR[:TAG]."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from blockdev.build.depot import Depot
from blockdev.build.layout import Layout
from blockdev.build.repository import Repository
from blockdev.cli.ask import certificates
from blockdev.errors import UsageError
from blockdev.origin import LAYOUT_PREFIX
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from formats.errors import FormatError
from formats.oci import Reference


class Depots:
    """The depots of one command. Those in one registry share its connections and login, until `undo`."""

    def __init__(self, args: argparse.Namespace, undo: ExitStack) -> None:
        self._provider = Provider.of_environment(os.environ)
        self._ca = certificates(args.ca) or None
        self._plain_http: bool = args.plain_http
        self._undo = undo
        self._clients: dict[str, Client] = {}

    def depot(self, name: str) -> Depot:
        """What the name stands for. UsageError if it is no name of an image."""
        if name.startswith(LAYOUT_PREFIX):
            return Layout.parse(name.removeprefix(LAYOUT_PREFIX))
        reference = _reference(name)
        return Repository(self._client(reference.registry), reference)

    def place(self, name: str) -> dict[str, Any] | None:
        """Where the blobs of an image can be had again, as the owner is told; None if that is no registry."""
        if name.startswith(LAYOUT_PREFIX):
            return None
        reference = _reference(name)
        return {
            "registry": reference.registry,
            "repository": reference.repository,
            "plain_http": self._plain_http,
        }

    def _client(self, registry: str) -> Client:
        if registry not in self._clients:
            client = Client(registry, self._provider, ca=self._ca, plain_http=self._plain_http)
            self._undo.callback(client.close)
            self._clients[registry] = client
        return self._clients[registry]


def _reference(name: str) -> Reference:
    try:
        return Reference.parse(name)
    except FormatError as error:
        raise UsageError(f"reading the image name failed: {name}: {error}") from None
