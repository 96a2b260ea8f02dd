# SPDX-License-Identifier: Apache-2.0
"""A slow link: a TCP proxy that delays each direction and limits its rate.

Usage: bench_link.py TARGET_PORT DELAY_MS BYTES_PER_SECOND; prints the port it listens on
(loopback). The delay does not throttle: bytes are on their way while later ones arrive,
up to IN_FLIGHT. One connection more costs one delay, as a real SYN would.
"""

from __future__ import annotations

import asyncio
import sys

IN_FLIGHT = 256  # pieces on their way in one direction: 16 MiB, more than any delay here needs
PIECE = 64 << 10


class Link:
    """One direction of all connections: they share the rate."""

    def __init__(self, delay: float, rate: float) -> None:
        self.delay = delay
        self.rate = rate
        self.free_at = 0.0

    def arrival(self, size: int) -> float:
        """When a piece of this size, sent now, has arrived."""
        now = asyncio.get_running_loop().time()
        self.free_at = max(now, self.free_at) + size / self.rate
        return self.free_at + self.delay

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Move bytes until the sender hangs up, then hang up too."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)

        async def send() -> None:
            while True:
                at, piece = await on_the_way.get()
                await asyncio.sleep(at - asyncio.get_running_loop().time())
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()

        async def receive() -> None:
            piece = b"start"
            while piece:
                piece = await reader.read(PIECE)
                await on_the_way.put((self.arrival(len(piece)), piece))

        await asyncio.gather(send(), receive())


async def main(target: int, delay: float, rate: float) -> None:
    there, back = Link(delay, rate), Link(delay, rate)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]) / 1000, float(sys.argv[3])))
