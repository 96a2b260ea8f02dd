# SPDX-License-Identifier: Apache-2.0
"""Rows of an empty root, whose bytes come over the network: the clock judges."""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import requests

from tools import bench_clients as clients
from tools.bench_content import MIB
from tools.bench_ground import Ground
from tools.bench_measure import Bar, Row, Sample, contest
from tools.bench_network import Link, link, range_log, static
from tools.bench_servers import Ociblk, Served, nbdkit

CODEC = "lz4"
OURS = "ociblk lz4"
PAGE = 4096
WINDOW = 512 << 10  # one cold read in each, so that hardly two meet in one 64 KiB extent of the blob
SEED = 4
GIGABIT = 125e6  # bytes a second
PARALLEL = (1, 2, 4, 8)  # curl's ranges for each blob
RSS_MAX_MIB = 256.0


# ---- single misses ------------------------------------------------------------------------------


def _offsets(ground: Ground) -> list[int]:
    """Offsets of 4 KiB reads, in random order, that all need bytes nobody has read yet."""
    rng, offsets = random.Random(SEED), []
    with ground.content.raw.open("rb") as disk:
        for window in range(0, ground.content.size - WINDOW + 1, WINDOW):
            offset = window + rng.randrange(WINDOW // PAGE) * PAGE
            disk.seek(offset)
            if any(disk.read(PAGE)):
                offsets.append(offset)
    rng.shuffle(offsets)
    return offsets[: ground.settings.misses]


def _wanted(ground: Ground, offsets: list[int]) -> tuple[Path, int]:
    """The ranges ours asks for when it reads these, one after the other, as a list for http_ranges."""
    with range_log(ground.folder / "ranges", ground.registry) as log, ground.cold(CODEC, log.host) as served:
        log.restart()
        clients.reads_at(served, offsets, 1)
        ranges = log.ranges()
    path = ground.folder / "wanted"
    lines = [f"{first}-{last} {ground.registry.blob_url(digest)}\n" for digest, first, last in ranges]
    path.write_text("".join(lines))
    return path, len(lines)


def miss_1(ground: Ground) -> Iterator[Row]:
    offsets = _offsets(ground)
    wanted, count = _wanted(ground, offsets)

    def ours() -> Sample:
        with ground.cold(CODEC) as served:
            cpu = served.cpu_seconds()
            answers = clients.reads_at(served, offsets, 1)
            cpu = served.cpu_seconds() - cpu
        return Sample(statistics.median(answers.microseconds) / 1000, cpu * 1e6 / len(offsets))

    def peer() -> Sample:
        return Sample(statistics.median(clients.http_ranges(wanted, 1).microseconds) / 1000)

    yield Row(
        "cold 4 KiB random reads from docker-registry, depth 1, p50",
        "ms",
        "CPU us/read",
        contest(ground.settings.rounds, {OURS: ours, "kept libcurl handle": peer}),
        [Bar(OURS, "kept libcurl handle", at_most=1.3)],
        [f"{len(offsets)} reads, for which ours asks {count} ranges; the peer asks for the same"],
    )


def miss_16(ground: Ground) -> Iterator[Row]:
    offsets = _offsets(ground)
    wanted, count = _wanted(ground, offsets)
    asked: list[int] = []

    def ours() -> Sample:
        with ground.cold(CODEC) as served:
            cpu, before = served.cpu_seconds(), ground.registry.blob_requests()
            seconds = clients.reads_at(served, offsets, 16).seconds
            asked.append(ground.registry.blob_requests() - before)
            cpu = served.cpu_seconds() - cpu
        return Sample(count / seconds, cpu * 1e6 / len(offsets))

    def peer() -> Sample:
        return Sample(count / clients.http_ranges(wanted, 16).seconds)

    yield Row(
        "cold 4 KiB random reads from docker-registry, depth 16: ranges a second",
        "ranges/s",
        "CPU us/read",
        contest(ground.settings.rounds, {OURS: ours, "16 kept libcurl handles": peer}),
        [Bar(OURS, "16 kept libcurl handles", at_least=0.9)],
        [
            f"{len(offsets)} reads need {count} ranges one by one; ours asked {statistics.median(asked):.0f} times, "
            f"and is given the {count} as its figure"
        ],
    )


# ---- sequential, over a slow link -----------------------------------------------------------------


def _curl_blobs(ground: Ground, host: str, parallel: int, folder: Path | None) -> None:
    """All layers' blobs, each in so many ranges at once; to files, or to nowhere."""
    config: list[str] = []
    for number, layer in enumerate(ground.registry.layers(CODEC)):
        size = int(str(layer["size"]))
        url = ground.registry.blob_url(layer["digest"]).replace(ground.registry.host, host)
        for part in range(parallel):
            first, last = size * part // parallel, size * (part + 1) // parallel - 1
            output = folder / f"{number}.{part}" if folder else Path("/dev/null")
            config += [f'url = "{url}"', f'output = "{output}"', f'range = "{first}-{last}"', "next"]
    command = ["curl", "--fail-early", "--parallel", "--parallel-immediate", "--parallel-max", "64", "-K", "-"]
    # What stands before a "next" is said of one transfer only.
    text = "\n".join(["fail", "no-progress-meter", *config[:-1]]).replace("next", "next\nfail\nno-progress-meter")
    subprocess.run(command, check=True, input=text, text=True)


def _round_trip(slow: Link) -> float:
    """Milliseconds of a small request on a connection that is open."""
    with requests.Session() as session:
        times = []
        for _ in range(6):
            start = time.monotonic()
            session.get(f"http://{slow.host}/v2/", timeout=60).raise_for_status()
            times.append((time.monotonic() - start) * 1000)
    return statistics.median(times[1:])


def _link_row(ground: Ground, round_trip: float, at_least: float) -> Iterator[Row]:
    blob_bytes = sum(int(str(layer["size"])) for layer in ground.registry.layers(CODEC))
    size = ground.content.size
    fetched: list[int] = []
    with ExitStack() as stack:
        host = stack.enter_context(static(ground.folder / "static", ground.registry, [CODEC]))
        slow = stack.enter_context(link(ground.folder, host, round_trip / 2, GIGABIT))
        measured_ms = _round_trip(slow)

        def share(served: Served, read: Callable[[Served, int], object]) -> Sample:
            start, cpu = time.monotonic(), served.cpu_seconds()
            read(served, size)
            sample = Sample(slow.share(start), (served.cpu_seconds() - cpu) * (1 << 30) / blob_bytes)
            fetched.append(slow.carried(start, time.monotonic()))
            return sample

        def nbd() -> Sample:
            with ground.cold(CODEC, slow.host) as served:
                return share(served, clients.nbdcopy)

        def fuse() -> Sample:
            file = ground.folder / "cold.disk"
            with ground.empty() as root, root.mount_raw(ground.reference(CODEC, slow.host), file) as served:
                return share(served, clients.copy_file)

        def curl() -> Sample:
            start = time.monotonic()
            _curl_blobs(ground, slow.host, 4, None)
            return Sample(slow.share(start))

        nbd_reader, fuse_reader, plain = "ociblk lz4, nbdcopy", "ociblk lz4, FUSE file, dd", "curl, 4 ranges a blob"
        contestants = {nbd_reader: nbd, fuse_reader: fuse, plain: curl}
        yield Row(
            f"cold, in sequence, through {round_trip:g} ms RTT at 1 Gbit/s: share of the link after the first second",
            "%",
            "CPU s/GiB fetched",
            contest(ground.settings.rounds, contestants),
            [
                Bar(nbd_reader, at_least=at_least),
                Bar(fuse_reader, at_least=at_least),
                Bar(plain, at_least=97.0),
            ],
            [
                f"the link's round trip was measured as {measured_ms:.1f} ms; behind it nginx serves what "
                f"docker-registry has stored ({blob_bytes / 1e6:.0f} MB in three blobs)",
                f"ours fetched {min(fetched) / blob_bytes:.3f} to {max(fetched) / blob_bytes:.3f} of that",
            ],
        )


def link_20ms(ground: Ground) -> Iterator[Row]:
    yield from _link_row(ground, 20.0, 85.0)


def link_100ms(ground: Ground) -> Iterator[Row]:
    yield from _link_row(ground, 100.0, 75.0)


# ---- everything ---------------------------------------------------------------------------------


def _peak_rss(pid: int) -> float:
    """MiB a process has ever had in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmHWM")


def pull(ground: Ground) -> Iterator[Row]:
    blob_bytes = sum(int(str(layer["size"])) for layer in ground.registry.layers(CODEC))
    rss: list[Sample] = []

    def ours(before: Callable[[Ociblk], object]) -> Sample:
        with ground.empty() as root:
            before(root)
            start = time.monotonic()
            root.run("pull", ground.reference(CODEC), "--complete")
            seconds = time.monotonic() - start
            rss.append(Sample(_peak_rss(root.owner())))
        return Sample(blob_bytes / seconds / 1e6)

    def curl(parallel: int) -> Sample:
        folder = ground.folder / "curl"
        folder.mkdir()
        try:
            start = time.monotonic()
            _curl_blobs(ground, ground.registry.host, parallel, folder)
            sums = [
                subprocess.Popen(f"cat {folder}/{number}.* | sha256sum", shell=True, stdout=subprocess.DEVNULL)
                for number in range(len(ground.registry.layers(CODEC)))
            ]
            for process in sums:
                if process.wait():
                    raise RuntimeError("sha256sum failed")
            return Sample(blob_bytes / (time.monotonic() - start) / 1e6)
        finally:
            shutil.rmtree(folder)

    peers: dict[str, Callable[[], Sample]] = {
        f"curl, {parallel} ranges a blob, sha256sum": lambda parallel=parallel: curl(parallel)  # type: ignore[misc]
        for parallel in PARALLEL
    }
    pulls: dict[str, Callable[[], Sample]] = {
        "ociblk pull": lambda: ours(lambda root: root.run("cache", "stat")),  # which starts the owner
        "ociblk pull, and start of the owner": lambda: ours(lambda root: None),
    }
    row = Row("pull --complete from docker-registry", "MB/s")
    row.samples = contest(ground.settings.rounds, pulls | peers)
    row.bars = [Bar("ociblk pull", row.best(list(peers)), at_least=0.9)]
    row.remarks = [f"{blob_bytes / 1e6:.0f} MB, from the command's start to its end; curl's best counts"]
    yield row
    yield Row(
        "pull --complete: the owner's peak of resident memory",
        "MiB",
        samples={"ociblk pull": rss},
        bars=[Bar("ociblk pull", at_most=RSS_MAX_MIB)],
        remarks=[f"image of {ground.content.size // MIB} MiB"],
    )


# ---- the first read -------------------------------------------------------------------------------


def first_read(ground: Ground) -> Iterator[Row]:
    """From the command's start to the first 4 KiB."""

    def empty_root() -> Sample:
        start = time.monotonic()
        with ground.cold(CODEC) as served:
            clients.first_read(served)
            return Sample((time.monotonic() - start) * 1000)

    def full_root() -> Sample:
        start = time.monotonic()
        with ground.warm(CODEC) as served:
            clients.first_read(served)
            return Sample((time.monotonic() - start) * 1000)

    def peer() -> Sample:
        start = time.monotonic()
        with nbdkit(ground.folder, "file", str(ground.content.raw)) as served:
            clients.first_read(served)
            return Sample((time.monotonic() - start) * 1000)

    with ground.warm("zstd"):  # keeps the owner of the full root running
        yield Row(
            "from the command to the first 4 KiB over NBD",
            "ms",
            samples=contest(
                ground.settings.rounds,
                {
                    "ociblk, empty root, no owner": empty_root,
                    "ociblk, full root, owner runs": full_root,
                    "nbdkit file, raw": peer,
                },
            ),
        )
