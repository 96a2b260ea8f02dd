# SPDX-License-Identifier: Apache-2.0
"""The server's side of NBD's fixed newstyle negotiation, without I/O.

Read at most `wanted` bytes from the client, pass them to receive(), send what to_send()
returns; repeat until receive() returns Go or Closed. As `wanted` never reaches past the
negotiation, the first byte of the transmission phase is still in the socket at Go.

Promises: any bytes lead to a reply, Go or Closed, never to an exception, and no more
than OPTION_MAX bytes of a client's are kept. Layout and what is
supported: docs/formats/nbd.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from formats.errors import FormatError

OPTION_MAX = 16 << 10  # bytes of an option's body: a 4096-byte name and room for queries
SKIP_MAX = 1 << 20  # bytes of an oversized body that are still skipped to stay in step
OPTIONS_MAX = 64  # options of one negotiation; real clients send fewer than ten
STRING_MAX = 4096  # bytes of a name or query: the protocol's own limit

BLOCK_MIN, BLOCK_PREFERRED, BLOCK_MAX = 1, 64 << 10, 32 << 20  # a cache extent; native/nbd_serve.c's READ_MAX
BLOCK_MIN_WRITABLE, BLOCK_PREFERRED_WRITABLE = 512, 4096  # a sector; what costs no more than its bytes
ALLOCATION = "base:allocation"
ALLOCATION_ID = 1  # native/nbd.c puts the same id into its replies

_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x0003E889045565A9
_EXPORT_NAME_PADDING = bytes(124)
_ECHO = 64  # characters of a client's own text in an error message


class HandshakeFlag(IntFlag):
    """Bits the server offers, and that the client sends back to accept."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


_HANDSHAKE = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)  # an int, for the sake of ~


class TransmissionFlag(IntFlag):
    """What an export can do; sent when it is opened."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256


_WRITING = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)


class Option(IntEnum):
    """What a client may ask for."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Kinds of answer to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_INVALID = (1 << 31) + 3
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """Kinds of INFO reply."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


@dataclass(frozen=True)
class Export:
    """A disk on offer: its name, its size in bytes, and text for people. FormatError for text the wire cannot carry.

    A writable one is of whole BLOCK_MIN_WRITABLE bytes, and a flush on one connection covers all of them.
    """

    name: str
    size: int
    description: str = ""
    writable: bool = False

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("description", self.description)):
            try:
                length = len(text.encode())
            except UnicodeEncodeError:
                raise FormatError(f"{what} is not UTF-8") from None
            if length > STRING_MAX:
                raise FormatError(f"{what} of {length} bytes, where {STRING_MAX} is the limit")


@dataclass(frozen=True)
class Go:
    """The transmission phase starts, once what to_send() returns has been sent."""

    export: Export
    structured: bool
    allocation: bool


@dataclass(frozen=True)
class Closed:
    """Hang up, once what to_send() returns has been sent. `reason` is for the log."""

    reason: str


Outcome = Go | Closed | None


class _Body:
    """An option's body, taken from the front. FormatError when it is not what was expected."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, length: int) -> bytes:
        taken = self._content[self._at : self._at + length]
        if len(taken) < length:
            raise FormatError("option ends early", self._at)
        self._at += length
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def string(self) -> str:
        length = self.number(4)
        if length > STRING_MAX:
            raise FormatError(f"string of {length} bytes", self._at)
        return _text(self.take(length))

    def end(self) -> None:
        if self._at != len(self._content):
            raise FormatError("option goes on after its end", self._at)


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise FormatError("string is not UTF-8", error.start) from None


class Negotiation:
    """One client's negotiation. The empty name asks for `default`, which is one of the exports' names."""

    def __init__(self, exports: Mapping[str, Export], default: str) -> None:
        self._exports = exports
        self._default = default
        self._outgoing = bytearray(_GREETING + struct.pack(">H", _HANDSHAKE))
        self._incoming = bytearray()
        self._missing = 4  # bytes until the next step
        self._step: Callable[[bytes], Outcome] = self._client_flags
        self._zeroes = True
        self._fixed = False
        self._structured = False
        self._mapped: Export | None = None  # whose base:allocation was selected
        self._option = 0
        self._options_seen = 0

    @property
    def wanted(self) -> int:
        """How many bytes may be read from the client now; 0 once the outcome is known."""
        return min(self._missing, OPTION_MAX)

    def to_send(self) -> bytes:
        """What the client must get now; each byte is returned once."""
        outgoing, self._outgoing = bytes(self._outgoing), bytearray()
        return outgoing

    def receive(self, content: bytes) -> Outcome:
        """Bytes from the client, at most `wanted` of them (ValueError else: the caller read too much)."""
        if len(content) > self.wanted:
            raise ValueError(f"{len(content)} bytes where {self.wanted} were wanted")
        self._missing -= len(content)
        if self._step != self._oversized:  # whose bytes are not kept
            self._incoming += content
        if self._missing or not content:
            return None
        taken, self._incoming = bytes(self._incoming), bytearray()
        return self._step(taken)

    # ---- steps: each gets exactly the bytes it waited for, and says what comes next ----

    def _client_flags(self, content: bytes) -> Outcome:
        flags = int.from_bytes(content, "big")
        if flags & ~_HANDSHAKE:
            return self._close(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & HandshakeFlag.NO_ZEROES
        self._next_option()
        return None

    def _next_option(self) -> None:
        self._step, self._missing = self._option_head, 16

    def _option_head(self, content: bytes) -> Outcome:
        magic, self._option, length = struct.unpack(">8sII", content)
        self._options_seen += 1
        if magic != _OPTION_MAGIC:
            return self._close("option without its magic")
        if self._options_seen > OPTIONS_MAX:
            return self._close(f"more than {OPTIONS_MAX} options")
        if not self._fixed and self._option != Option.EXPORT_NAME:
            return self._close(f"option {self._option} of a client that cannot read replies to it")
        if length > (OPTION_MAX if self._option == Option.EXPORT_NAME else SKIP_MAX):
            return self._close(f"option {self._option} of {length} bytes")
        self._step, self._missing = (self._oversized if length > OPTION_MAX else self._option_body), length
        return None if length else self._option_body(b"")

    def _oversized(self, _content: bytes) -> None:
        self._reply(Reply.ERR_TOO_BIG, f"at most {OPTION_MAX} bytes".encode())
        self._next_option()

    def _option_body(self, content: bytes) -> Outcome:
        self._next_option()
        answer = self._ANSWERS.get(self._option)
        if not answer:
            self._reply(Reply.ERR_UNSUP, b"not supported")
            return None
        try:
            return answer(self, content)
        except FormatError as error:
            if self._option == Option.EXPORT_NAME:  # which knows no error reply
                return self._close(f"export name: {error}")
            self._reply(Reply.ERR_INVALID, str(error).encode())
            return None

    # ---- answers: one for each option that is supported ----

    def _export_name(self, content: bytes) -> Outcome:
        if len(content) > STRING_MAX:
            raise FormatError(f"string of {len(content)} bytes")
        export = self._find(_text(content))
        if not export:
            return self._close(f"unknown export {_text(content)[:_ECHO]!r}")
        self._outgoing += self._size_and_flags(export)
        if self._zeroes:
            self._outgoing += _EXPORT_NAME_PADDING
        return self._go(export)

    def _abort(self, _content: bytes) -> Outcome:
        self._reply(Reply.ACK)
        return self._close("the client left")

    def _list(self, content: bytes) -> None:
        _Body(content).end()
        for export in self._exports.values():
            name = export.name.encode()
            self._reply(Reply.SERVER, struct.pack(">I", len(name)) + name + export.description.encode())
        self._reply(Reply.ACK)

    def _info_or_go(self, content: bytes) -> Outcome:
        body = _Body(content)
        name = body.string()
        asked = {body.number(2) for _ in range(body.number(2))}
        body.end()
        export = self._find(name)
        if not export:
            self._unknown(name)
            return None
        self._reply_info(Info.EXPORT, self._size_and_flags(export))
        if Info.NAME in asked:
            self._reply_info(Info.NAME, export.name.encode())
        if Info.DESCRIPTION in asked and export.description:
            self._reply_info(Info.DESCRIPTION, export.description.encode())
        if Info.BLOCK_SIZE in asked:
            smallest, preferred = BLOCK_MIN, BLOCK_PREFERRED
            if export.writable:
                smallest, preferred = BLOCK_MIN_WRITABLE, BLOCK_PREFERRED_WRITABLE
            self._reply_info(Info.BLOCK_SIZE, struct.pack(">III", smallest, preferred, BLOCK_MAX))
        self._reply(Reply.ACK)
        return self._go(export) if self._option == Option.GO else None

    def _structured_reply(self, content: bytes) -> None:
        _Body(content).end()
        self._structured = True
        self._reply(Reply.ACK)

    def _meta_context(self, content: bytes) -> None:
        selecting = self._option == Option.SET_META_CONTEXT
        if selecting:
            self._mapped = None  # even if this one fails: the client cannot count on either
        body = _Body(content)
        name = body.string()
        queries = [body.string() for _ in range(body.number(4))]
        body.end()
        if not self._structured:
            raise FormatError("structured replies come first")
        export = self._find(name)
        if not export:
            self._unknown(name)
            return
        if ALLOCATION in queries or (not selecting and (not queries or "base:" in queries)):
            # Ids mean nothing until a context is selected.
            self._reply(Reply.META_CONTEXT, struct.pack(">I", ALLOCATION_ID if selecting else 0) + ALLOCATION.encode())
            if selecting:
                self._mapped = export
        self._reply(Reply.ACK)

    _ANSWERS: Mapping[int, Callable[[Negotiation, bytes], Outcome]] = {
        Option.EXPORT_NAME: _export_name,
        Option.ABORT: _abort,
        Option.LIST: _list,
        Option.INFO: _info_or_go,
        Option.GO: _info_or_go,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
    }

    # ---- pieces of answers ----

    def _find(self, name: str) -> Export | None:
        return self._exports.get(name or self._default)

    def _unknown(self, name: str) -> None:
        self._reply(Reply.ERR_UNKNOWN, f"no export {name[:_ECHO]!r}".encode())

    def _size_and_flags(self, export: Export) -> bytes:
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN
        flags |= _WRITING if export.writable else TransmissionFlag.READ_ONLY
        if self._structured:
            flags |= TransmissionFlag.SEND_DF
        return struct.pack(">QH", export.size, flags)

    def _reply(self, kind: Reply, content: bytes = b"") -> None:
        self._outgoing += struct.pack(">QIII", _REPLY_MAGIC, self._option, kind, len(content)) + content

    def _reply_info(self, info: Info, content: bytes) -> None:
        self._reply(Reply.INFO, struct.pack(">H", info) + content)

    def _go(self, export: Export) -> Go:
        self._missing = 0
        return Go(export, self._structured, self._structured and self._mapped == export)

    def _close(self, reason: str) -> Closed:
        self._missing = 0
        return Closed(reason)
