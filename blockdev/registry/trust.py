# SPDX-License-Identifier: Apache-2.0
"""Which certificates are trusted: the system's ($SSL_CERT_FILE, $SSL_CERT_DIR), a caller's, and those requests brings.

Said twice, to two TLS stacks that must agree: as Python's context, and as PEM for the engine's.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from requests.utils import DEFAULT_CA_BUNDLE_PATH

import blockdev.engine as engine
from blockdev.errors import UsageError


class Trusted:
    """The system's certificates and those of `ca`, the text of PEM certificates."""

    def __init__(self, ca: str | None) -> None:
        self._ca = (ca or "").encode()
        self._made: dict[str | bool, engine.Trust] = {}
        self.context = ssl.create_default_context()
        try:
            if ca is not None:
                self.context.load_verify_locations(cadata=ca)
        except (ssl.SSLError, ValueError):
            raise UsageError("reading the CA certificates failed: --ca: no PEM certificate in it") from None

    def for_engine(self, bundle: str | bool) -> engine.Trust:
        """With what requests would add: a file or directory that the environment names, its own if True. OSError."""
        if bundle not in self._made:
            named = DEFAULT_CA_BUNDLE_PATH if bundle is True else str(bundle)
            system = ssl.get_default_verify_paths()
            places = [Path(place) for place in (system.cafile, system.capath, named) if place]
            files = [place.read_bytes() for place in places if not place.is_dir()]
            folders = [str(place) for place in places if place.is_dir()]
            self._made[bundle] = engine.Trust(b"\n".join([*files, self._ca]), os.pathsep.join(folders))
        return self._made[bundle]
