# SPDX-License-Identifier: Apache-2.0
"""The readers of a bench: foreign programs only, so that no server has its own judge."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench_programs import program
from tools.bench_servers import Served

READER = Path(__file__).parent / "bench_reader.py"
PYTHON = "/usr/bin/python3"  # Debian's own interpreter: python3-libnbd belongs to no other

FIO_OPTION_MAX = 4000  # characters of one option's value; fio has room for 4,096 with its name


@dataclass(frozen=True)
class Reading:
    """What a reader did."""

    seconds: float
    reads: float
    bytes: float


def nbdcopy(served: Served, size: int) -> Reading:
    """A whole export, as nbdcopy likes it (several connections)."""
    start = time.monotonic()
    subprocess.run(["nbdcopy", served.address, "null:"], check=True)
    return Reading(time.monotonic() - start, 0, size)


def copy_file(served: Served, size: int) -> Reading:
    """A whole file in 1 MiB reads through the page cache, one after the other."""
    start = time.monotonic()
    subprocess.run(["dd", f"if={served.address}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    return Reading(time.monotonic() - start, 0, size)


def _fio(arguments: list[str], runtime: float = 0) -> Reading:
    command = ["fio", "--name=bench", "--output-format=json", "--randrepeat=1", "--norandommap"]
    if runtime:
        command += ["--time_based", f"--runtime={runtime * 1000:.0f}ms"]
    output = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    # Engines print remarks of their own before the JSON.
    read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    return Reading(read["runtime"] / 1000, read["total_ios"], read["io_bytes"])


def random_nbd(served: Served, size: int, depth: int, runtime: float) -> Reading:
    """4 KiB random reads over one NBD connection."""
    arguments = ["--ioengine=nbd", f"--uri={served.address}", "--rw=randread", "--bs=4k"]
    return _fio([*arguments, f"--iodepth={depth}", f"--size={size}"], runtime)


def random_files(names: Sequence[str | Path], depth: int, runtime: float) -> Reading:
    """4 KiB random reads of files, past the page cache."""
    return _fio([*_files(names), "--rw=randread", "--bs=4k", f"--iodepth={depth}"], runtime)


def sequential_files(names: Sequence[str | Path]) -> Reading:
    """One pass over files in 1 MiB reads, four at a time, past the page cache."""
    return _fio([*_files(names), "--rw=read", "--bs=1m", "--iodepth=4", "--file_service_type=sequential"])


def _files(names: Sequence[str | Path]) -> list[str]:
    """As many of them, from the first on, as fio takes."""
    taken = [str(names[0])]
    for name in map(str, names[1:]):
        if len(":".join([*taken, name])) <= FIO_OPTION_MAX:
            taken.append(name)
    return ["--ioengine=libaio", f"--filename={':'.join(taken)}", "--direct=1", "--readonly"]


@dataclass(frozen=True)
class Answers:
    """Requests that were answered, each with its microseconds."""

    seconds: float
    microseconds: list[float]


def reads_at(served: Served, offsets: Sequence[int], depth: int) -> Answers:
    """4 KiB at each offset over one NBD connection, so many at a time."""
    offsets_text = "".join(f"{offset}\n" for offset in offsets)
    command = [PYTHON, READER, served.address, str(depth)]
    output = subprocess.run(command, check=True, input=offsets_text, stdout=subprocess.PIPE, text=True).stdout
    return Answers(**json.loads(output))


def http_ranges(wanted: Path, clients: int) -> Answers:
    """Each of the ranges in a list ("FIRST-LAST URL" lines), by so many kept-alive libcurl clients."""
    command = [program("http_ranges"), wanted, str(clients)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Answers(**json.loads(output))


def first_read(served: Served) -> None:
    """One 4 KiB read by a client that starts and ends with it."""
    subprocess.run([PYTHON, "-m", "nbd", "-u", served.address, "-c", "h.pread(4096, 1 << 20)"], check=True)
