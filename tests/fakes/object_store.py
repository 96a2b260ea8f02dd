# SPDX-License-Identifier: Apache-2.0
"""The object store a registry redirects blobs to: docker-registry's own files, served with ranges."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.http_server import Answer, HttpServer, Seen, ranged


class ObjectStore:
    """Serves what lies under `folder`, which is set once the registry has one. close() it."""

    def __init__(self) -> None:
        self.folder = Path()
        self.server = HttpServer(self._answer)

    def _answer(self, seen: Seen) -> Answer:
        return ranged(seen, (self.folder / seen.path.lstrip("/")).read_bytes())
