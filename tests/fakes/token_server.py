# SPDX-License-Identifier: Apache-2.0
"""A token service of the distribution specification: RS256 JWTs that docker-registry accepts."""

from __future__ import annotations

import base64
import json
import time
import uuid
from typing import Self
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from tests.authority import Issued
from tests.fakes.http_server import Answer, HttpServer, Seen

ISSUER = "test token service"
SERVICE = "test registry"


class TokenServer:
    """Knows `users` (name → password) and `identity_tokens`. With no users everybody may pull.

    Tokens are good for `life` seconds, and said to be (docker-registry takes them a minute longer).
    `well` off: 503 to everything. `generous` off: tokens allow nothing. `never`: actions that none allows.
    """

    def __init__(self, signer: Issued, users: dict[str, str], life: int = 60) -> None:
        self.users = users
        self.identity_tokens: set[str] = set()
        self.life = life
        self.well = True
        self.generous = True
        self.never: set[str] = set()
        self.signer = signer
        self._server = HttpServer(self._answer)

    @property
    def url(self) -> str:
        return f"{self._server.url}/token"

    @property
    def seen(self) -> list[Seen]:
        return self._server.seen

    def registry_options(self) -> dict[str, object]:
        """The `auth` section of a docker-registry that trusts this service."""
        token = {
            "realm": self.url,
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(self.signer.certificate),
        }
        return {"token": token}

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _answer(self, seen: Seen) -> Answer:
        if not self.well:
            return Answer(503)
        asked = parse_qs(seen.body.decode() if seen.method == "POST" else seen.query)
        if not self._knows(seen, asked):
            return _json(401, {"errors": [{"code": "UNAUTHORIZED", "message": "no such user or password"}]})
        token = self._token(asked.get("scope", []) if self.generous else [])
        name = "access_token" if seen.method == "POST" else "token"
        return _json(200, {name: token, "expires_in": self.life})

    def _knows(self, seen: Seen, asked: dict[str, list[str]]) -> bool:
        if seen.method == "POST":
            return asked.get("refresh_token", [""])[0] in self.identity_tokens
        if not self.users:
            return True
        kind, _, packed = seen.headers.get("authorization", "").partition(" ")
        name, _, password = base64.b64decode(packed).decode().partition(":") if kind == "Basic" else ("", "", "")
        return self.users.get(name) == password and bool(password)

    def _token(self, scopes: list[str]) -> str:
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            granted = [action for action in actions.split(",") if action not in self.never]
            access.append({"type": kind, "name": name, "actions": granted})
        claims = {"iss": ISSUER, "sub": "", "aud": SERVICE, "nbf": now - 5, "iat": now, "exp": now + self.life}
        claims |= {"jti": uuid.uuid4().hex, "access": access}
        certificate = self.signer.loaded.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(certificate).decode()]}
        signed = f"{_packed(head)}.{_packed(claims)}"
        signature = self.signer.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _packed(values: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


def _json(status: int, values: dict[str, object]) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(values).encode())
