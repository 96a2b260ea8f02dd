# SPDX-License-Identifier: Apache-2.0
"""Stacks: sizes, limits, and what opening one from afar costs."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev import image
from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.errors import CorruptImage, EngineError, SourceError, UsageError
from blockdev.fetch.pool import Pool
from blockdev.image import OpenImage, open_image
from blockdev.layer import Layer, NamedBlob, open_layer
from formats import zfile
from tests import stacks
from tests.fakes.memory_source import MemorySource
from tests.opened import memory_blob, opened_bytes

WAIT = 20.0  # seconds
LAYER = stacks.Plan(2048, (stacks.Op(0, 8, 1),)).build()


def _size_of(*sizes: int, upper: int | None = None) -> int:
    pair = stacks.Plan(upper, ()).build_pair() if upper is not None else ()
    layers = [stacks.Plan(size, ()).build() for size in sizes]
    with Engine(work_threads=1) as engine, opened_bytes(engine, *layers, upper=pair) as image:
        return image.size // 512


def test_the_topmost_size_that_is_not_zero_counts() -> None:
    assert _size_of(100) == 100
    assert _size_of(100, 0) == 100
    assert _size_of(100, 300, 0) == 300
    assert _size_of(300, 100) == 100
    assert _size_of(100, 0, upper=0) == 100
    assert _size_of(100, upper=50) == 50


def test_255_layers_can_be_stacked_and_no_more() -> None:
    with Engine(work_threads=1) as engine, opened_bytes(engine, *[LAYER] * 255) as image:
        assert image.read_at(0, 8 * 512) == stacks.Op(0, 8, 1).content()
        with pytest.raises(UsageError, match="256"), opened_bytes(engine, *[LAYER] * 256):
            pass
        with pytest.raises(UsageError, match="0 layers"), opened_bytes(engine):
            pass


def test_closing_twice_does_no_harm() -> None:
    with Engine(work_threads=1) as engine, ExitStack() as stack:
        image = open_image(engine, [memory_blob(engine, "layer", LAYER, stack)])
        image.close()
        image.close()


def test_a_failed_opening_closes_every_layer() -> None:
    with Engine(work_threads=1) as engine, ExitStack() as stack:
        blobs = [memory_blob(engine, "good", LAYER, stack), memory_blob(engine, "bad", bytes(9000), stack)]
        for _ in range(3):
            with pytest.raises(CorruptImage, match="bad"):
                open_image(engine, blobs)


class Remote:
    """Layers that come from sources through a pool, each source with a gate."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(work_threads=1)
        self.cache = Cache(folder, self.engine)
        self.pool = Pool(self.engine)
        self.pool.start()
        self.sources: list[MemorySource] = []
        self.blobs: list[NamedBlob] = []
        self._undo = ExitStack()

    def add(self, content: bytes) -> MemorySource:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        entry = self.cache.open(digest, len(content), Policy("eio", 0.2))
        source = MemorySource(content)
        self.pool.attach(entry.id, entry.blob, source)
        self._undo.callback(entry.close)
        self._undo.callback(self.pool.detach, entry.id)
        self.sources.append(source)
        self.blobs.append(NamedBlob(digest, entry.blob))
        return source

    def close(self) -> None:
        for source in self.sources:
            source.gate.set()
        self.engine.stop()
        assert self.pool.join(WAIT)
        self._undo.close()
        self.engine.close()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    made = Remote(tmp_path)
    yield made
    made.close()


def test_opening_a_remote_stack_asks_for_heads_and_tails_at_once_and_for_nothing_else(remote: Remote) -> None:
    for number in range(3):
        plan = stacks.Plan(20_000, (stacks.Op(0, 8000, 2 * number + 1),), zfile=zfile.Options(), tar=True)
        remote.add(plan.build()).gate.clear()
    opened: list[OpenImage] = []
    opener = threading.Thread(target=lambda: opened.append(open_image(remote.engine, remote.blobs)))
    opener.start()
    deadline = time.monotonic() + WAIT
    while sum(len(source.reads) for source in remote.sources) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for source in remote.sources:
        source.gate.set()
    opener.join(WAIT)
    assert opened
    opened[0].close()
    for source in remote.sources:
        assert len(source.reads) == 2
        assert sum(length for _, length in source.reads) <= 4 * 65536 < source.size


def test_a_stack_whose_source_is_down_fails_within_its_policy(remote: Remote) -> None:
    remote.add(LAYER)
    remote.add(stacks.Plan(2048, (stacks.Op(0, 8, 3),)).build()).well = False
    start = time.monotonic()
    with pytest.raises(SourceError, match=remote.blobs[1].name):
        open_image(remote.engine, remote.blobs)
    assert time.monotonic() - start < WAIT


def test_a_thread_that_cannot_be_had_leaves_no_layer_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Layer] = []
    threads: list[threading.Thread] = []
    start = threading.Thread.start

    def open_noted(blob: NamedBlob) -> Layer:
        opened.append(open_layer(blob))
        return opened[-1]

    def start_one(thread: threading.Thread) -> None:
        if threads:
            raise RuntimeError("can't start new thread")
        threads.append(thread)
        start(thread)

    monkeypatch.setattr(image, "open_layer", open_noted)
    with Engine(work_threads=1) as engine, ExitStack() as stack:
        blobs = [memory_blob(engine, f"layer {place}", LAYER, stack) for place in range(8)]
        monkeypatch.setattr(threading.Thread, "start", start_one)
        with pytest.raises(RuntimeError, match="new thread"):
            open_image(engine, blobs)
        for layer in opened:
            with pytest.raises(EngineError, match="used after close"):
                layer.table.file.read_at(0, 1)
    assert opened
