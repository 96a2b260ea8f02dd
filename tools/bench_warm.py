# SPDX-License-Identifier: Apache-2.0
"""Rows of computation: everything is in the cache, or on the disk; processor time judges."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tools import bench_clients as clients
from tools.bench_clients import Reading
from tools.bench_content import MIB
from tools.bench_ground import COMMAND, Ground
from tools.bench_measure import Bar, Judge, Row, Sample, contest
from tools.bench_programs import program
from tools.bench_servers import Served, loop_mount, nbdfuse, nbdkit, qemu_nbd

GIB = 1 << 30
IN_MEMORY = 512  # MiB of the disk that bench_read holds: plain, and compressed
NBDKIT, QEMU, NBDFUSE = "nbdkit file, raw", "qemu-nbd, qcow2 zstd", "nbdkit + nbdfuse, raw"
OURS = "ociblk lz4"
CPU_PER_BYTES, CPU_PER_READ = "CPU s/GiB", "CPU us/read"

Reader = Callable[[Served], Reading]


def _sequential(served: Served, read: Reader) -> Sample:
    before = served.cpu_seconds()
    reading = read(served)
    return Sample(reading.bytes / reading.seconds / 1e6, (served.cpu_seconds() - before) * GIB / reading.bytes)


def _random(served: Served, read: Reader) -> Sample:
    before = served.cpu_seconds()
    reading = read(served)
    return Sample(reading.reads / reading.seconds, (served.cpu_seconds() - before) * 1e6 / reading.reads)


def _turns(
    sample: Callable[[Served, Reader], Sample], servers: dict[str, Served], read: Reader
) -> dict[str, Callable[[], Sample]]:
    return {name: lambda served=served: sample(served, read) for name, served in servers.items()}  # type: ignore[misc]


def _sequential_row(ground: Ground, name: str, servers: dict[str, Served], read: Reader, bars: list[Bar]) -> Row:
    for served in servers.values():
        read(served)
    samples = contest(ground.settings.rounds, _turns(_sequential, servers, read))
    return Row(name, "MB/s", CPU_PER_BYTES, samples, bars)


def _random_row(ground: Ground, name: str, servers: dict[str, Served], read: Reader, bars: list[Bar]) -> Row:
    samples = contest(ground.settings.rounds, _turns(_random, servers, read))
    return Row(name, "reads/s", CPU_PER_READ, samples, bars)


# ---- NBD --------------------------------------------------------------------------------------


def _nbd_servers(ground: Ground, stack: ExitStack) -> dict[str, Served]:
    folder, content = ground.folder, ground.content
    return {
        OURS: stack.enter_context(ground.warm("lz4")),
        "ociblk zstd": stack.enter_context(ground.warm("zstd")),
        NBDKIT: stack.enter_context(nbdkit(folder, "file", str(content.raw))),
        QEMU: stack.enter_context(qemu_nbd(folder, content.qcow2)),
    }


def nbd_sequential(ground: Ground) -> Iterator[Row]:
    size = ground.content.size
    bars = [Bar(OURS, NBDKIT, at_least=0.65, by="cpu"), Bar(OURS, QEMU, at_least=3.0, by="cpu")]
    with ExitStack() as stack:
        servers = _nbd_servers(ground, stack)
        yield _sequential_row(ground, "NBD, nbdcopy", servers, lambda served: clients.nbdcopy(served, size), bars)


def _nbd_random(ground: Ground, depth: int, bars: list[Bar]) -> Iterator[Row]:
    settings, size = ground.settings, ground.content.size
    with ExitStack() as stack:
        servers = _nbd_servers(ground, stack)
        for served in servers.values():
            clients.nbdcopy(served, size)
        yield _random_row(
            ground,
            f"NBD, fio 4 KiB random reads, depth {depth}",
            servers,
            lambda served: clients.random_nbd(served, size, depth, settings.runtime),
            bars,
        )


def nbd_random_1(ground: Ground) -> Iterator[Row]:
    yield from _nbd_random(ground, 1, [Bar(OURS, NBDKIT, at_least=0.75, by="cpu")])


def nbd_random_16(ground: Ground) -> Iterator[Row]:
    bars = [Bar(OURS, NBDKIT, at_least=1.0, by="cpu"), Bar(OURS, QEMU, at_least=6.0, by="cpu")]
    yield from _nbd_random(ground, 16, bars)


# ---- FUSE -------------------------------------------------------------------------------------

FUSE_BAR = Bar(OURS, NBDFUSE, at_least=1.0, by="cpu")


def _fuse_rows(
    ground: Ground, where: str, servers: dict[str, Served], names: Callable[[Served], Sequence[str | Path]]
) -> Iterator[Row]:
    runtime = ground.settings.runtime
    yield _sequential_row(
        ground,
        f"{where}, fio 1 MiB sequential reads, direct",
        servers,
        lambda served: clients.sequential_files(names(served)),
        [FUSE_BAR],
    )
    for depth in (1, 16):
        yield _random_row(
            ground,
            f"{where}, fio 4 KiB random reads, direct, depth {depth}",
            servers,
            lambda served, depth=depth: clients.random_files(names(served), depth, runtime),  # type: ignore[misc]
            [FUSE_BAR],
        )


def fuse_file(ground: Ground) -> Iterator[Row]:
    with ExitStack() as stack:
        raw = stack.enter_context(nbdkit(ground.folder, "file", str(ground.content.raw)))
        servers = {
            OURS: stack.enter_context(ground.full.mount_raw(ground.reference("lz4"), ground.folder / "disk")),
            NBDFUSE: stack.enter_context(nbdfuse(ground.folder, raw.address, raw)),
        }
        yield from _fuse_rows(ground, "FUSE file", servers, lambda served: [served.address])


def fuse_mount(ground: Ground) -> Iterator[Row]:
    def names(served: Served) -> list[Path]:
        return [Path(served.address) / name for name in ground.content.large_files]

    with ExitStack() as stack:
        raw = stack.enter_context(nbdkit(ground.folder, "file", str(ground.content.raw)))
        file = stack.enter_context(nbdfuse(ground.folder, raw.address, raw))
        servers = {
            OURS: stack.enter_context(ground.full.mount(ground.reference("lz4"), ground.folder / "mounted")),
            NBDFUSE: stack.enter_context(loop_mount(file, ground.folder / "mounted-peer")),
        }
        for row in _fuse_rows(ground, "ext4 on a loop device on the FUSE file", servers, names):
            row.remarks.append("the loop devices' kernel threads belong to no server and are counted for none")
            yield row


# ---- in process ---------------------------------------------------------------------------------


def process(ground: Ground) -> Iterator[Row]:
    """tests/bench/bench_read.c: the engine against a bare loop, without any transport."""
    command = [program("bench_read"), ground.content.raw, "--json", "--dir", ground.folder]
    command += ["--rounds", str(ground.settings.rounds), "--mib", str(IN_MEMORY)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for cell in map(json.loads, output.splitlines()):
        sequential = cell["read"] == "sequential"
        scale = 1e-6 if sequential else 1.0
        bare = [cell["bare"], *cell["bare_range"]]
        threads = "one thread" if cell["threads"] == 1 else f"{cell['threads']} threads"
        row = Row(
            f"in process, {cell['codec']} {cell['block'] // 1024} KiB, "
            f"{'1 MiB sequential' if sequential else '4 KiB random'}, {threads}",
            "MB/s" if sequential else "ns",
            clock="CPU time",
            samples={
                "ociblk": [Sample(cell["ours"] * scale)],
                "bare loop": [Sample(figure * scale) for figure in bare],
            },
        )
        if sequential:
            row.bars.append(Bar("ociblk", "bare loop", at_least=0.9))
        else:
            row.bars.append(Bar("ociblk", "bare loop", at_most=1.3))
        row.remarks.append(
            "figures are of the reading threads' CPU time; of the loop: its median, slowest and fastest round"
        )
        yield row


# ---- import -------------------------------------------------------------------------------------


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _import(ground: Ground, jobs: int) -> Sample:
    size, output = ground.content.size, ground.folder / "imported"
    command = [COMMAND, "import", ground.content.raw, "-o", output, "--codec", "lz4", "--jobs", str(jobs)]
    start, before = time.monotonic(), _children_cpu()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, cpu = time.monotonic() - start, _children_cpu() - before
    output.unlink()
    return Sample(size / seconds / 1e6, cpu * GIB / size)


def _bare_compress(ground: Ground, threads: int, *outputs: Path) -> Sample:
    command = [program("bare_compress"), ground.content.raw, str(threads), *outputs]
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return Sample(ground.content.size / made["seconds"] / 1e6, made["cpu"] * GIB / ground.content.size)


def import_disk(ground: Ground) -> Iterator[Row]:
    judges: tuple[Judge, ...] = ("cpu", "clock")
    for jobs in (1, 2):
        ours, rival = f"ociblk import --jobs {jobs}", f"{jobs} x bare lz4 + CRC32C, in memory"
        contestants = {
            ours: lambda jobs=jobs: _import(ground, jobs),  # type: ignore[misc]
            rival: lambda jobs=jobs: _bare_compress(ground, jobs),  # type: ignore[misc]
            f"{jobs} x the same, from file to file": lambda jobs=jobs: _bare_compress(  # type: ignore[misc]
                ground, jobs, ground.folder / "imported"
            ),
        }
        yield Row(
            f"import of {ground.content.size // MIB} MiB to lz4, jobs: {jobs}",
            "MB/s",
            CPU_PER_BYTES,
            contest(ground.settings.rounds, contestants),
            [Bar(ours, rival, at_least=0.9, by=judge) for judge in judges],
            ["ours from the command's start to its end, with reading and writing files"],
        )
