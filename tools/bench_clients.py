# SPDX-License-Identifier: Apache-2.0
"""The readers of a bench: foreign programs only, so that no server has its own judge."""

from __future__ import annotations

import json
import subprocess
import time

from tools.bench_servers import Served


def nbdcopy(served: Served) -> float:
    """Seconds to read a whole export, as nbdcopy likes it (several connections)."""
    start = time.monotonic()
    subprocess.run(["nbdcopy", served.address, "null:"], check=True)
    return time.monotonic() - start


def _fio(arguments: list[str], runtime: float) -> dict[str, float]:
    command = ["fio", "--name=bench", "--output-format=json", "--randrepeat=1", "--norandommap"]
    if runtime:
        command += ["--time_based", f"--runtime={runtime}"]
    output = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    # Engines print remarks of their own before the JSON.
    read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    return {"iops": read["iops"], "bytes": read["io_bytes"], "seconds": read["runtime"] / 1000}


def fio_nbd(served: Served, size: int, depth: int, runtime: float) -> dict[str, float]:
    """4 KiB random reads over one NBD connection."""
    arguments = ["--ioengine=nbd", f"--uri={served.address}", "--rw=randread", "--bs=4k"]
    return _fio([*arguments, f"--iodepth={depth}", f"--size={size}"], runtime)


def fio_file(served: Served, depth: int, runtime: float) -> dict[str, float]:
    """4 KiB random reads of a file, past the page cache."""
    arguments = ["--ioengine=libaio", f"--filename={served.address}", "--direct=1", "--rw=randread", "--bs=4k"]
    return _fio([*arguments, f"--iodepth={depth}", "--readonly"], runtime)


def fio_file_sequential(served: Served) -> dict[str, float]:
    """One pass over a file in 1 MiB reads, four at a time, past the page cache."""
    arguments = ["--ioengine=libaio", f"--filename={served.address}", "--direct=1", "--rw=read", "--bs=1m"]
    return _fio([*arguments, "--iodepth=4", "--readonly"], 0)


def fio_nbd_sequential(served: Served, size: int) -> dict[str, float]:
    """The first `size` bytes in 256 KiB reads, eight at a time, over one NBD connection."""
    arguments = ["--ioengine=nbd", f"--uri={served.address}", "--rw=read", "--bs=256k", "--iodepth=8"]
    return _fio([*arguments, f"--size={size}"], 0)


def first_read(served: Served) -> None:
    """One 4 KiB read by a client that starts and ends with it."""
    # Debian's own interpreter: python3-libnbd belongs to no other.
    command = ["/usr/bin/python3", "-m", "nbd", "-u", served.address, "-c", "h.pread(4096, 1 << 20)"]
    subprocess.run(command, check=True)
