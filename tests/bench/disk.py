# SPDX-License-Identifier: Apache-2.0
"""The disk every bench reads, made from a seed, so that a row can be repeated elsewhere.

It consists of 4 KiB pages: text-like ones, incompressible ones and zeros, so that lz4
and zstd have something to do and holes occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

PAGE = 4096
TEXT, NOISE = 0.55, 0.30  # share of pages; the rest is zero
POOL_PAGES = 8192  # distinct text pages: 32 MiB, far past any codec's window
RUN_PAGES = 16  # neighbours are of one kind, as in files
SEED = 20240229


def disk_pieces(size: int) -> Iterator[bytes]:
    """The disk of SEED with this size (a multiple of 64 KiB), piece by piece."""
    rng = random.Random(SEED)
    words = [rng.randbytes(rng.randrange(3, 12)).hex().encode() for _ in range(4000)]
    pool = [b" ".join(rng.choices(words, k=PAGE // 4))[:PAGE] for _ in range(POOL_PAGES)]
    for _ in range(size // (PAGE * RUN_PAGES)):
        kind = rng.random()
        if kind < TEXT:
            yield b"".join(rng.choices(pool, k=RUN_PAGES))
        elif kind < TEXT + NOISE:
            yield rng.randbytes(PAGE * RUN_PAGES)
        else:
            yield bytes(PAGE * RUN_PAGES)
