# SPDX-License-Identifier: Apache-2.0
"""`ociblk convert` between registries: mounted from there, killed, cut off, and sent no blob twice."""

from __future__ import annotations

import http.client
import json
import random
import signal
import stat
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from formats import oci
from tests.commands import Run, Start, ended
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.http_server import Answer, Ending, Seen
from tests.images import TAG
from tests.ordinary import TIME, lower, make, upper
from tests.registries import Registry
from tests.requires import requires_command, requires_mount

START_SECONDS = 60.0


@pytest.fixture
def source(tmp_path: Path) -> str:
    return f"oci:{make(tmp_path / 'source', lower, upper)}:{TAG}"


def _converted(run: Run, *words: str) -> list[dict[str, Any]]:
    """The layers of the image that was made."""
    done = run("convert", *words, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["images"][0]["layers"]
    return found


def _has_tag(registry: Registry) -> bool:
    connection = http.client.HTTPConnection(registry.host)
    connection.request("HEAD", "/v2/team/app/manifests/1", headers={"Accept": oci.OCI_MANIFEST})
    reply = connection.getresponse()
    reply.read()
    connection.close()
    return reply.status == 200


def test_a_registrys_image_is_converted_and_mounted_from_there(
    run: Run, registry: Registry, source: str, tmp_path: Path
) -> None:
    requires_mount()
    requires_command("skopeo")
    ordinary = f"{registry.host}/team/app:1"
    command = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", source, f"docker://{ordinary}"]
    subprocess.run(command, check=True, timeout=60)
    done = run("convert", ordinary, f"{registry.host}/team/block:1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{registry.host}/team/block@sha256:")
    point = tmp_path / "mounted"
    point.mkdir()
    assert run("mount", done.stdout.strip(), point).returncode == 0
    try:
        assert sorted(path.name for path in point.iterdir()) == ["again", "bin", "copy", "data", "etc", "link"]
        assert [path.name for path in (point / "etc").iterdir()] == ["name"]
        assert (point / "link").read_text() == "upper\n"
        chance = random.Random(1)
        tool = oci.digest_of(chance.randbytes(300_000))
        assert {oci.digest_of((point / name).read_bytes()) for name in ("bin/tool", "bin/same", "copy")} == {tool}
        content = oci.digest_of(bytes(2 << 20) + chance.randbytes(1 << 20))
        assert oci.digest_of((point / "data").read_bytes()) == content
        found = (point / "bin" / "tool").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_nlink, found.st_mtime) == (0o4755, 2, TIME)
    finally:
        assert run("umount", point).returncode == 0


# ---- uploads --------------------------------------------------------------------------------


@dataclass
class _Uploads:
    """How often each digest was sent to a registry, and how often taken from another repository."""

    sent: Counter[str] = field(default_factory=Counter)
    mounted: Counter[str] = field(default_factory=Counter)


def _uploads(registry: Registry) -> _Uploads:
    found = _Uploads()
    for access in registry.accesses("/blobs/uploads/"):
        query = access.path.partition("?")[2].replace("%3A", ":")
        for method, key, counter in (("PUT", "digest=", found.sent), ("POST", "mount=", found.mounted)):
            if (access.method, access.status) == (method, 201) and key in query:
                counter[query.partition(key)[2].partition("&")[0]] += 1
    return found


class _Gate(FaultProxy):
    """A registry's front that lets so many blobs through, and then answers no upload any more."""

    def __init__(self, upstream: str, blobs: int) -> None:
        self.reached = threading.Event()
        self._left = blobs
        super().__init__(upstream)

    def _from_registry(self, seen: Seen) -> Answer:
        if seen.method == "PUT" and "/blobs/uploads/" in seen.path:
            if not self._left:
                self.reached.set()
                return Answer(mute=True, ending=Ending.STALL)
            self._left -= 1
        return super()._from_registry(seen)


def test_a_conversion_that_was_killed_while_it_sent_goes_on_and_sends_nothing_twice(
    run: Run, start: Start, registry: Registry, source: str
) -> None:
    with _Gate(registry.host, blobs=1) as gate:
        converting = start("convert", source, f"{gate.host}/team/app:1")
        assert gate.reached.wait(START_SECONDS), converting.poll()
        converting.kill()
        converting.communicate()
    assert not _has_tag(registry)
    layers = _converted(run, source, f"{registry.host}/team/app:1")
    assert [(layer["reused"], layer["sent"]) for layer in layers] == [(True, False), (True, True)]
    sent = _uploads(registry).sent
    assert set(sent) >= {layer["digest"] for layer in layers}
    assert set(sent.values()) == {1}
    assert not any(layer["sent"] for layer in _converted(run, source, f"{registry.host}/team/app:1"))
    assert _uploads(registry).sent == sent
    _converted(run, source, f"{registry.host}/team/other:1")
    mounted = _uploads(registry).mounted
    assert [mounted[layer["digest"]] for layer in layers] == [1, 1], "taken from the first repository"
    assert [_uploads(registry).sent[layer["digest"]] for layer in layers] == [1, 1]


def test_a_registry_that_vanishes_is_one_error_and_there_is_no_image(
    run: Run, start: Start, registry: Registry, source: str
) -> None:
    with _Gate(registry.host, blobs=1) as gate:
        converting = start("convert", source, f"{gate.host}/team/app:1")
        assert gate.reached.wait(START_SECONDS), converting.poll()
    code, errors = ended(converting)
    assert (code, len(errors.splitlines())) == (6, 1)
    assert "pushing a blob failed" in errors
    assert not _has_tag(registry)
    registry.stop()
    done = run("convert", f"{registry.host}/team/app:1", source.replace("source", "other"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (6, "", 1)
    assert "connection refused" in done.stderr


def test_a_conversion_that_is_interrupted_does_not_wait_for_a_registry_that_is_stuck(
    start: Start, registry: Registry, source: str
) -> None:
    with _Gate(registry.host, blobs=0) as gate:
        converting = start("convert", source, f"{gate.host}/team/app:1")
        assert gate.reached.wait(START_SECONDS), converting.poll()
        converting.send_signal(signal.SIGINT)
        assert ended(converting) == (130, "")
    assert not _has_tag(registry)


def test_what_is_no_image_name_is_refused_before_anything_starts(run: Run, tmp_path: Path, source: str) -> None:
    target = f"oci:{tmp_path}/block:1"
    for code, *words in (
        (2, source, target, "--platform", "linux"),
        (2, source, target, "--codec", "none"),
        (2, source, "localhost/UPPER:1"),
        (2, source, f"localhost/app@sha256:{'0' * 64}"),
        (3, f"oci:{tmp_path}/none:1", target),
        (3, source, target, "--platform", "linux/sparc"),
    ):
        assert run("convert", *map(str, words)).returncode == code
    assert not (tmp_path / "block").exists()
