# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a cold read come from: a registry, a plain web server, a slow link.

docker-registry is the registry as it is; it answers a few hundred ranges a second. Where
that would hide what is measured, nginx serves what the registry has stored, as files. In
front of docker-registry it can also note the ranges asked for, which the registry's own
log leaves out.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from tools.bench_programs import program
from tools.bench_servers import running, wait_until

REPOSITORY = "bench/disk"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
SLOT_SECONDS = 0.01  # of the link's tally
DISTANCE = 1.0  # seconds after the start from which a link's share counts
_RANGE = re.compile(r"^GET /v2/\S+/blobs/(\S+) bytes=(\d+)-(\d+)$")

NGINX = """
daemon off; worker_processes 1; user root; error_log stderr; pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  client_body_temp_path {folder}/nginx.t; proxy_temp_path {folder}/nginx.t; fastcgi_temp_path {folder}/nginx.t;
  uwsgi_temp_path {folder}/nginx.t; scgi_temp_path {folder}/nginx.t;
  sendfile on; tcp_nopush on; keepalive_requests 100000000; keepalive_timeout 600;
  log_format ranges '$request_method $uri $http_range';
  access_log {access};
  upstream registry {{ server 127.0.0.1:{target}; keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    {locations}
  }}
}}
"""
PROXY = "location / { proxy_pass http://registry; proxy_http_version 1.1; proxy_set_header Connection ''; }"
STATIC = """
    location = /v2/ {{ return 200 '{{}}'; }}
    location /v2/{repository}/manifests/ {{ alias {folder}/manifests/; types {{ }} default_type {manifest_type}; }}
    location ~ ^/v2/{repository}/blobs/sha256:(..)(.*)$ {{
      alias {stored}/docker/registry/v2/blobs/sha256/$1/$1$2/data; types {{ }} default_type application/octet-stream;
    }}
"""


@dataclass(frozen=True)
class Registry:
    """docker-registry on loopback."""

    host: str  # host:port
    access: Path  # its access log
    stored: Path

    def blob_requests(self) -> int:
        """Requests for blobs so far."""
        return sum(1 for line in self.access.read_text().splitlines() if '"GET ' in line and "/blobs/" in line)

    def layers(self, tag: str) -> list[dict[str, object]]:
        """The layers' descriptors, bottom first."""
        layers: list[dict[str, object]] = json.loads(self.manifest(tag))["layers"]
        return layers

    def manifest(self, tag: str) -> bytes:
        url = f"http://{self.host}/v2/{REPOSITORY}/manifests/{tag}"
        answer = requests.get(url, headers={"Accept": MANIFEST_TYPE}, timeout=60)
        answer.raise_for_status()
        return answer.content

    def blob_url(self, digest: object) -> str:
        return f"http://{self.host}/v2/{REPOSITORY}/blobs/{digest}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    port = free_port()
    config, access = folder / "registry.yml", folder / "access"
    settings = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    command: list[str | Path] = ["docker-registry", "serve", config]
    with access.open("a") as out, running(command, folder / "log", stdout=out):
        wait_until(lambda: _connects(port), "docker-registry")
        yield Registry(f"127.0.0.1:{port}", access, folder / "registry")


@contextmanager
def _nginx(folder: Path, locations: str, access: str, target: str) -> Iterator[str]:
    folder.mkdir(exist_ok=True)
    port, config = free_port(), folder / "nginx.conf"
    config.write_text(
        NGINX.format(folder=folder, port=port, access=access, locations=locations, target=target.rpartition(":")[2])
    )
    with running(["nginx", "-p", folder, "-c", config], folder / "log"):
        wait_until(lambda: _connects(port), "nginx")
        yield f"127.0.0.1:{port}"


@contextmanager
def static(folder: Path, behind: Registry, tags: list[str]) -> Iterator[str]:
    """nginx with what the registry has for these tags; its host:port."""
    (folder / "manifests").mkdir(parents=True, exist_ok=True)
    for tag in tags:
        (folder / "manifests" / tag).write_bytes(behind.manifest(tag))
    locations = STATIC.format(folder=folder, stored=behind.stored, repository=REPOSITORY, manifest_type=MANIFEST_TYPE)
    with _nginx(folder, locations, "off", behind.host) as host:
        yield host


class RangeLog:
    """The ranges that were asked for through a proxy."""

    def __init__(self, host: str, log: Path) -> None:
        self.host = host
        self._log = log
        self._skip = 0

    def restart(self) -> None:
        """Forget what was asked for until now."""
        self._skip = len(self._log.read_text().splitlines())

    def ranges(self) -> list[tuple[str, int, int]]:
        """(digest, first, last) of each blob range since, in order."""
        found = map(_RANGE.match, self._log.read_text().splitlines()[self._skip :])
        return [(match[1], int(match[2]), int(match[3])) for match in found if match]


@contextmanager
def range_log(folder: Path, behind: Registry) -> Iterator[RangeLog]:
    """nginx before the registry, noting ranges."""
    folder.mkdir(exist_ok=True)
    log = folder / "ranges"
    log.touch()
    with _nginx(folder, PROXY, f"{log} ranges", behind.host) as host:
        yield RangeLog(host, log)


class Link:
    """A slow link (tests/bench/slow_link.c) and its tally of bytes."""

    def __init__(self, host: str, rate: float, tally: Path) -> None:
        self.host = host
        self.rate = rate
        self._tally = tally

    def carried(self, start: float, end: float) -> int:
        """Bytes that came over between two moments of time.monotonic()."""
        with self._tally.open("rb") as file:
            began = struct.unpack("=Q", file.read(8))[0] / 1e9
            first, last = (max(0, int((moment - began) / SLOT_SECONDS)) for moment in (start, end))
            file.seek(8 + first * 8)
            slots = file.read((last - first) * 8)
        return sum(struct.unpack(f"={len(slots) // 8}Q", slots))

    def share(self, start: float) -> float:
        """How much of the link was used from one second after `start` until now, in percent."""
        now = time.monotonic()
        if now - start <= DISTANCE:
            raise RuntimeError(f"the content came over the link in {now - start:.2f} s: too little to measure")
        return 100 * self.carried(start + DISTANCE, now) / (now - start - DISTANCE) / self.rate


@contextmanager
def link(folder: Path, target: str, delay_ms: float, rate: float) -> Iterator[Link]:
    """A slow way to a host:port: delay one way, bytes a second."""
    tally = folder / "tally"
    command: list[str | Path] = [program("slow_link"), target.rpartition(":")[2], str(delay_ms), str(rate), tally]
    with running(command, folder / "log", stdout=-1) as process:
        assert process.stdout is not None
        yield Link(f"127.0.0.1:{process.stdout.readline().strip()}", rate, tally)
