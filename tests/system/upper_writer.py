# SPDX-License-Identifier: Apache-2.0
"""Writers of a writable layer, to be killed: upper_writer.py DATA INDEX ACKNOWLEDGED.

For each seed on stdin a new process opens the pair and does operations(seed) until it is
killed; after each it writes a byte to the descriptor ACKNOWLEDGED. stdout gets its pid, and
"ended" when it has ended.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

from blockdev.engine import Engine
from blockdev.origin import NOTHING, locate
from blockdev.stack import open_local

SECTOR = 512
DISK_SECTORS = 1024


class Operation(NamedTuple):
    """fill < 0: flush; fill 0: trim; else a write of sectors full of that byte."""

    sector: int
    count: int
    fill: int


def operations(seed: int) -> Iterator[Operation]:
    """Without end, the same for the same seed."""
    noise = random.Random(seed)
    while True:
        sector = noise.randrange(DISK_SECTORS)
        count = min(noise.choice([1, 1, 8, 8, 64]), DISK_SECTORS - sector)
        kind = noise.random()
        yield Operation(sector, count, -1 if kind < 0.1 else 0 if kind < 0.3 else noise.randint(1, 255))


def write(pair: list[str], seed: int, acknowledged: int) -> None:
    with (
        Engine(work_threads=1) as engine,
        locate(NOTHING, pair, write=True) as origin,
        open_local(engine, origin) as stack,
    ):
        image = stack.image.image
        for operation in operations(seed):
            if operation.fill < 0:
                image.flush()
            elif operation.fill == 0:
                image.zero(operation.sector * SECTOR, operation.count * SECTOR)
            else:
                image.write(operation.sector * SECTOR, bytes([operation.fill]) * (operation.count * SECTOR))
            os.write(acknowledged, b"\1")


def main() -> None:
    *pair, acknowledged = sys.argv[1:]
    for line in sys.stdin:
        writer = os.fork()
        if not writer:
            write(pair, int(line), int(acknowledged))
        print(writer, flush=True)
        os.waitpid(writer, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
