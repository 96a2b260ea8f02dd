# SPDX-License-Identifier: Apache-2.0
"""One caller of the owner: reads its requests, does them, answers.

A request is {"op": ..., ...}; its answer is one object, with {"progress": ...} objects
before it where it takes long and {"notice": "..."} ones for its user's eyes, or an
{"error": ...}. What a caller attached in the foreground (op "serve") ends with its
connection; a mount outlives it once the caller has said where it is (op "mounted").

Each session is a thread. Whatever escapes an operation is a defect: it is logged, told
to the caller, and the session goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Protocol

from blockdev import control
from blockdev.build.export import export_image
from blockdev.build.sink import Sink
from blockdev.caller import Caller
from blockdev.config import parse_policy
from blockdev.control import Body, Channel, Message
from blockdev.device import Device, NbdTransport, State
from blockdev.errors import BlockdevError, DeviceError, EngineError, UsageError, shortage
from blockdev.fsck import Check, Repair
from blockdev.origin import Origin
from blockdev.owner import Owner
from blockdev.stack import Stack
from blockdev.transport.fuse import FuseTransport

log = logging.getLogger(__name__)

_ECHO = 40  # characters of a caller's own words in an answer
_PROGRESS_EVERY = 0.2  # seconds
_RANGE_MAX = 4 << 20  # bytes of one answer to "read": they are in memory twice
_DRAIN_LIMIT = 5.0  # seconds that the requests in hand of an ended export get
_ALIVE_EVERY = 1.0  # seconds between signs of life while a disk is waited for: callers allow four
_PATIENCE = 6  # of these; then the caller's user is told what is waited for
_ALWAYS = {"hello", "ps", "unmount", "stop"}  # done however many callers there are
_WAITING = {"notice": "waiting for the disk that was written to"}


class House(Protocol):
    """Where conversations are had: the process of the owner."""

    def stop(self) -> None:
        """Make the owner leave."""

    def crowded(self) -> bool:
        """Whether there are so many callers that nothing new may begin."""
        ...

    def ended(self, session: Session) -> None:
        """This conversation is over."""


class Session:
    """The conversation with one caller, in a thread of its own."""

    def __init__(self, channel: Channel, owner: Owner, house: House) -> None:
        self._channel = channel
        self._owner = owner
        self._house = house
        self.holding = False  # nothing but an export that is live
        self._caller = Caller(self._tell, channel.gone)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._ops: dict[str, Callable[[Message], Body]] = {
            "hello": self._hello,
            "serve": self._serve,
            "mount": self._mount,
            "unmount": self._unmount,
            "inspect": self._inspect,
            "verify": self._verify,
            "export": self._export,
            "disk": self._disk,
            "pull": self._pull,
            "adopt": self._adopt,
            "fsck": self._fsck,
            "cache stat": self._cache_stat,
            "cache prune": self._cache_prune,
            "ps": self._ps,
            "stop": self._stop_owner,
        }

    def start(self) -> None:
        self._thread.start()

    def hang_up(self) -> None:
        """Take no more requests; what runs may finish and answer."""
        self._channel.hang_up()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while message := self._channel.receive():
                try:
                    self._reply(self._answer(message))
                finally:
                    message.close()
        except ConnectionError:
            log.info("a caller hung up before its answer")
        except DeviceError as error:  # it speaks, but not our language
            with contextlib.suppress(ConnectionError):
                self._channel.send(control.error_body(error))
        finally:
            self._channel.close()
            self._house.ended(self)

    def _reply(self, answer: Body) -> None:
        try:
            self._channel.send(answer)
        except EngineError as error:  # it is longer than a line can be
            log.error("answer not sent: %s", error)
            self._channel.send(control.error_body(error))

    def _answer(self, message: Message) -> Body:
        op = str(message.body.get("op"))[:_ECHO]
        try:
            operation = self._ops.get(op)
            if operation is None:
                raise UsageError(f"asking the owner failed: {op!r}: no such request in this version")
            if op not in _ALWAYS and self._house.crowded():
                raise EngineError(f"{op} failed: the owner has too many callers already")
            return operation(message)
        except BlockdevError as error:
            log.info("%s failed: %s", op, error)
            if isinstance(error, EngineError) and self._owner.stopping:
                return control.error_body(DeviceError(f"{error} (the owner is stopping)"))
            return control.error_body(error)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - a defect in one request must not end the owner
            # Frames only: the text of a foreign exception may hold a signed URL.
            frames = "".join(traceback.format_tb(error.__traceback__))
            why = shortage(error) or f"a defect: {type(error).__name__}"
            log.error("%s failed: %s\n%s", op, why, frames)
            return control.error_body(EngineError(f"{op} failed: the owner: {why}"))

    def _hello(self, message: Message) -> Body:
        return {"pid": os.getpid()}

    # ---- devices ----

    def _serve(self, message: Message) -> Body:
        """Export an image on the last descriptor, a listening socket, until the caller says "end" or goes."""
        where, export = message.member("where", str), message.member("export", str)
        listener = _listening(message.descriptor(-1))
        try:
            device = self._owner.add_device(self._open(message))
        except BaseException:
            listener.close()
            raise
        device.where = where
        device.attach(NbdTransport(listener, export))
        self._device_live(device)
        try:
            self._channel.send({"id": device.id, "size": device.size})
            self.holding = True
            ending = self._channel.receive()
        finally:
            self.holding = False
            ended = device.state is not State.LIVE
            self._patiently(partial(device.drain, _DRAIN_LIMIT))
        if ended:
            raise DeviceError(f"serving failed: {device.stack.name}: the owner was stopped")
        if ending is None:
            raise ConnectionAbortedError
        ending.close()
        return {"ended": device.id}

    def _mount(self, message: Message) -> Body:
        """Open an image; then the caller mounts FUSE and passes it ("fuse"), mounts what it wants
        of it and says so ("mounted"), or asks what is wrong with it ("why"). If it does not get so far, nothing of
        it stays here."""
        device = self._owner.add_device(self._open(message))
        try:
            self._channel.send({"id": device.id, "size": device.size})
            with contextlib.closing(self._next("fuse")) as passed:
                device.attach(FuseTransport(os.dup(passed.descriptor(0)), id=device.id))
            self._channel.send({"serving": device.id})
            with contextlib.closing(self._next("mounted", "why")) as mounted:
                if mounted.body["op"] == "why":
                    raise self._owner.why(device) or DeviceError("mount failed: nothing is known of it")
                device.where, device.how = mounted.member("where", str), mounted.member("how", str)
                device.connection = mounted.member("connection", int)
        except BaseException:
            device.drain(0)
            raise
        self._device_live(device)
        return {"id": device.id}

    def _unmount(self, message: Message) -> Body:
        """The caller is about to take a mount away, and says when it has ("unmounted"). The answer comes
        when what was written to it is on its disk."""
        device = self._owner.device(message.member("id", int))
        self._channel.send({"unmounting": device.id})
        self._next("unmounted").close()
        self._patiently(device.flush)
        return {"id": device.id}

    def _patiently(self, work: Callable[[], None]) -> None:
        """Do what takes as long as a disk does, while the caller hears that it goes on. What is done is done
        also if he hangs up."""
        failure: list[BlockdevError] = []

        def run() -> None:
            try:
                work()
            except BlockdevError as error:
                failure.append(error)

        worker = threading.Thread(target=run, name="control-end", daemon=True)
        try:
            worker.start()
        except RuntimeError:  # no thread to be had: the caller hears nothing meanwhile
            run()
        else:
            self._show_life(worker)
        if failure:
            raise failure[0]

    def _show_life(self, worker: threading.Thread) -> None:
        for beat in count(1):
            worker.join(_ALIVE_EVERY)
            if not worker.is_alive():
                return
            self._channel.send(_WAITING if beat == _PATIENCE else {"progress": {}})

    def _next(self, *ops: str) -> Message:
        """The caller's next request, which has to be one of these."""
        message = self._channel.receive()
        if message is None:
            raise ConnectionAbortedError
        if message.body.get("op") not in ops:
            message.close()
            raise UsageError(f"asking the owner failed: {message.body.get('op')!r:.40}: {ops[0]} has to come first")
        return message

    def _device_live(self, device: Device) -> None:
        name = device.transport.name if device.transport else ""
        log.info("device live id=%d image=%s transport=%s where=%s", device.id, device.stack.name, name, device.where)

    # ---- images ----

    def _open(self, message: Message) -> Stack:
        origin = Origin.from_wire(message.member("image", dict), message.descriptors)
        return self._owner.open(origin, _access(message), parse_policy(message.member("policy", str)), self._caller)

    def _tell(self, line: str) -> None:
        """Something the caller's user should know now; the answer follows."""
        self._channel.send({"notice": line})

    def _inspect(self, message: Message) -> Body:
        with self._open(message) as stack:
            return stack.describe()

    def _verify(self, message: Message) -> Body:
        with self._open(message) as stack:
            verified = self._owner.verify(stack, self._progress(), self._channel.gone)
            return {"layers": [asdict(layer) for layer in verified]}

    def _pull(self, message: Message) -> Body:
        """Fetch an image; a caller that has gone ends it."""
        origin = Origin.from_wire(message.member("image", dict), message.descriptors)
        tell = self._teller()

        def progress(present: int, checked: int, size: int) -> None:
            tell(done=present, checked=checked, total=size)

        policy, complete = parse_policy(message.member("policy", str)), message.member("complete", bool)
        pulled = self._owner.pull(origin, _access(message), policy, self._caller, progress if complete else None)
        return {"blobs": [asdict(blob) for blob in pulled]}

    def _adopt(self, message: Message) -> Body:
        """Keep what the descriptor reads as the blob that it is said to be ("": any), if it is."""
        place = None if message.body.get("place") is None else message.member("place", dict)
        file = message.descriptor(0)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UsageError("asking the owner failed: descriptors: not a file")
        return {"digest": self._owner.adopt(file, message.member("digest", str), place)}

    def _fsck(self, message: Message) -> Body:
        """Check the cache; repair it if the caller says how to reach registries."""
        names, check = message.member("names", list), message.member("digests", bool)
        if not all(isinstance(name, str) for name in names):
            raise UsageError("asking the owner failed: names: each is text")
        repair = None
        if message.member("repair", bool):
            repair = Repair(message.member("access", dict), parse_policy(message.member("policy", str)))
        return self._owner.fsck(Check(names, check), repair, self._caller, self._progress()).to_json()

    def _export(self, message: Message) -> Body:
        """Write the disk to the last descriptor, which the caller calls "output" and finishes. "unread": whoever reads
        it from a pipe left before the end."""
        sink = Sink(message.descriptor(-1), message.member("output", str), message.member("made", bool))
        with self._open(message) as stack:
            try:
                with self._owner.reading(stack.blobs, self._channel.gone):
                    export_image(stack.image, sink, self._progress())
            except BrokenPipeError:  # if it is the caller who has gone, this does not reach him either
                return {"size": stack.image.size, "unread": True}
            return {"size": stack.image.size, "unread": False}

    def _disk(self, message: Message) -> Body:
        """Read ranges of the disk into the last descriptor, a file of the caller's, until it says "end"."""
        window = message.descriptor(-1)
        with self._open(message) as stack:
            self._channel.send({"size": stack.image.size})
            while True:
                asked = self._channel.receive()
                if asked is None:
                    raise ConnectionAbortedError
                with contextlib.closing(asked), self._owner.reading(stack.blobs, self._channel.gone):
                    if asked.body.get("op") == "end":
                        return {}
                    self._channel.send({"read": _read(stack, asked, window)})

    def _progress(self) -> Callable[[int, int], None]:
        """Tells the caller how far a long operation is."""
        tell = self._teller()
        return lambda done, total: tell(done=done, total=total)

    def _teller(self) -> Callable[..., None]:
        """Sends its arguments as progress, now and then; ConnectionError if the caller has gone."""
        told = time.monotonic()

        def tell(**progress: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _PROGRESS_EVERY:
                told = time.monotonic()
                self._channel.send({"progress": progress})

        return tell

    # ---- the owner ----

    def _cache_stat(self, message: Message) -> Body:
        return {"blobs": [asdict(found) for found in self._owner.cache.stat()]}

    def _cache_prune(self, message: Message) -> Body:
        return asdict(self._owner.prune())

    def _ps(self, message: Message) -> Body:
        return {"devices": self._owner.describe()}

    def _stop_owner(self, message: Message) -> Body:
        live = [device.where or device.stack.name for device in self._owner.devices() if not _unmounted(device)]
        if live and not message.body.get("force"):
            raise DeviceError(f"stopping the owner failed: {', '.join(live)}: in use (--force ends them)")
        devices = [device for device in self._owner.devices() if device.stack.writable]
        self._house.stop()
        try:
            for device in devices:
                self._patiently(partial(device.drain, _DRAIN_LIMIT))
        except BlockdevError as error:
            return {"stopping": os.getpid(), "lost": control.error_body(error)}
        return {"stopping": os.getpid(), "lost": {}}


def _unmounted(device: Device) -> bool:
    """Whether a device is about to end, as its kernel has let go of it."""
    return isinstance(device.transport, FuseTransport) and device.transport.gone()


def _read(stack: Stack, asked: Message, window: int) -> int:
    """Put the range that is asked for at the start of a caller's file; how long it is."""
    offset, length = asked.member("offset", int), asked.member("length", int)
    if not 0 <= offset <= offset + length <= stack.image.size or not 0 <= length <= _RANGE_MAX:
        raise UsageError(f"asking the owner failed: offset {offset}, length {length}: no range of the disk")
    piece = stack.image.read_at(offset, length)
    try:
        written = os.pwrite(window, piece, 0)
    except OSError as error:
        raise UsageError(f"asking the owner failed: descriptors: {error.strerror}") from None
    if written != length:
        raise UsageError("asking the owner failed: descriptors: its file has no room")
    return length


def _access(message: Message) -> Body | None:
    """How to reach registries; None: the caller says that everything is local."""
    return None if message.body.get("access") is None else message.member("access", dict)


def _listening(fd: int) -> socket.socket:
    """A socket of our own for a caller's listening one. UsageError if it is none."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise UsageError("asking the owner failed: descriptors: not a socket")
    listener = socket.socket(fileno=os.dup(fd))
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.close()
        raise UsageError("asking the owner failed: descriptors: not a listening socket")
    return listener
