# SPDX-License-Identifier: Apache-2.0
"""What hostile clients of the live sockets send: right beginnings that go wrong, and noise.

Every stream is made by a random.Random, so a seed names it.
"""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

_LIMITS = (0, 1, 511, 512, 65536, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
_REQUEST_MAGIC = 0x25609513
_OPTIONS = range(11)

# All but those that end the owner or empty its cache.
_OPS = (
    "hello",
    "inspect",
    "verify",
    "serve",
    "mount",
    "mounted",
    "fuse",
    "export",
    "pull",
    "adopt",
    "fsck",
    "cache stat",
)
_KEYS = ("image", "policy", "access", "export", "where", "complete", "digest", "how", "fds", "place", "names", "output")
_IMAGE_KEYS = ("name", "reference", "parts", "upper", "size", "digest", "url", "local", "plain_http", "credentials")


def noise(random: Random, most: int = 300) -> bytes:
    return random.randbytes(random.randrange(most))


def damaged(random: Random, content: bytes) -> bytes:
    """A few bytes changed, cut or repeated."""
    changed = bytearray(content)
    for _ in range(random.randrange(4)):
        place = random.randrange(len(changed) + 1)
        how = random.randrange(4)
        if how == 0:
            del changed[place : place + random.randrange(1, 9)]
        elif how == 1:
            changed[place:place] = random.randbytes(random.randrange(1, 9))
        elif how == 2:
            changed[place : place + 1] = bytes([random.choice((0, 1, 127, 128, 255))])
        else:
            changed[place:place] = changed[place : place + random.randrange(1, 40)]
    return bytes(changed)


# ---- NBD ----


def _option(random: Random, number: int, name: bytes) -> bytes:
    body = random.choice((name, struct.pack(">I", len(name)) + name + struct.pack(">H", 0), noise(random)))
    return b"IHAVEOPT" + struct.pack(">II", number, len(body)) + body


def _request(random: Random, size: int) -> bytes:
    kind = random.choice((0, 0, 0, 1, 3, 4, 6, 7, random.randrange(1 << 16)))
    offset = random.choice((random.randrange(size), random.choice(_LIMITS)))
    length = random.choice((random.randrange(1, 5000), random.choice(_LIMITS) & 0xFFFFFFFF))
    flags = random.choice((0, 0, 4, 8, random.randrange(1 << 16)))
    return struct.pack(">IHHQQI", _REQUEST_MAGIC, flags, kind, random.getrandbits(64), offset, length)


def nbd(random: Random, size: int) -> bytes:
    """A negotiation, and if it comes to that the transmission phase of a disk of that size."""
    stream = struct.pack(">I", random.choice((3, 3, 3, 1, 0, random.getrandbits(32))))
    for _ in range(random.randrange(5)):
        stream += _option(random, random.choice((*_OPTIONS, random.getrandbits(32))), b"")
    if random.randrange(4):
        if random.randrange(2):
            stream += b"IHAVEOPT" + struct.pack(">II", 8, 0)
        stream += b"IHAVEOPT" + struct.pack(">III", 7, 6, 0) + b"\0\0"
        for _ in range(random.randrange(30)):
            stream += _request(random, size)
    return random.choice((stream, stream, damaged(random, stream), noise(random)))


# ---- control socket ----


def _anything(random: Random, depth: int = 0) -> Any:
    kind = random.randrange(9 if depth < 4 else 6)
    if kind < 6:
        return (None, random.getrandbits(70) - (1 << 69), 1.5, True, "", noise(random, 20).decode("latin-1"))[kind]
    if kind == 6:
        return [_anything(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(_IMAGE_KEYS): _anything(random, depth + 1) for _ in range(random.randrange(4))}


def _image(random: Random, size: int) -> dict[str, Any]:
    """What cli/ask.py sends of a local layer, or of one that no registry has."""
    local = {"name": "layer", "size": size, "digest": "", "url": "", "local": True}
    remote = {"name": "far", "size": 7, "digest": "sha256:" + "0" * 64, "url": "http://localhost:1/v2/a/blobs"}
    parts: list[Any] = random.choice(([local], [local], [local, local], [remote | {"local": False}], []))
    if random.randrange(3) == 0 and parts:
        parts[0] = {**parts[0], random.choice(_IMAGE_KEYS): _anything(random)}
    reference = random.choice(("", "", "", "localhost:1/a", "Not One"))
    return {"name": "image", "reference": reference, "parts": parts, "upper": random.randrange(6) == 0}


def control(random: Random, size: int, descriptors: int) -> bytes:
    """Some lines: requests with parts that are missing, wrong or too many. `size`: bytes of the layer passed."""
    lines = []
    for _ in range(random.randrange(1, 6)):
        body: dict[str, Any] = {"v": random.choice((1, 1, 1, 1, 2, None)), "op": random.choice((*_OPS, *_OPS, "", 7))}
        if not lines and random.randrange(8):
            body["fds"] = descriptors
        if random.randrange(2):
            credentials = {"files": [], "required": False, "environment": {}}
            access = {"plain_http": True, "ca": "", "credentials": credentials}
            body |= {"image": _image(random, size), "policy": "eio:1s", "export": "", "where": "w", "complete": True}
            body |= {"output": "o", "made": random.choice((False, True))}
            body |= {"how": "h", "access": random.choice((None, access)), "digest": "sha256:" + "0" * 64}
            body |= {"names": [], "digests": True, "repair": False}
        for key in random.sample(_KEYS, random.choice((0, 0, 1, len(_KEYS)))):
            body[key] = _anything(random)
        line = json.dumps(body).encode()
        lines.append(random.choice((line, line, line, damaged(random, line), noise(random), b"[" * 5000)))
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b""))
