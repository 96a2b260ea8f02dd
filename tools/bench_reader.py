# SPDX-License-Identifier: Apache-2.0
"""Reads 4 KiB at each of the given offsets over NBD, so many at a time.

Usage: bench_reader.py URI DEPTH < OFFSETS (one a line). Prints a line of JSON: seconds for
all, and the microseconds of each read. For Debian's own interpreter, which has libnbd.
"""

import json
import sys
import time

import nbd

LENGTH = 4096
POLL_MS = 60_000  # longer than any reply may take


def main() -> None:
    uri, depth = sys.argv[1], int(sys.argv[2])
    offsets = [int(line) for line in sys.stdin]
    connection = nbd.NBD()
    connection.connect_uri(uri)
    microseconds = [0.0] * len(offsets)
    errors: list[str] = []
    under_way = 0

    def start(number: int) -> None:
        began = time.perf_counter()

        def done(error: int) -> int:
            nonlocal under_way
            if error:
                errors.append(f"read at {offsets[number]}: errno {error}")
            microseconds[number] = (time.perf_counter() - began) * 1e6
            under_way -= 1
            return 1

        connection.aio_pread(nbd.Buffer(LENGTH), offsets[number], done)

    began = time.perf_counter()
    for number in range(len(offsets)):
        while under_way >= depth:
            connection.poll(POLL_MS)
        start(number)
        under_way += 1
    while under_way:
        connection.poll(POLL_MS)
    seconds = time.perf_counter() - began
    connection.shutdown()
    if errors:
        sys.exit(errors[0])
    json.dump({"seconds": seconds, "microseconds": microseconds}, sys.stdout)


main()
