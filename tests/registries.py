# SPDX-License-Identifier: Apache-2.0
"""Debian's docker-registry, run by tests: as a fixture, with every kind of login, and its access log.

`registry` is a plain one. `registries` starts others:

    registries(users={"ann": "secret"})           htpasswd
    registries(auth=token_server.registry_options())
    registries(tls=authority.server("127.0.0.1"))
    registries(redirect_to=http_server.url)       blobs only, to /docker/registry/v2/blobs/...
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import pytest

from tests import requires
from tests.authority import Authority, Issued

START_SECONDS = 10.0
STOP_SECONDS = 5.0
LOG_SECONDS = 5.0
_ACCESS = re.compile(r'\S+ - \S+ \[[^\]]*\] "(\S+) (\S+) HTTP/[0-9.]+" ([0-9]{3}) ([0-9]+) ')
_CONNECTION = re.compile(r'"?response completed.*http\.request\.remoteaddr="([^"]+)"')


@dataclass(frozen=True)
class Access:
    """One line of the access log. `size`: bytes of the body that were sent."""

    method: str
    path: str
    status: int
    size: int


class Registry:
    """A docker-registry process with files of its own. Restarts keep port, blobs and log, and read `options` anew."""

    def __init__(self, folder: Path, options: dict[str, object], tls: Issued | None) -> None:
        self.folder = folder
        self.storage = folder / "storage"
        self.log = folder / "log"
        self._tls = tls
        self.options = options
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Return when it listens; the first time on a port that is free."""
        assert self._process is None
        deadline = time.monotonic() + START_SECONDS
        port = self._port
        while not self._start_on(port or _free_port(), deadline):
            assert time.monotonic() < deadline, f"docker-registry does not start: {self.log.read_text()[-2000:]}"

    def stop(self) -> None:
        """Connections break; the port refuses."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_SECONDS)
            self._process = None

    def accesses(self, path: str = "") -> list[Access]:
        """All requests so far whose path contains the text, in the log's order.

        A request of our own that has reached the log says that earlier ones have, too.
        """
        mark = f"/v2/?mark={uuid.uuid4().hex}"
        self._get(mark)
        deadline = time.monotonic() + LOG_SECONDS
        while mark not in (log := self.log.read_text()):
            assert time.monotonic() < deadline, "the registry does not write its log"
            time.sleep(0.01)
        found = [Access(m[1], m[2], int(m[3]), int(m[4])) for m in _ACCESS.finditer(log)]
        return [access for access in found if path in access.path and "?mark=" not in access.path]

    def connections(self) -> set[str]:
        """Addresses that completed requests came from: one a connection."""
        return set(_CONNECTION.findall(self.log.read_text()))

    def ranges(self, digest: str) -> list[int]:
        """Bytes of each range of a blob that was sent."""
        return [access.size for access in self.accesses(f"/blobs/{digest}") if access.status == 206]

    def whole_gets(self, digest: str) -> int:
        """How often the whole blob was asked for."""
        return sum(access.method == "GET" and access.status == 200 for access in self.accesses(f"/blobs/{digest}"))

    def _start_on(self, port: int, deadline: float) -> bool:
        config = self.folder / "config.json"  # JSON is YAML
        http = {"addr": f"127.0.0.1:{port}", "secret": "0"}
        if self._tls:
            http |= {"tls": {"certificate": str(self._tls.certificate), "key": str(self._tls.key_file)}}
        storage = {
            "filesystem": {"rootdirectory": str(self.storage)},
            "maintenance": {"uploadpurging": {"enabled": False}},
        }
        config.write_text(json.dumps({"version": "0.1", "storage": storage, "http": http, **self.options}))
        said = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            # Debian's package brings an environment that other registries on this machine may be configured by.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
            process = subprocess.Popen(
                ["docker-registry", "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        while process.poll() is None:
            if f"listening on 127.0.0.1:{port}" in self.log.read_text()[said:]:
                self._process, self._port = process, port
                return True
            if time.monotonic() > deadline:
                process.kill()
                process.wait(STOP_SECONDS)
                break
            time.sleep(0.01)
        return False

    def _get(self, path: str) -> None:
        if self._tls:
            trusting = ssl.create_default_context()
            trusting.check_hostname = False
            trusting.verify_mode = ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(self.host, context=trusting)
        else:
            connection = http.client.HTTPConnection(self.host)
        connection.request("GET", path)
        connection.getresponse().read()
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _htpasswd(path: Path, users: dict[str, str]) -> dict[str, object]:
    rounds = 4  # the least bcrypt has; docker-registry checks it anew with every request
    lines = [
        f"{user}:{bcrypt.hashpw(word.encode(), bcrypt.gensalt(rounds)).decode()}\n" for user, word in users.items()
    ]
    path.write_text("".join(lines))
    return {"htpasswd": {"realm": "test", "path": str(path)}}


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    """start(users=, auth=, tls=, redirect_to=, proxy_of=) -> Registry; stopped when the test ends."""
    requires.requires_command("docker-registry")
    started: list[Registry] = []

    def start(
        *,
        users: dict[str, str] | None = None,
        auth: dict[str, object] | None = None,
        tls: Issued | None = None,
        redirect_to: str = "",
        proxy_of: str = "",
    ) -> Registry:
        folder = tmp_path / f"registry-{len(started)}"
        folder.mkdir()
        options: dict[str, object] = {}
        if users:
            auth = _htpasswd(folder / "htpasswd", users)
        if auth:
            options["auth"] = auth
        if redirect_to:
            options["middleware"] = {"storage": [{"name": "redirect", "options": {"baseurl": f"{redirect_to}/"}}]}
        if proxy_of:
            options["proxy"] = {"remoteurl": proxy_of}
        started.append(Registry(folder, options, tls))
        return started[-1]

    yield start
    for registry in started:
        registry.stop()


@pytest.fixture
def registry(registries: Callable[..., Registry]) -> Registry:
    """An anonymous registry over plain HTTP."""
    return registries()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority of the test run's own."""
    return Authority(tmp_path_factory.mktemp("authority"))
