# SPDX-License-Identifier: Apache-2.0
"""The C engine, as Python objects.

Promises: every handle is closed once, by close() or a with block; a negative return
becomes one exception; no call holds the GIL while it waits. Offsets and lengths are
bytes. The manual of what the calls do is native/ob.h.
"""

from blockdev.engine.blob import Blob, BlobStat, File, ZFileHead
from blockdev.engine.border import EXTENT_SIZE, LAYERS_MAX, EngineStopped
from blockdev.engine.compress import Codec, Compressor, crc32c, zero_run
from blockdev.engine.engine import Engine, Event, EventKind
from blockdev.engine.fetch import Fetch, HttpTarget, Priority, Refusal, Trust
from blockdev.engine.image import FuseSession, FuseStat, Image, LayerKind, LayerTable, NbdConnection, Run, RunKind

__all__ = [
    "EXTENT_SIZE", "LAYERS_MAX", "Blob", "BlobStat", "Codec", "Compressor", "Engine", "EngineStopped", "Event",
    "EventKind", "Fetch", "File", "FuseSession", "FuseStat", "HttpTarget", "Image", "LayerKind", "LayerTable",
    "NbdConnection", "Priority", "Refusal", "Run", "RunKind", "Trust", "ZFileHead", "crc32c", "zero_run",
]  # fmt: skip
