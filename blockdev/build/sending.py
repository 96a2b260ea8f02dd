# SPDX-License-Identifier: Apache-2.0
"""Finished layers of a conversion on their way: hashed, kept in the local cache, and brought to the target."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import BinaryIO, Self

from blockdev.build.ahead import LEAVE_SECONDS
from blockdev.build.depot import BlobFile, Depot, Read
from blockdev.build.sourceimage import Archived, SourceImage
from blockdev.build.workshop import Made, Workshop, Written
from blockdev.staging import digest_of
from formats import oci

Progress = Callable[[str, int, int], None]  # "converted" or "pushed", bytes, bytes in all


@dataclass(frozen=True)
class Finished:
    """A layer that the target has."""

    made: Made
    source: str
    reused: bool
    sent: bool

    def descriptor(self, file_system: str) -> oci.Descriptor:
        given = oci.layer_annotations(self.made.digest, self.made.written.size, file_system)
        annotations = given | self.made.written.annotations
        return oci.Descriptor(oci.OCI_LAYER, self.made.digest, self.made.written.size, annotations)


class _Cancelled(Exception):
    """The conversion has ended: what is being sent is not wanted any more."""


class Sending:
    """Hashes, keeps and sends finished layers, one after the other, in a thread of its own, and notes where they are.

    Leaving ends what is under way at its next step. A step that takes too long is not waited for: the process may
    end meanwhile, and the files are the thread's own.
    """

    def __init__(self, source: Depot, target: Depot, workshop: Workshop, meter: Meter) -> None:
        self.meter = meter
        self._source = source
        self._target = target
        self._workshop = workshop
        self._jobs: SimpleQueue[tuple[Future[Finished], Callable[[], Finished]] | None] = SimpleQueue()
        self._failed: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="send", daemon=True)
        self._thread.start()

    def send(self, key: str, layer: Archived, written: Written, file: BinaryIO) -> Future[Finished]:
        """A layer that has just been made."""

        def finish(own: BinaryIO) -> Finished:
            made = Made(digest_of(own.fileno(), "sha256"), written)
            self._workshop.keep(key, made, own)
            return self._put(key, layer, made, own)

        return self._submit(finish, file)

    def resend(self, key: str, layer: Archived, made: Made, file: BinaryIO) -> Future[Finished]:
        """One that was made before."""
        return self._submit(lambda own: replace(self._put(key, layer, made, own), reused=True), file)

    def check(self) -> None:
        """Raise what has gone wrong first, if anything has."""
        if self._failed:
            raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._cancelled = True
        self._jobs.put(None)
        self._thread.join(LEAVE_SECONDS)

    def _submit(self, finish: Callable[[BinaryIO], Finished], file: BinaryIO) -> Future[Finished]:
        """Queue what is to be done with a file, which is closed; the thread has one of its own."""
        own = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        file.close()

        def job() -> Finished:
            with own:
                return finish(own)

        future: Future[Finished] = Future()
        self._jobs.put((future, job))
        return future

    def _run(self) -> None:
        while queued := self._jobs.get():
            future, job = queued
            if self._cancelled:
                return
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the layer gets it
                self._failed = self._failed or error
                future.set_exception(error)

    def _put(self, key: str, layer: Archived, made: Made, file: BinaryIO) -> Finished:
        size = made.written.size
        self.meter.expect(size)

        def tell(arrived: int) -> None:
            if self._cancelled:
                raise _Cancelled
            self.meter.sent(arrived, size)

        others = (self._source.name, *made.places)
        sent = self._target.put_blob(BlobFile(made.digest, size, file.fileno()), tell, others)
        self.meter.arrived(size)
        if self._target.name not in made.places:
            made = replace(made, places=(*made.places, self._target.name))
            self._workshop.note(key, made)
        return Finished(made, layer.blob.digest, reused=False, sent=sent)


class Meter:
    """How far it is: bytes of the source that were read, then bytes of the result that were sent."""

    def __init__(self, progress: Progress | None, images: Sequence[SourceImage]) -> None:
        self._progress = progress or (lambda stage, done, total: None)
        self._total = sum(layer.blob.size for image in images for layer in image.layers)
        self._lock = threading.Lock()
        self._read = 0
        self._expected = self._sent = 0

    def skip(self, layer: Archived) -> None:
        """The layer need not be read."""
        self._count(layer.blob.size)

    def counting(self, read: Read) -> Read:
        def read_counted(length: int) -> bytes:
            piece = read(length)
            self._count(len(piece))
            return piece

        return read_counted

    def expect(self, size: int) -> None:
        self._expected += size

    def sent(self, arrived: int, size: int) -> None:
        if self._read == self._total:
            self._progress("pushed", self._sent + arrived, self._expected)

    def arrived(self, size: int) -> None:
        self._sent += size

    def _count(self, length: int) -> None:
        with self._lock:  # two layers' threads may be reading
            self._read += length
            self._progress("converted", self._read, self._total)
