# SPDX-License-Identifier: Apache-2.0
"""Measures and prints every row; tools/bench starts it.

A row is one way of reading, done by several servers on the same content. The servers
take turns within each round, so that whatever else the machine does falls on all of
them, and the median of the rounds counts. Beside the figure stands what it cost the
serving processes in processor seconds per GiB read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.machine import machine
from tools import bench_clients as clients
from tools.bench_content import Content, make_content, sha256_file
from tools.bench_servers import Ociblk, Served, link, nbdfuse, nbdkit, qemu_nbd, registry

ROOT = Path(__file__).parent.parent
COMMAND = str(ROOT / ".venv" / "bin" / "ociblk")
GIB = 1 << 30
MIB = 1 << 20
LINKS = {"25 ms, 100 Mbit/s": (25.0, 12.5e6), "1 ms, 1 Gbit/s": (1.0, 125e6)}
LINK_BYTES = 64 * MIB  # of the disk that is read over a slow link


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    size: int
    rounds: int
    runtime: float  # seconds of each random-read sample


SMALL = Settings(size=128 * MIB, rounds=3, runtime=1.0)
FULL = Settings(size=1024 * MIB, rounds=5, runtime=5.0)


@dataclass(frozen=True)
class Sample:
    """One measurement: the figure, and processor seconds per GiB if they are known."""

    value: float
    cpu_per_gib: float | None = None


Reader = Callable[[], Sample]


@dataclass
class Row:
    """One way of reading, by every server that took part."""

    name: str
    unit: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def lower_is_better(self) -> bool:
        return self.unit in {"ms", "requests"}

    def median(self, server: str) -> float:
        return statistics.median(sample.value for sample in self.samples[server])

    def cpu(self, server: str) -> float | None:
        known = [sample.cpu_per_gib for sample in self.samples[server] if sample.cpu_per_gib is not None]
        return statistics.median(known) if known else None

    def print(self) -> None:
        """The row as lines: figure, cost, and ours over each peer (> 1: ours is better)."""
        print(f"\n{self.name} [{self.unit}]")
        peers = [name for name in self.samples if not name.startswith("ociblk")]
        for server in self.samples:
            cpu = self.cpu(server)
            line = f"  {server:<30} {self.median(server):>12,.1f}"
            line += f"   {cpu:6.2f} CPU s/GiB" if cpu is not None else " " * 20
            if server not in peers:
                line += "".join(f"   {self.ratio(server, peer):5.2f} x {peer}" for peer in peers)
            print(line, flush=True)

    def ratio(self, ours: str, peer: str) -> float:
        quotient = self.median(ours) / self.median(peer)
        return 1 / quotient if self.lower_is_better else quotient

    def record(self) -> dict[str, object]:
        servers = {
            server: {
                "median": self.median(server),
                "cpu_seconds_per_gib": self.cpu(server),
                "samples": [sample.value for sample in samples],
            }
            for server, samples in self.samples.items()
        }
        return {"name": self.name, "unit": self.unit, "servers": servers}


def measure(name: str, unit: str, rounds: int, readers: dict[str, Reader]) -> Row:
    """Let every reader read once per round, in turns."""
    row = Row(name, unit, {server: [] for server in readers})
    for _ in range(rounds):
        for server, reader in readers.items():
            row.samples[server].append(reader())
    row.print()
    return row


def sequential(served: Served, read: Callable[[Served], float], size: int) -> Sample:
    """MB/s of one pass over `size` bytes."""
    before = served.cpu_seconds()
    seconds = read(served)
    return Sample(size / seconds / 1e6, (served.cpu_seconds() - before) * GIB / size)


def random_reads(served: Served, read: Callable[[], dict[str, float]]) -> Sample:
    before = served.cpu_seconds()
    result = read()
    return Sample(result["iops"], (served.cpu_seconds() - before) * GIB / result["bytes"])


@dataclass(frozen=True)
class Bench:
    """What all groups of rows share."""

    settings: Settings
    content: Content
    folder: Path
    pusher: Ociblk  # its root holds every blob
    registry: str
    access: Path

    def reference(self, codec: str, host: str | None = None) -> str:
        return f"{host or self.registry}/bench/disk:{codec}"

    # ---- warm: everything is in the cache ---------------------------------------------

    def warm_nbd(self) -> Iterator[Row]:
        settings, size = self.settings, self.settings.size
        with ExitStack() as stack:
            servers = {
                f"ociblk {codec}": stack.enter_context(
                    self.pusher.serve(self.reference(codec), self.folder / f"{codec}.sock")
                )
                for codec in self.content.layers
            }
            servers["nbdkit file"] = stack.enter_context(nbdkit(self.folder, "file", str(self.content.raw)))
            servers["qemu-nbd qcow2 zstd"] = stack.enter_context(qemu_nbd(self.folder, self.content.qcow2))
            for served in servers.values():
                clients.nbdcopy(served)
            yield measure(
                "warm, NBD, nbdcopy",
                "MB/s",
                settings.rounds,
                {name: lambda s=s: sequential(s, clients.nbdcopy, size) for name, s in servers.items()},
            )
            for depth in (1, 16):
                yield measure(
                    f"warm, NBD, fio 4k random reads, depth {depth}",
                    "IOPS",
                    settings.rounds,
                    {
                        name: lambda s=s, d=depth: random_reads(
                            s, lambda: clients.fio_nbd(s, size, d, settings.runtime)
                        )
                        for name, s in servers.items()
                    },
                )

    def warm_fuse(self) -> Iterator[Row]:
        settings, size = self.settings, self.settings.size
        with ExitStack() as stack:
            servers = {
                f"ociblk {codec}": stack.enter_context(
                    self.pusher.mount_raw(self.reference(codec), self.folder / f"{codec}.disk")
                )
                for codec in self.content.layers
            }
            behind = stack.enter_context(nbdkit(self.folder, "file", str(self.content.raw)))
            servers["nbdfuse + nbdkit file"] = stack.enter_context(nbdfuse(self.folder, behind.address, behind))
            for served in servers.values():
                clients.fio_file_sequential(served)
            yield measure(
                "warm, FUSE file, fio 1M reads",
                "MB/s",
                settings.rounds,
                {
                    name: lambda s=s: sequential(s, lambda it: clients.fio_file_sequential(it)["seconds"], size)
                    for name, s in servers.items()
                },
            )
            for depth in (1, 16):
                yield measure(
                    f"warm, FUSE file, fio 4k random reads, depth {depth}",
                    "IOPS",
                    settings.rounds,
                    {
                        name: lambda s=s, d=depth: random_reads(s, lambda: clients.fio_file(s, d, settings.runtime))
                        for name, s in servers.items()
                    },
                )

    # ---- cold: an empty root, bytes come from the registry ---------------------------------

    def cold(self, where: str, host: str, size: int, url: str) -> Iterator[Row]:
        """An empty root each time, against nbdkit's curl plugin on the raw disk as a blob."""
        requests_made: dict[str, list[Sample]] = {}

        def ours(codec: str) -> Sample:
            cold = Ociblk(COMMAND, self.folder / "cold")
            self.access.write_text("")
            try:
                with cold.serve(self.reference(codec, host), self.folder / "cold.sock") as served:
                    sample = sequential(served, lambda it: self._read_first(it, size), size)
            finally:
                cold.wipe()
            requests_made.setdefault(f"ociblk {codec}", []).append(Sample(self._blob_requests()))
            return sample

        def peer() -> Sample:
            self.access.write_text("")
            with nbdkit(self.folder, "curl", url, "protocols=http") as served:
                sample = sequential(served, lambda it: self._read_first(it, size), size)
            requests_made.setdefault("nbdkit curl, raw blob", []).append(Sample(self._blob_requests()))
            return sample

        readers: dict[str, Reader] = {f"ociblk {codec}": lambda c=codec: ours(c) for codec in ("lz4", "zstd")}
        readers["nbdkit curl, raw blob"] = peer
        yield measure(f"cold, NBD, {where}, {size // MIB} MiB sequential", "MB/s", self.settings.rounds, readers)
        row = Row(f"cold, NBD, {where}: blob requests for that", "requests", requests_made)
        row.print()
        yield row

    def _read_first(self, served: Served, size: int) -> float:
        """Seconds for the first `size` bytes, in 256 KiB reads, eight at a time."""
        return clients.fio_nbd_sequential(served, size)["seconds"]

    def _blob_requests(self) -> int:
        return sum(1 for line in self.access.read_text().splitlines() if '"GET ' in line and "/blobs/" in line)

    def first_read(self) -> Iterator[Row]:
        """From the command's start to the first 4 KiB, with an empty root and with a full one."""

        def once(who: Ociblk) -> Sample:
            start = time.monotonic()
            with who.serve(self.reference("lz4"), self.folder / "first.sock") as served:
                clients.first_read(served)
                return Sample((time.monotonic() - start) * 1000)

        def cold() -> Sample:
            empty = Ociblk(COMMAND, self.folder / "cold")
            try:
                return once(empty)
            finally:
                empty.wipe()

        def peer() -> Sample:
            start = time.monotonic()
            with nbdkit(self.folder, "file", str(self.content.raw)) as served:
                clients.first_read(served)
                return Sample((time.monotonic() - start) * 1000)

        readers = {
            "ociblk, empty root, no owner": cold,
            "ociblk, full root, owner runs": lambda: once(self.pusher),
            "nbdkit file": peer,
        }
        yield measure("from the command to the first 4 KiB over NBD", "ms", self.settings.rounds, readers)


def in_process() -> Iterator[Row]:
    """The figures of tests/bench, which read through the engine without any transport."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        command = [ROOT / ".venv/bin/pytest", "tests/bench", "-q", "--benchmark-enable", f"--benchmark-json={report}"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        measured = json.loads(report.read_text())["benchmarks"]
    for bench in measured:
        bytes_read = bench["extra_info"]["bytes"]
        samples = [Sample(bytes_read / second / 1e6) for second in bench["stats"]["data"]]
        row = Row(f"warm, in process, {bench['name']}", "MB/s", {"ociblk": samples})
        row.print()
        yield row


def push_blob(host: str, path: Path, digest: str) -> str:
    """Upload a file as a blob of its own; its URL."""
    base = f"http://{host}/v2/bench/raw/blobs"
    started = requests.post(f"{base}/uploads/", timeout=60)
    started.raise_for_status()
    with path.open("rb") as body:
        location = started.headers["Location"]
        requests.put(location, params={"digest": digest}, data=body, timeout=600).raise_for_status()
    return f"{base}/{digest}"


def all_rows(bench: Bench, only: str) -> Iterator[Row]:
    settings = bench.settings
    if only in "process":
        yield from in_process()
    if only in "warm nbd":
        yield from bench.warm_nbd()
    if only in "warm fuse":
        yield from bench.warm_fuse()
    if only in "first":
        yield from bench.first_read()
    if only in "cold nbd":
        url = push_blob(bench.registry, bench.content.raw, f"sha256:{bench.content.sha256}")
        yield from bench.cold("loopback", bench.registry, min(settings.size, 256 * MIB), url)
        for name, (delay, rate) in LINKS.items():
            with link(bench.folder, bench.registry, delay, rate) as host:
                slow = url.replace(bench.registry, host)
                yield from bench.cold(name, host, min(settings.size, LINK_BYTES), slow)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="larger disk, more and longer rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="record figures and circumstances")
    parser.add_argument("--only", default="", metavar="WORD", help="process, warm, nbd, fuse, first or cold")
    options = parser.parse_args()
    settings = FULL if options.full else SMALL
    before = machine()
    print(f"kernel {before['kernel']}, {before['cpus']} x {before['cpu']}, load {before['load']}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ociblk-bench.")))
        content = make_content(folder, settings.size, COMMAND)
        host, access = stack.enter_context(registry(folder))
        pusher = Ociblk(COMMAND, folder / "pusher")
        stack.callback(pusher.wipe)
        bench = Bench(settings, content, folder, pusher, host, access)
        for codec, layer in content.layers.items():
            pusher.run("push", layer, bench.reference(codec))
        rows = [row.record() for row in all_rows(bench, options.only)]
        layers = {codec: sha256_file(path) for codec, path in content.layers.items()}
    if options.json:
        record = {
            "v": 1,
            "machine": before,
            "load_after": machine()["load"],
            "full": options.full,
            "disk": {"bytes": content.size, "sha256": content.sha256},
            "layers": layers,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
