# SPDX-License-Identifier: Apache-2.0
"""serve, mount, umount, ps and daemon --stop on local images, with real owners and a real kernel."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.root import Root
from tests import fixtures, requires

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]

WAIT = 20.0  # seconds that anything here may take on a busy machine
DATA = fixtures.DATA
LAYER = DATA / "a-l2.lz4-4k.zlsmt"
SIZE = 16 << 20


def until(condition: Callable[[], bool], limit: float = WAIT) -> bool:
    """Whether the condition became true within the limit."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """A root whose owner, mounts and exports are gone afterwards."""
    root = Root(tmp_path / "root")
    yield root
    command = [sys.executable, "-m", "blockdev", "daemon", "--stop", "--force", "--root", str(root.path)]
    subprocess.run(command, check=True, timeout=WAIT)


@pytest.fixture
def run(ociblk: str, root: Root) -> Run:
    """run("ps") runs one command on the root and returns what became of it."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture
def start(ociblk: str, root: Root) -> Iterator[Start]:
    """start("serve", ...) starts one; it is ended by the test, or killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str | Path) -> subprocess.Popen[str]:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def uri_of(serving: subprocess.Popen[str]) -> str:
    assert serving.stdout
    return serving.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=WAIT)
    return process.returncode, errors


def greets(sock: socket.socket) -> bool:
    """Whether an NBD server is at the other end."""
    sock.settimeout(WAIT)
    return sock.recv(8) == b"NBDMAGIC"


def devices(run: Run) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run("ps", "--json").stdout)["devices"]
    return found


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def exported(run: Run, image: str | Path, to: Path) -> bytes:
    assert run("export", image, "-o", to).returncode == 0
    return to.read_bytes()


# ---- serve ----


def test_serve_prints_one_uri_that_is_usable_at_once_and_ends_well(tmp_path: Path, run: Run, start: Start) -> None:
    requires.requires_command("nbdcopy")
    serving = start("serve", LAYER, "--socket", tmp_path / "s", "--export", "name")
    assert uri_of(serving) == f"nbd+unix:///name?socket={tmp_path}/s"
    for uri in (f"nbd+unix:///name?socket={tmp_path}/s", f"nbd+unix:///?socket={tmp_path}/s"):
        subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True, timeout=60)
        assert (tmp_path / "copy").read_bytes() == exported(run, LAYER, tmp_path / "raw")
    assert [(device["front_end"], device["state"], device["mode"]) for device in devices(run)] == [
        ("nbd", "live", "local")
    ]
    serving.send_signal(signal.SIGTERM)
    assert ended(serving) == (0, "")
    assert not (tmp_path / "s").exists()
    assert devices(run) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_client_that_stays_connected_does_not_keep_serve(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert greets(client)
        serving.send_signal(number)
        assert ended(serving) == (0, "")


def test_serve_on_tcp_is_on_loopback_and_picks_a_port(start: Start) -> None:
    serving = start("serve", LAYER, "--port", "0", "--export", "a b")
    uri = uri_of(serving)
    assert uri.startswith("nbd://127.0.0.1:")
    assert uri.endswith("/a%20b")
    port = int(uri.removeprefix("nbd://127.0.0.1:").partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client:
        assert greets(client)
    serving.terminate()
    assert ended(serving) == (0, "")


def test_a_port_in_use_is_refused(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = run("serve", LAYER, "--port", str(taken.getsockname()[1]))
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (7, 1, "")


@pytest.mark.parametrize("words", [("--port", "70000"), ("--port", "1", "--bind", "no.such.host.invalid")])
def test_an_address_that_is_none_is_refused(run: Run, words: tuple[str, ...]) -> None:
    assert run("serve", LAYER, *words).returncode == 2


def test_a_socket_left_behind_is_replaced(tmp_path: Path, start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    serving.terminate()
    assert ended(serving) == (0, "")


def test_a_socket_in_use_is_refused_and_left_alone(tmp_path: Path, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    refused = run("serve", LAYER, "--socket", tmp_path / "s")
    assert (refused.returncode, refused.stderr.count("\n")) == (7, 1)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert greets(client)


def test_a_file_in_the_place_of_the_socket_is_refused_and_left_alone(tmp_path: Path, run: Run) -> None:
    (tmp_path / "s").write_text("mine")
    assert run("serve", LAYER, "--socket", tmp_path / "s").returncode == 7
    assert (tmp_path / "s").read_text() == "mine"


def test_serve_works_at_a_path_too_long_for_a_socket(tmp_path: Path, start: Start) -> None:
    place = tmp_path.joinpath(*["d" * 60] * 3)
    place.mkdir(parents=True)
    serving = start("serve", LAYER, "--socket", place / "s")
    assert uri_of(serving).endswith("/s")
    serving.terminate()
    assert ended(serving) == (0, "")
    assert not (place / "s").exists()


def test_an_export_ends_with_the_command_that_made_it(tmp_path: Path, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    serving.kill()
    assert until(lambda: devices(run) == [])
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(tmp_path / "s"))


def test_serve_ends_with_one_line_when_its_owner_dies(tmp_path: Path, root: Root, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    assert uri_of(serving)
    os.kill(int((root.holder() or "").rpartition(" ")[2]), signal.SIGKILL)
    code, errors = ended(serving)
    assert (code, errors.count("\n")) == (7, 1)
    assert not (tmp_path / "s").exists()


def test_stop_with_a_live_export_needs_force(tmp_path: Path, root: Root, run: Run, start: Start) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "s")
    uri = uri_of(serving)
    refused = run("daemon", "--stop")
    assert refused.returncode == 7
    assert uri in refused.stderr
    assert len(devices(run)) == 1
    assert run("daemon", "--stop", "--force").returncode == 0
    assert not root.owned()
    code, errors = ended(serving)
    assert (code, "stopped" in errors) == (7, True)


def test_a_broken_image_is_refused_before_anything_is_served(tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken").write_bytes(b"x" * 100_000)
    refused = run("serve", tmp_path / "broken", "--socket", tmp_path / "s")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (5, "", 1)
    assert not (tmp_path / "s").exists()


def test_each_further_image_takes_little_memory(tmp_path: Path, root: Root, start: Start) -> None:
    def resident() -> int:
        status = Path(f"/proc/{(root.holder() or '').rpartition(' ')[2]}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) << 10

    assert uri_of(start("serve", LAYER, "--socket", tmp_path / "first"))
    one = resident()
    for number in range(10):
        assert uri_of(start("serve", LAYER, "--socket", tmp_path / str(number)))
    assert one <= 40 << 20
    assert (resident() - one) / 10 <= 2 << 20
