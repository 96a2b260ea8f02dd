# SPDX-License-Identifier: Apache-2.0
"""The threads that answer misses: from the engine's queue to a source and back.

    fetch-0      foreground misses only, so that prefetch never occupies every thread
    fetch-1 ...  whatever is most urgent
    probe        asks the sources of blobs that are down whether they are well again

A fetch is always given back, whatever goes wrong. How long readers wait for it is the
engine's business (a blob's policy); here an attempt has a deadline, and the next one a
delay. Fetch threads hold no lock while they are in the engine or in a source.
"""

from __future__ import annotations

import copy
import errno
import itertools
import logging
import threading
import time
import traceback
from dataclasses import dataclass

from blockdev.engine import Blob, Engine, EngineStopped, Fetch, Priority
from blockdev.errors import BlockdevError, CorruptImage
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.source import Source, Spilled

log = logging.getLogger(__name__)

# Twice what one host gets (native/queue.h), so that one that stalls leaves threads for others; that is 16: in flight
# 32 MiB, what 1 Gbit/s and 250 ms hold; and more misses than a container's start has at once.
THREADS = 32
ATTEMPT_TIMEOUT = 30.0  # seconds for one range: a slow link's 4 MiB; what has arrived by then is kept
PROBE_TIMEOUT = 3.0  # seconds; a probe moves a few bytes, and others wait behind it
PROBE_INTERVAL = 1.0  # seconds between rounds: how late a source's return is noticed
_IDLE = 15.0  # seconds of one wait for a fetch; after it, kept connections and buffers are given up
_UNABLE_PAUSE = 1.0  # seconds until a thread that could not take a fetch tries to again
REFUSED_DELAY = 5.0  # seconds; readers of a blob that was denied or not found do not each ask about it anew


@dataclass
class _Supply:
    """Where a blob's bytes come from. `host`, `number`: in whose share of the fetches they are (ob_blob_set_host).
    `refused_until`: it was denied, or not found (monotonic)."""

    blob: Blob
    source: Source
    host: str = ""
    number: int = 0
    refused_until: float = 0.0


class Pool:
    """The fetch threads of an engine. start(), then attach() sources; Engine.stop() before join()."""

    def __init__(self, engine: Engine, threads: int = THREADS, backoff: Backoff | None = None) -> None:
        """`backoff` may be shared with whoever else talks to the same hosts."""
        self._engine = engine
        self._backoff = backoff or Backoff()
        self._supplies: dict[int, _Supply] = {}
        self._down: set[int] = set()
        self._failing: dict[int, BlockdevError] = {}  # blob id: why its last fetch failed
        self._wrong: dict[int, CorruptImage] = {}  # blob id: what of it came wrong last
        self._stopping = False
        self._changed = threading.Condition()  # guards all of these, but for one look at an id
        self._threads = [
            threading.Thread(
                target=self._fetch,
                args=(Priority.BULK if number else Priority.FOREGROUND,),
                name=f"fetch-{number}",
                daemon=True,  # one that is stuck in a source does not keep the process
            )
            for number in range(max(2, threads))
        ]
        self._threads.append(threading.Thread(target=self._probe, name="probe", daemon=True))

    def start(self) -> None:
        """Those that do not run yet: may be called again, and is to be if there was no thread to be had."""
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def attach(self, id: int, blob: Blob, source: Source) -> None:
        """Misses of blob `id` are answered by this source from now on."""
        with self._changed:
            self._supplies[id] = _Supply(blob, source)
            self._move(self._supplies[id], source.host)

    def _move(self, supply: _Supply, host: str) -> None:
        """Under the lock: it comes from this host now, which keeps its small number as long as it has blobs."""
        numbers = {other.host: other.number for other in self._supplies.values() if other is not supply}
        taken = set(numbers.values())
        supply.host = host
        supply.number = numbers.get(host) or next(number for number in itertools.count(1) if number not in taken)
        supply.blob.set_host(supply.number)

    def detach(self, id: int) -> None:
        """Forget the blob; call it before the blob is closed."""
        with self._changed:
            self._supplies.pop(id, None)
            self._down.discard(id)
            self._failing.pop(id, None)
            self._wrong.pop(id, None)

    def failure(self, id: int) -> BlockdevError | None:
        """Why the last fetch of a blob failed; None if it did not."""
        return self._failing.get(id)

    def complaint(self, id: int) -> BlockdevError | None:
        """What there is to say of a blob: failure(), or what came wrong, which is said until the blob is closed,
        whatever other parts do."""
        return self._failing.get(id) or self._wrong.get(id)

    def blob_down(self, id: int) -> None:
        """The engine has given a blob's source up (BLOB_DOWN): probe it until it is well."""
        with self._changed:
            self._down.add(id)
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Wait for the threads of a stopped engine; False if some is still stuck in a source after `timeout` seconds.

        The engine may only be closed if it is True.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # ---- fetch-N ----

    def _fetch(self, lowest: Priority) -> None:
        unable = False
        while True:
            try:
                fetch = self._engine.next_fetch(lowest, timeout=_IDLE)
            except EngineStopped:
                return
            except BlockdevError as error:  # no memory for a buffer: what is queued waits, as long as its policy says
                log.log(logging.DEBUG if unable else logging.ERROR, "fetching stands still: %s", error)
                unable = True
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, _UNABLE_PAUSE)
                continue
            unable = False
            if fetch:
                self._answer(fetch)

    def _answer(self, fetch: Fetch) -> None:
        """One fetch, from taken to given back."""
        supply = self._supplies.get(fetch.blob_id)
        if supply is None:
            log.debug("fetch given up blob=%d offset=%d: it has no source any more", fetch.blob_id, fetch.offset)
            fetch.finish(errno.ESHUTDOWN)
            return
        source = supply.source
        if time.monotonic() < supply.refused_until:
            fetch.finish(errno.EIO)
            return
        host = source.host
        if host != supply.host:
            with self._changed:
                if self._supplies.get(fetch.blob_id) is supply:  # the blob is open
                    self._move(supply, host)
        wait = self._backoff.waiting(host)
        if wait:
            fetch.finish(errno.EAGAIN, retry=wait)
            return
        failed = self._failing.get(fetch.blob_id)
        try:
            self._read(fetch, source)
        except EngineStopped:
            fetch.finish(errno.ESHUTDOWN)
        except Spilled as error:
            fetch.finish(errno.EAGAIN, retry=error.delay)  # what is there now counts as done
        except LeftAlone as error:
            self._note_failure(fetch, source.name, error)
            fetch.finish(errno.EAGAIN, retry=error.seconds)
        except BlockdevError as error:
            if self._note_failure(fetch, source.name, error):
                fetch.finish(errno.EIO, retry=self._pause(supply, error))
            else:
                fetch.finish(errno.ESHUTDOWN)
        except Exception as error:  # noqa: BLE001 - a fetch that is not given back hangs its readers
            _log_defect("fetch", source.name, error)
            fetch.finish(errno.EIO)
        else:
            self._backoff.succeeded(source.host)
            self._note_success(fetch, source.name, failed)
            fetch.finish()

    def _pause(self, supply: _Supply, error: BlockdevError) -> float:
        """Seconds until a failed fetch is tried again, 0 if never."""
        if error.retriable:
            return self._backoff.failed(supply.source.host, error)
        if isinstance(error, CorruptImage):  # other parts of the blob may come as they should
            return 0.0
        supply.refused_until = time.monotonic() + REFUSED_DELAY
        return 0.0

    def _read(self, fetch: Fetch, source: Source) -> None:
        def progress(filled: int) -> None:
            fetch.advance(filled)
            if self._stopping:
                raise EngineStopped("fetch: the engine is stopping")

        deadline = time.monotonic() + ATTEMPT_TIMEOUT
        # Its last progress() has advanced everything; to do so again would be news of a source that has failed since.
        if not source.fill(fetch, deadline):
            source.read_into(fetch.offset, fetch.buffer, deadline=deadline, progress=progress)

    def _note_failure(self, fetch: Fetch, name: str, error: BlockdevError) -> bool:
        """The first failure of a blob is news, the following are not. False: the blob has been closed, and its source
        was ended for that."""
        with self._changed:
            known = fetch.blob_id in self._supplies
            first = known and fetch.blob_id not in self._failing
            if known:
                self._failing[fetch.blob_id] = copy.copy(error)  # without its frames, and their buffers
            if known and isinstance(error, CorruptImage):
                self._wrong[fetch.blob_id] = copy.copy(error)
        log.log(
            logging.WARNING if first else logging.DEBUG,
            "fetch failed source=%s offset=%d length=%d attempt=%d: %s",
            name,
            fetch.offset,
            fetch.length,
            fetch.attempt,
            error,
        )
        return known

    def _note_success(self, fetch: Fetch, name: str, failed: BlockdevError | None) -> None:
        """`failed` had, when this fetch began, and is over. A later failure may be that of a reader who had this one's
        bytes long ago."""
        with self._changed:
            again = failed is not None and self._failing.get(fetch.blob_id) is failed
            if again:
                del self._failing[fetch.blob_id]
        if again:
            log.info("source delivers again source=%s", name)

    # ---- probe ----

    def _probe(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._down or self._stopping)
                waiting = [(id, self._supplies[id]) for id in self._down if id in self._supplies]
                self._down = {id for id, _ in waiting}
            for id, supply in waiting:
                if self._stopping:
                    break
                if self._is_well(supply):
                    self._up(id, supply)
            with self._changed:
                if self._changed.wait_for(lambda: self._stopping, PROBE_INTERVAL if self._down else 0):
                    return

    def _is_well(self, supply: _Supply) -> bool:
        source = supply.source
        if time.monotonic() < supply.refused_until or self._backoff.waiting(source.host):
            return False
        try:
            source.probe(time.monotonic() + PROBE_TIMEOUT)
        except BlockdevError as error:
            log.debug("probe failed source=%s: %s", source.name, error)
            if not isinstance(error, LeftAlone):
                self._pause(supply, error)
            return False
        except Exception as error:  # noqa: BLE001 - without its prober no source would ever come back
            _log_defect("probe", source.name, error)
            return False
        return True

    def _up(self, id: int, supply: _Supply) -> None:
        with self._changed:
            # Under the lock, detach() has not happened, so the blob is open; who joined has attached it anew.
            if id in self._supplies:
                supply.blob.healthy()
            self._down.discard(id)
        self._backoff.succeeded(supply.source.host)
        log.info("source is back source=%s", supply.source.name)


def _log_defect(what: str, name: str, error: Exception) -> None:
    """Frames only: the text of a foreign exception may hold a signed URL."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed source=%s: a defect: %s\n%s", what, name, type(error).__name__, frames)
