# SPDX-License-Identifier: Apache-2.0
"""The threads behind blobs that fill: they come when they can, and go on whatever happens to one blob."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.caller import Caller
from blockdev.config import Policy
from blockdev.remote import Remotes
from formats import oci
from tests.checked import await_written
from tests.claimants import DIGEST, GOOD, SIZE, Bench
from tests.commands import until
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.filling import WAITING
from tests.small_image import NOBODY

NO_ROOM = 1 << 47  # bytes of a stack: more than a process has addresses for
ACCESS = {"plain_http": False, "ca": "", "credentials": NOBODY.to_json()}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def test_a_blob_whose_files_have_gone_does_not_end_the_verifying(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    blob = bench.open(undo, bench.good).blob
    assert blob.read_at(0, SIZE) == GOOD
    await_written(blob, SIZE)
    entry = bench.cache.in_use(blob)
    assert entry
    undo.callback(entry.close)
    folder = bench.data.parent
    folder.rename(folder.with_name("away"))
    bench.supply.blob_whole(entry.id)
    assert until(lambda: "blob not verified" in caplog.text)
    folder.with_name("away").rename(folder)
    bench.supply.blob_whole(entry.id)
    assert until(lambda: entry.verified)


def test_threads_that_could_not_be_started_are_with_the_next_image(bench: Bench, undo: ExitStack) -> None:
    policy = Policy("eio", 1.0)
    threading.stack_size(NO_ROOM)
    try:
        with ExitStack() as refused, pytest.raises(RuntimeError, match="thread"):
            bench.open(refused, bench.good, policy=policy)
    finally:
        threading.stack_size(0)
    assert bench.open(undo, bench.good, policy=policy).blob.read_at(0, SIZE) == GOOD


def test_an_image_opens_without_the_thread_that_would_keep_its_config(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    bench.open(undo, bench.good)  # the threads that there must be
    layer = oci.Descriptor(oci.OCI_LAYER, DIGEST, SIZE, oci.layer_annotations(DIGEST, SIZE))
    manifest = oci.Manifest(oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(b"{}"), 2), (layer,))

    def answer(_seen: Seen) -> Answer:
        threading.stack_size(NO_ROOM)
        return Answer(200, {"Content-Type": manifest.media_type}, manifest.build())

    remotes = Remotes(bench.supply, bench.cache, bench.catalog)
    with HttpServer(answer) as server:
        try:
            remotes.open_reference(f"{server.host}/app:1", ACCESS, Policy("eio", 1.0), undo, WAITING)
        finally:
            threading.stack_size(0)
    assert "config not kept" in caplog.text


def test_an_opening_ends_with_who_waits_for_it(bench: Bench, undo: ExitStack) -> None:
    remotes = Remotes(bench.supply, bench.cache, bench.catalog)
    with HttpServer(lambda seen: Answer(503, {"Retry-After": "30"})) as server:
        caller = Caller(print, lambda: bool(server.seen))
        with pytest.raises(ConnectionError):
            remotes.open_reference(f"{server.host}/app:1", ACCESS, Policy("hang"), undo, caller)
