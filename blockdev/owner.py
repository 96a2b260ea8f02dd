# SPDX-License-Identifier: Apache-2.0
"""What one owner holds: the engine, the cache, and the devices that live on them.

Sessions call from their own threads; the main thread calls event_fd, take_events(),
busy(), drain() and close(). Opening an image may wait for a registry, nothing else here
waits for more than a device to end.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from blockdev.build.verify import Progress, Verified
from blockdev.cache import Cache, Pruned
from blockdev.caller import Caller
from blockdev.catalog import Catalog, Place
from blockdev.config import Policy
from blockdev.device import Device, NbdTransport
from blockdev.engine import Engine, Event, EventKind
from blockdev.errors import BlockdevError, CorruptImage, DeviceError, NotFound, SourceError, UsageError
from blockdev.fetch.pull import Progress as PullProgress
from blockdev.fetch.pull import Pull, Pulled
from blockdev.fsck import Check, Finding, Fsck, Refetch, Repair, Report
from blockdev.image import open_image
from blockdev.layer import NamedBlob
from blockdev.origin import Origin, Part
from blockdev.root import Root
from blockdev.stack import Stack, open_local, open_part
from blockdev.supply import Supply

if TYPE_CHECKING:
    from blockdev.remote import Remotes

log = logging.getLogger(__name__)

_CLOSE_LIMIT = 1.0  # seconds to close what devices hold that nobody wrote to, once they have drained
_RETRY = 0.5  # seconds after which a thread that could not be started is tried again
_LOOK = 0.25  # seconds between looks at whether a caller who waits for reads is still there
_PLACES_TOLD = 16  # of a blob, in the log: one that is all wrong has thousands
_JOIN_LIMIT = 2.0  # seconds for fetch threads to come back from a source


class Owner:
    """The engine of a root and everything open on it."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._engine = Engine()
        self.cache = Cache(root.blobs, self._engine)
        self._catalog = Catalog(root.catalog)
        self._supply = Supply(self._engine, self.cache)
        self._remotes: Remotes | None = None
        self._devices: dict[int, Device] = {}
        self._ending: list[Device] = []  # of the main thread, once the owner stops
        self._unended: dict[int, float] = {}  # of the main thread: when to try again, by the device's id
        self._lock = threading.Lock()  # of _devices and _remotes
        self._ids = itertools.count(1)
        self._stopping = threading.Event()
        self._warned_of_writes = False
        self._damage: dict[str, set[int]] = {}  # places that were told, by blob

    # ---- for sessions ----

    def open(self, origin: Origin, access: Mapping[str, Any] | None, policy: Policy, caller: Caller) -> Stack:
        """Open an image. access says how to reach its registry, and is None if all of it is local.

        Waits for the registry: as long as `policy` says for what has to be read of a blob. What its
        user should know of how it was found is told at once, in one line. If he goes, the waiting ends.
        """
        if access is None:
            return open_local(self._engine, origin)
        remarks: list[str] = []

        def note(line: str) -> None:
            remarks.append(line)
            caller.tell(line)

        with ExitStack() as undo:
            blobs = self._open_lowers(origin, access, policy, undo, caller._replace(tell=note))
            upper = [open_part(self._engine, part, undo) for part in origin.upper]
            pair = (upper[0], upper[1]) if upper else None
            with self.reading(blobs, caller.gone):
                image = open_image(self._engine, blobs, pair, writable=origin.writable)
            return Stack(origin, image, [*blobs, *upper], undo.pop_all(), remark="; ".join(remarks))

    def verify(self, stack: Stack, progress: Progress, gone: Callable[[], bool]) -> list[Verified]:
        """Read all of an opened image, and check it."""
        with self.reading(stack.blobs, gone):
            return stack.verify(self._engine, progress)

    @contextmanager
    def reading(self, blobs: Sequence[NamedBlob], gone: Callable[[], bool]) -> Iterator[None]:
        """Reads that a caller waits for: they fail once he has `gone`, and with what was the matter with a blob, if
        that is known."""
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(blobs, gone, over), name="watch", daemon=True)
        watch.start()
        try:
            yield
        except SourceError as error:
            raise self._supply.why(blobs) or error from error
        finally:
            over.set()
            watch.join()

    def pull(
        self,
        origin: Origin,
        access: Mapping[str, Any] | None,
        policy: Policy,
        caller: Caller,
        progress: PullProgress | None,
    ) -> list[Pulled]:
        """Have a registry's image here: what opening it takes; with `progress` all of it, verified.

        A source that fails is waited for as `policy` says. UsageError if no blob is a registry's.
        """
        with ExitStack() as undo:
            blobs = [] if access is None else self._open_lowers(origin, access, policy, undo, caller)
            entries = []
            for blob in dict.fromkeys(named.blob for named in blobs):
                entry = self.cache.in_use(blob)
                if entry:
                    undo.callback(entry.close)
                    entries.append(entry)
            if not entries:
                raise UsageError(f"pulling failed: {origin.name}: its blobs are files (ociblk cache add keeps them)")
            pull = Pull(origin.name, entries, self._supply, policy)
            if progress:
                pull.complete(progress, self._stopping)
            with self.reading(blobs, caller.gone):
                open_image(self._engine, blobs).close()
            return pull.result()

    def _open_lowers(
        self, origin: Origin, access: Mapping[str, Any], policy: Policy, undo: ExitStack, caller: Caller
    ) -> list[NamedBlob]:
        remotes = self._get_remotes()
        if origin.reference:
            return remotes.open_reference(origin.reference, access, policy, undo, caller)

        def of_registry(part: Part) -> NamedBlob:
            return remotes.open_part(part, access, policy, undo, caller)

        return [of_registry(part) if part.fd < 0 else open_part(self._engine, part, undo) for part in origin.layers]

    def _get_remotes(self) -> Remotes:
        """Made when first needed: an owner of local images has no use for an HTTP client in its memory."""
        from blockdev.remote import Remotes

        with self._lock:
            self._remotes = self._remotes or Remotes(self._supply, self.cache, self._catalog)
            return self._remotes

    def fsck(self, wanted: Check, repair: Repair | None, caller: Caller, progress: Progress) -> Report:
        """Check the cache under whatever runs on it, and repair it if it is said how, as long as the caller waits."""
        fsck = Fsck(self._root.blobs, self.cache, self._catalog)
        report, damaged = fsck.check(wanted, progress)
        if repair is None or not damaged:
            return report
        source_of = partial(self._get_remotes().source, repair.access)
        refetch = Refetch(source_of, self._supply.backoff, repair.policy, caller)
        bad: list[Finding] = []
        for blob in damaged:
            bad += fsck.repair(blob, [one for one in report.bad if one.digest == blob.digest], refetch)
        return replace(report, bad=tuple(bad))

    def adopt(self, fd: int, digest: str, place: Mapping[str, Any] | None) -> str:
        """Keep what fd reads as a blob ("": of any digest); its digest. place: where it can be had again."""
        known = Place.from_wire(place) if place else None
        adopted = self.cache.adopt(fd, digest)
        if known:
            self._catalog.note_place(known, [adopted])
        return adopted

    def prune(self) -> Pruned:
        """Remove the blobs that are not in use, and what is known of images that have none any more."""
        pruned = self.cache.prune()
        self._catalog.prune(self.cache.digests)
        return pruned

    def add_device(self, stack: Stack) -> Device:
        """A new device of an opened image, which is the device's from now on."""
        device = Device(next(self._ids), stack, self._forget)
        with self._lock:
            if not self._stopping.is_set():
                self._devices[device.id] = device
                return device
        stack.close()
        raise DeviceError(f"attaching failed: {stack.name}: the owner is stopping")

    def devices(self) -> list[Device]:
        """Those that are not gone."""
        with self._lock:
            return list(self._devices.values())

    def device(self, id: int) -> Device:
        """NotFound if there is none by this number."""
        with self._lock:
            device = self._devices.get(id)
        if device is None:
            raise NotFound(f"asking the owner failed: device {id}: there is none")
        return device

    def describe(self) -> list[dict[str, Any]]:
        """Every device, as `ps` shows it."""
        described = []
        for device in self.devices():
            described.append(device.describe())
            for blob, named in zip(described[-1]["blobs"], device.stack.blobs, strict=False):
                blob["verified"] = self.cache.verified(named.blob)
        return described

    def _forget(self, device: Device) -> None:
        with self._lock:
            self._devices.pop(device.id, None)
        log.info("device gone id=%d image=%s where=%s", device.id, device.stack.name, device.where)

    # ---- for the main thread ----

    @property
    def event_fd(self) -> int:
        """Readable while the engine has events."""
        return self._engine.event_fd

    def take_events(self) -> None:
        """Deal with every event that waits."""
        while event := self._engine.next_event():
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.kind is EventKind.FUSE_CLOSED:
            device = self._devices.get(event.id)
            if device:  # reads that were in flight may take their time to end
                self._begin_to_end(device, 0)
        elif event.kind is EventKind.NBD_CLOSED:
            servers = [device.transport for device in self.devices()]
            any(server.connection_closed(event.id) for server in servers if isinstance(server, NbdTransport))
        elif event.kind is EventKind.BLOB_COMPLETE:
            self._supply.blob_whole(event.id)
        elif event.kind is EventKind.BLOB_FAILING:
            self._note_failure(event.id)
        elif event.kind is EventKind.BLOB_DOWN:
            self._supply.blob_down(event.id)
            self._note_failure(event.id)
        elif event.kind is EventKind.CACHE_WRITE:
            self._warn_of_writes(-event.status)
        elif event.kind is EventKind.BLOB_DAMAGED:
            self._note_damage()

    def _warn_of_writes(self, error: int) -> None:
        if not self._warned_of_writes:
            self._warned_of_writes = True
            why = os.strerror(error)
            log.warning("cache not written, reads go on without it root=%s reason=%s", self._root.path, why)

    def _note_damage(self) -> None:
        """Some block is wrong for good: said once for each, and for some of each blob."""
        for device in self.devices():
            for name, offset in device.stack.damage():
                places = self._damage.setdefault(name, set())
                device.error = _damaged(name, offset)
                if offset not in places and len(places) < _PLACES_TOLD:
                    places.add(offset)
                    log.error("blob damaged id=%d where=%s: %s", device.id, device.where, device.error)

    def why(self, device: Device) -> BlockdevError | None:
        """Why reads of a device fail, if that is known."""
        wrong = [CorruptImage(_damaged(*place)) for place in device.stack.damage()]
        return wrong[0] if wrong else self._supply.why(device.stack.blobs)

    def _note_failure(self, id: int) -> None:
        blob, why = self._supply.failure(id)
        for device in self.devices():
            if any(named.blob is blob for named in device.stack.blobs):
                device.error = why

    @property
    def stopping(self) -> bool:
        """Whether drain() has begun: whatever is under way may end unfinished."""
        return self._stopping.is_set()

    def busy(self) -> bool:
        """Whether somebody still depends on this owner."""
        return bool(self._devices)

    def drain(self, timeout: float) -> None:
        """End every device, side by side; requests in hand get `timeout` seconds. What was written may be
        under way to its disk yet, or not begun for want of a thread: finish_writing() sees to that."""
        with self._lock:
            self._stopping.set()
        self._ending = self.devices()
        begun = [device for device in self._ending if self._begin_to_end(device, timeout)]
        deadline = time.monotonic() + timeout + _CLOSE_LIMIT
        for device in begun:
            device.wait(max(0.0, deadline - time.monotonic()))
        self._engine.stop()

    def finish_writing(self) -> None:
        """After drain(): wait until what was written is on its disk, however long that takes; raise the
        first error there was."""
        with ExitStack() as errors:
            for device in self._ending:
                if device.stack.writable:
                    errors.callback(device.drain, 0)

    def retry(self, now: float) -> float:
        """Begin to end what could not be ended for want of a thread; when to ask again (time.monotonic())."""
        for id in [id for id, due in self._unended.items() if due <= now]:
            del self._unended[id]
            device = self._devices.get(id)
            if device:
                self._begin_to_end(device, 0)
        return min(self._unended.values(), default=math.inf)

    def _begin_to_end(self, device: Device, timeout: float) -> bool:
        """False if there is no thread for it, and flushing it here would take as long as its disk does."""

        def end() -> None:
            with suppress(BlockdevError):  # the device has logged it, and keeps it for whoever asks
                device.drain(timeout)

        try:
            threading.Thread(target=end, name=f"end-{device.id}", daemon=True).start()
        except RuntimeError:  # Python's word for EAGAIN
            if self._stopping.is_set() and not device.stack.writable:
                end()
                return True
            log.warning("device ends later id=%d reason=no thread can be started", device.id)
            self._unended[device.id] = time.monotonic() + _RETRY
            return False
        return True

    def close(self) -> None:
        """Free the engine, unless a thread is stuck in it: then this process is about to end anyway."""
        if self._supply.join(_JOIN_LIMIT):
            self._engine.close()


def _watch(blobs: Sequence[NamedBlob], gone: Callable[[], bool], over: threading.Event) -> None:
    while not over.wait(_LOOK):
        if gone():
            for named in blobs:
                named.give_up()
            return


def _damaged(name: str, offset: int) -> str:
    return f"read blob: {name}: offset {offset}: a block fails its checksum, or cannot be decoded"
