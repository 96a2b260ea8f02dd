# SPDX-License-Identifier: Apache-2.0
"""NBD clients that are not ours read the disk as it is, and none can hold up another."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from blockdev.config import Policy
from blockdev.engine import Engine, EngineStopped, Image, LayerKind, LayerTable, Priority, RunKind
from blockdev.transport.nbd import tcp_uri, unix_uri
from formats import lsmt, zfile
from formats.lsmt import SECTOR
from tests import fixtures
from tests.opened import opened_bytes
from tests.requires import requires_command
from tests.served import served, tcp_listener, unix_listener

requires_command("nbdinfo", "nbdcopy", "nbdsh", "qemu-img", "fio")

DISK = 48 << 20
EXPORT = "web/app 1.0%ü?"
WAIT = 60.0  # seconds a client may take on a busy machine


def build_disk() -> tuple[bytes, bytes]:
    """A disk of data, zeroed parts and holes, and a compressed layer of it."""
    noise = random.Random(3)
    disk = bytearray(DISK)
    layer = bytearray()
    writer = lsmt.CommitWriter(layer.extend, lsmt.Head(0, DISK))
    at = 0
    while at < DISK // SECTOR:
        length = min(noise.choice([1, 8, 16, 128, 600, 2000]), DISK // SECTOR - at)
        kind = noise.random()
        if kind < 0.5:
            content = noise.randbytes(length * SECTOR // 4) + bytes(length * SECTOR - length * SECTOR // 4)
            disk[at * SECTOR : (at + length) * SECTOR] = content
            writer.data(at, content)
        elif kind < 0.7:
            writer.zeroed(at, length)
        at += length
    writer.finish()
    return bytes(disk), zfile.build(bytes(layer), zfile.Options(block_size=16384))


@dataclass(frozen=True)
class Bench:
    """A disk behind both kinds of socket."""

    image: Image
    raw: Path
    disk: bytes
    unix: str
    tcp: str


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("nbd")
    disk, layer = build_disk()
    raw = folder / "raw"
    raw.write_bytes(disk)
    path = folder / "a socket"
    tcp, port = tcp_listener()
    # Two engines, as each has one taker of events.
    with ExitStack() as stack:
        images = []
        for listener in (unix_listener(path), tcp):
            engine = stack.enter_context(Engine())
            images.append(stack.enter_context(opened_bytes(engine, layer)).image)
            stack.enter_context(served(engine, images[-1], listener, name=EXPORT))
        uris = unix_uri(str(path), EXPORT), tcp_uri("127.0.0.1", port, EXPORT)
        yield Bench(images[0], raw, disk, *uris)


@pytest.fixture(params=["unix", "tcp"])
def uri(request: pytest.FixtureRequest, bench: Bench) -> str:
    found: str = getattr(bench, request.param)
    return found


def run(*command: str | Path, stdin: str | None = None) -> str:
    """A client that must succeed; its output."""
    # nbdsh runs the first python3 on PATH, and only Debian's own has libnbd.
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(part) for part in command], input=stdin, env=environment, capture_output=True, text=True, timeout=WAIT
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


def nbdsh(script: str, **values: object) -> str:
    """Run a script in nbdsh, with these variables set; its output."""
    preamble = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return run("/usr/bin/nbdsh", "-c", "-", stdin=preamble + script)


def test_nbdinfo_describes_the_export(bench: Bench, uri: str) -> None:
    for asked in (uri, uri.replace(quote(EXPORT, safe=""), "")):
        described = json.loads(run("nbdinfo", "--json", asked))
        assert described["protocol"] == "newstyle-fixed"
        assert described["structured"]
        [export] = described["exports"]
        assert export["export-size"] == DISK
        assert export["is_read_only"]
        assert export["can_multi_conn"]
        assert export["can_df"]
        assert not export["can_flush"]
        assert not export["can_trim"]
        assert export["contexts"] == ["base:allocation"]
        assert export["block_size_maximum"] == 32 << 20
    [export] = json.loads(run("nbdinfo", "--list", "--json", uri))["exports"]
    assert export["export-name"] == EXPORT


def test_nbdcopy_reads_the_disk(bench: Bench, uri: str, tmp_path: Path) -> None:
    run("nbdcopy", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bench.disk


def test_qemu_img_finds_the_disk_equal(bench: Bench, uri: str, tmp_path: Path) -> None:
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", bench.raw, uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bench.disk


def joined(extents: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Offset, length, stored; neighbours that are alike made one."""
    out: list[tuple[int, int, bool]] = []
    for offset, length, stored in extents:
        if out and out[-1][2] == stored:
            offset, length = out[-1][0], out.pop()[1] + length
        out.append((offset, length, stored))
    return out


def map_of(image: Image) -> list[tuple[int, int, bool]]:
    runs, at = [], 0
    while at < image.size:
        runs += image.runs(at, image.size - at)
        at = runs[-1].offset + runs[-1].length
    return joined([(run.offset, run.length, run.kind is RunKind.DATA) for run in runs])


def test_maps_tell_data_from_holes(bench: Bench, uri: str) -> None:
    expected = map_of(bench.image)
    assert len(expected) > 50
    listed = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert {(extent["type"], extent["description"]) for extent in listed} == {(0, "data"), (3, "hole,zero")}
    assert joined([(extent["offset"], extent["length"], not extent["type"]) for extent in listed]) == expected
    listed = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert joined([(extent["start"], extent["length"], extent["data"]) for extent in listed]) == expected


def test_fio_reads_at_random_without_errors(uri: str) -> None:
    job = ("--name=r", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bsrange=512-256k", "--blockalign=512")
    out = run("fio", *job, "--iodepth=32", f"--size={DISK}", "--io_size=64m", "--output-format=json")
    [result] = json.loads(out[out.index("{") :])["jobs"]
    assert result["error"] == 0
    assert result["read"]["io_bytes"] >= 64 << 20


def test_eight_connections_agree_with_the_raw_disk(bench: Bench, uri: str) -> None:
    out = nbdsh(
        """
import random, threading

raw = open(path, "rb").read()
checked = [0] * 8

def work(which):
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    noise = random.Random(which)
    for round in range(40):
        asked = []
        for _ in range(16):
            length = min(noise.choice([1, 511, 4096, 65536, 300000]), len(raw))
            offset = noise.randrange(len(raw) - length + 1)
            buffer = nbd.Buffer(length)
            asked.append((handle.aio_pread(buffer, offset), buffer, offset))
        for cookie, buffer, offset in asked:
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
            content = buffer.to_bytearray()
            assert content == raw[offset : offset + len(content)], (which, offset, len(content))
            checked[which] += 1
    handle.shutdown()

threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(checked))
""",
        uri=uri,
        path=str(bench.raw),
    )
    assert int(out) == 8 * 40 * 16


def test_writes_are_refused_and_reads_go_on(bench: Bench, uri: str) -> None:
    out = nbdsh(
        """
import errno
h.set_strict_mode(0)
h.connect_uri(uri)
for change in (
    lambda: h.pwrite(b"x" * 1000000, 4096), lambda: h.pwrite(b"x", 0, nbd.CMD_FLAG_FUA),
    lambda: h.trim(4096, 0), lambda: h.zero(4096, 0),
):
    try:
        change()
    except nbd.Error as error:
        print(error.errno)
h.flush()
assert h.pread(4096, 4096) == open(path, "rb").read()[4096:8192]
""",
        uri=uri,
        path=str(bench.raw),
    )
    assert out.split() == ["EPERM"] * 4


def test_plain_clients_are_served_too(bench: Bench, uri: str) -> None:
    """Without structured replies, without the fixed newstyle, and with 124 zeroes."""
    nbdsh(
        """
raw = open(path, "rb").read()
for flags in (3, 1, 0):
    h = nbd.NBD()
    h.set_request_structured_replies(False)
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    assert h.get_size() == len(raw) and h.is_read_only() and not h.can_df()
    assert h.pread(100000, 123) == raw[123:100123]
    h.shutdown()
""",
        uri=uri,
        path=str(bench.raw),
    )


def test_addresses_past_2_tib() -> None:
    layer = (fixtures.DATA / "huge-4t.lsmt").read_bytes()
    tib = 1 << 40
    listener, port = tcp_listener()
    with Engine() as engine, opened_bytes(engine, layer) as image, served(engine, image.image, listener):
        listed = json.loads(run("nbdinfo", "--map", "--json", tcp_uri("127.0.0.1", port)))
        stored = [(extent["offset"], extent["length"]) for extent in listed if not extent["type"]]
        assert stored == [(0, 512), (3 * tib + 4096, 4096), (4 * tib - 512, 512)]
        out = nbdsh(
            "h.connect_uri(uri)\nfor o, l in places: print(bytes(h.pread(l, o)).hex())",
            uri=tcp_uri("127.0.0.1", port),
            places=[*stored, (2 * tib, 512)],
        )
        read = [bytes.fromhex(line) for line in out.split()]
        assert read == [image.read_at(*place) for place in [*stored, (2 * tib, 512)]]


@contextmanager
def fetching(engine: Engine, disk: bytes) -> Iterator[list[int]]:
    """Somebody who answers the engine's misses from `disk`; lists the lengths."""
    lengths: list[int] = []

    def answer() -> None:
        while True:
            try:
                fetch = engine.next_fetch(Priority.BULK, timeout=WAIT)
            except EngineStopped:
                return
            if fetch:
                fetch.buffer[:] = disk[fetch.offset : fetch.offset + fetch.length]
                fetch.advance(fetch.length)
                lengths.append(fetch.length)
                fetch.finish()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield lengths
    finally:
        engine.stop()
        thread.join()


def test_a_cold_image_is_read_right_and_fetched_once(bench: Bench, tmp_path: Path) -> None:
    listener = unix_listener(tmp_path / "s")
    with ExitStack() as stack:
        engine = stack.enter_context(Engine())
        fds = [os.memfd_create(name) for name in ("data", "map")]
        policy = Policy("retry", WAIT)
        blob = stack.enter_context(engine.open_cached(*fds, id=1, size=DISK, table_offset=4096, policy=policy))
        file = stack.enter_context(blob.open_raw(0, DISK))
        for fd in fds:
            os.close(fd)
        image = stack.enter_context(engine.open_image([LayerTable(LayerKind.FLAT, file, file)], DISK))
        lengths = stack.enter_context(fetching(engine, bench.disk))
        stack.enter_context(served(engine, image, listener))
        run("nbdcopy", unix_uri(str(tmp_path / "s")), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == bench.disk
        assert sum(lengths) == DISK
