# SPDX-License-Identifier: Apache-2.0
"""What the rows of a bench stand on: the content, the registry that has it, our command.

Each part is made when the first row needs it, and ends with the bench.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.bench_content import CODECS, MIB, Content, make_content
from tools.bench_network import REPOSITORY, Registry, registry
from tools.bench_programs import BUILD
from tools.bench_servers import Ociblk, Served

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sysconfig.get_path("scripts")) / "ociblk")  # the one that goes with this interpreter


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    files: int  # bytes of files on the disk: so many, if the machine has them
    files_min: int  # and these it must have
    rounds: int
    runtime: float  # seconds of each random-read sample
    misses: int  # cold reads of each sample


TINY = Settings(files=8 * MIB, files_min=8 * MIB, rounds=1, runtime=0.2, misses=8)
# Compressed it must last for more than a second at 1 Gbit/s.
SMALL = Settings(files=512 * MIB, files_min=512 * MIB, rounds=3, runtime=1.0, misses=200)
FULL = Settings(files=1024 * MIB, files_min=600 * MIB, rounds=5, runtime=5.0, misses=1000)


class Ground:
    """Made once for a bench. `folder` is empty and nobody else's."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self.settings = settings
        self.folder = folder
        self._stack = stack

    @cached_property
    def content(self) -> Content:
        print("(making the content)", flush=True)
        files, kept = (self.settings.files_min, self.settings.files), None if self.settings == TINY else BUILD
        return make_content(self.folder / "content", files, COMMAND, kept)

    @cached_property
    def registry(self) -> Registry:
        """docker-registry with an image for each codec."""
        started = self._stack.enter_context(registry(self.folder))
        pusher = Ociblk(COMMAND, self.folder / "full")
        self._stack.callback(pusher.wipe)
        for codec in CODECS:
            pusher.run("push", *self.content.layers[codec], f"{started.host}/{REPOSITORY}:{codec}")
        return started

    @cached_property
    def full(self) -> Ociblk:
        """Our command under a root that has every blob."""
        assert self.registry
        return Ociblk(COMMAND, self.folder / "full")

    def reference(self, codec: str, host: str | None = None) -> str:
        return f"{host or self.registry.host}/{REPOSITORY}:{codec}"

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    @contextmanager
    def empty(self) -> Iterator[Ociblk]:
        """Our command under a root that has nothing."""
        root = Ociblk(COMMAND, self.folder / "empty")
        try:
            yield root
        finally:
            root.wipe()

    @contextmanager
    def cold(self, codec: str, host: str | None = None) -> Iterator[Served]:
        """An image over NBD whose bytes are all still at the host."""
        with self.empty() as root, root.serve(self.reference(codec, host), self.socket("cold")) as served:
            yield served

    def warm(self, codec: str) -> AbstractContextManager[Served]:
        """An image over NBD whose bytes are all here."""
        return self.full.serve(self.reference(codec), self.socket(codec))
