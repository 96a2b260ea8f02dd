# SPDX-License-Identifier: Apache-2.0
"""The server's side of NBD negotiation, byte by byte, and against bytes nobody would send."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import nbdwire
from formats.errors import FormatError
from formats.nbdwire import Closed, Export, Go, Info, Negotiation, Option, Reply, TransmissionFlag

DISK = Export("disk", 123456789, "a disk")
OTHER = Export("other", 1)
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN
MODERN = struct.pack(">I", 3)  # fixed newstyle, no zeroes


def negotiation(*sent: bytes) -> Negotiation:
    """A negotiation that has got so far, its output so far taken."""
    made = Negotiation({DISK.name: DISK, OTHER.name: OTHER}, DISK.name)
    made.to_send()
    for content in (MODERN, *sent):
        assert feed(made, content) is None
    made.to_send()
    return made


def feed(made: Negotiation, content: bytes) -> Go | Closed | None:
    """All of content, in pieces as large as are wanted; returns the outcome of the last."""
    outcome = None
    while content:
        assert outcome is None
        wanted = made.wanted
        assert wanted > 0
        outcome = made.receive(content[:wanted])
        content = content[wanted:]
    return outcome


def option(number: int, body: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(body)) + body


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(encoded)) + encoded


def go_body(name: str, *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_body(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def replies(made: Negotiation) -> list[tuple[int, Reply, bytes]]:
    """What was answered: option, kind of reply, content."""
    return list(_replies(made.to_send()))


def _replies(sent: bytes) -> Iterator[tuple[int, Reply, bytes]]:
    while sent:
        magic, number, kind, length = struct.unpack(">QIII", sent[:20])
        assert magic == 0x3E889045565A9
        assert len(sent) >= 20 + length
        yield number, Reply(kind), sent[20 : 20 + length]
        sent = sent[20 + length :]


def answer(sent: bytes, *before: bytes) -> list[tuple[Reply, bytes]]:
    """The replies to one option, which must not end the negotiation."""
    made = negotiation(*before)
    assert feed(made, sent) is None
    number = int.from_bytes(sent[8:12], "big")
    answered = replies(made)
    assert {of for of, _, _ in answered} == {number}
    return [(kind, content) for _, kind, content in answered]


def error(sent: bytes, *before: bytes) -> Reply:
    [(kind, text)] = answer(sent, *before)
    assert text.decode()
    return kind


def test_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    made = Negotiation({"": DISK}, "")
    assert made.to_send() == b"NBDMAGICIHAVEOPT\0\3"
    assert made.to_send() == b""
    assert made.wanted == 4


@pytest.mark.parametrize("name", ["", "disk"])
@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0), (0, 124)])
def test_export_name_answers_size_and_flags(name: str, flags: int, padding: int) -> None:
    made = Negotiation({DISK.name: DISK}, DISK.name)
    made.to_send()
    assert feed(made, struct.pack(">I", flags)) is None
    assert feed(made, option(Option.EXPORT_NAME, name.encode())) == Go(DISK, structured=False, allocation=False)
    assert made.to_send() == struct.pack(">QH", DISK.size, FLAGS) + bytes(padding)
    assert made.wanted == 0


@pytest.mark.parametrize("name", [b"nowhere", b"\xff", b"x" * 4097, b"x" * (nbdwire.OPTION_MAX)])
def test_export_name_has_no_error_reply_but_a_hang_up(name: bytes) -> None:
    made = negotiation()
    assert isinstance(feed(made, option(Option.EXPORT_NAME, name)), Closed)
    assert made.to_send() == b""


def test_oversized_export_name_is_refused_by_its_head() -> None:
    made = negotiation()
    assert isinstance(made.receive(struct.pack(">8sII", b"IHAVEOPT", 1, nbdwire.OPTION_MAX + 1)), Closed)


def test_abort_is_acknowledged_and_ends() -> None:
    made = negotiation()
    assert isinstance(feed(made, option(Option.ABORT)), Closed)
    assert replies(made) == [(Option.ABORT, Reply.ACK, b"")]


def test_list_names_every_export_once() -> None:
    assert answer(option(Option.LIST)) == [
        (Reply.SERVER, string("disk") + b"a disk"),
        (Reply.SERVER, string("other")),
        (Reply.ACK, b""),
    ]
    assert error(option(Option.LIST, b"x")) == Reply.ERR_INVALID


@pytest.mark.parametrize("name", ["", "disk"])
def test_info_tells_what_is_asked_for_and_goes_on(name: str) -> None:
    everything = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 999)
    assert answer(option(Option.INFO, go_body(name, *everything))) == [
        (Reply.INFO, struct.pack(">HQH", 0, DISK.size, FLAGS)),
        (Reply.INFO, b"\0\1disk"),
        (Reply.INFO, b"\0\2a disk"),
        (Reply.INFO, struct.pack(">HIII", 3, 1, 64 << 10, 32 << 20)),
        (Reply.ACK, b""),
    ]
    assert answer(option(Option.INFO, go_body("other", Info.DESCRIPTION))) == [
        (Reply.INFO, struct.pack(">HQH", 0, OTHER.size, FLAGS)),
        (Reply.ACK, b""),
    ]


def test_go_starts_the_transmission() -> None:
    made = negotiation()
    assert feed(made, option(Option.GO, go_body("other"))) == Go(OTHER, structured=False, allocation=False)
    assert replies(made) == [
        (Option.GO, Reply.INFO, struct.pack(">HQH", 0, OTHER.size, FLAGS)),
        (Option.GO, Reply.ACK, b""),
    ]
    assert made.wanted == 0


def test_structured_replies_bring_dont_fragment() -> None:
    made = negotiation(option(Option.STRUCTURED_REPLY))
    assert feed(made, option(Option.GO, go_body(""))) == Go(DISK, structured=True, allocation=False)
    assert replies(made)[0][2] == struct.pack(">HQH", 0, DISK.size, FLAGS | TransmissionFlag.SEND_DF)
    assert answer(option(Option.STRUCTURED_REPLY)) == [(Reply.ACK, b"")]
    assert error(option(Option.STRUCTURED_REPLY, b"x")) == Reply.ERR_INVALID


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        string("disk"),
        go_body("disk") + b"x",
        go_body("disk", 1)[:-1],
        string("disk") + struct.pack(">H", 65535),
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        string(b"\xff\xfe") + b"\0\0",
        string("x" * 4097) + b"\0\0",
    ],
)
def test_malformed_info_is_refused_and_negotiation_goes_on(number: Option, body: bytes) -> None:
    assert error(option(number, body)) == Reply.ERR_INVALID
    made = negotiation(option(number, body))
    assert isinstance(feed(made, option(Option.GO, go_body("disk"))), Go)


@pytest.mark.parametrize("number", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_unknown_export_is_said_so(number: Option) -> None:
    meta = number in {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}
    body = context_body("nowhere") if meta else go_body("nowhere")
    assert error(option(number, body), option(Option.STRUCTURED_REPLY)) == Reply.ERR_UNKNOWN


@pytest.mark.parametrize("number", [Option.STARTTLS, 0, 4, 11, 0xFFFFFFFF])
@pytest.mark.parametrize("body", [b"", b"whatever"])
def test_unsupported_options_are_refused_and_negotiation_goes_on(number: int, body: bytes) -> None:
    assert error(option(number, body)) == Reply.ERR_UNSUP
    assert answer(option(Option.STRUCTURED_REPLY), option(number, body)) == [(Reply.ACK, b"")]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        (("base:allocation",), True),
        (("base:", "base:allocation", "base:allocation"), True),
        (("qemu:allocation-depth", "base:other"), False),
    ],
)
def test_contexts_are_listed_by_query(queries: tuple[str, ...], found: bool) -> None:
    context = [(Reply.META_CONTEXT, b"\0\0\0\0base:allocation")] if found else []
    answered = answer(option(Option.LIST_META_CONTEXT, context_body("disk", *queries)), option(Option.STRUCTURED_REPLY))
    assert answered == [*context, (Reply.ACK, b"")]


def test_selected_context_is_in_the_outcome() -> None:
    select = option(Option.SET_META_CONTEXT, context_body("", "x:y", "base:allocation"))
    assert answer(select, option(Option.STRUCTURED_REPLY)) == [
        (Reply.META_CONTEXT, b"\0\0\0\1base:allocation"),
        (Reply.ACK, b""),
    ]
    made = negotiation(option(Option.STRUCTURED_REPLY), select)
    assert feed(made, option(Option.GO, go_body("disk"))) == Go(DISK, structured=True, allocation=True)


@pytest.mark.parametrize(
    "then",
    [
        context_body("disk"),
        context_body("disk", "base:"),
        context_body("nowhere", "base:allocation"),
        context_body("other", "base:allocation"),
        b"malformed",
    ],
)
def test_a_later_selection_replaces_the_earlier(then: bytes) -> None:
    select = option(Option.SET_META_CONTEXT, context_body("disk", "base:allocation"))
    made = negotiation(option(Option.STRUCTURED_REPLY), select, option(Option.SET_META_CONTEXT, then))
    assert feed(made, option(Option.GO, go_body("disk"))) == Go(DISK, structured=True, allocation=False)


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies_and_sound_queries(number: Option) -> None:
    assert error(option(number, context_body("disk", "base:allocation"))) == Reply.ERR_INVALID
    for body in (b"", string("disk"), context_body("disk", "a") + b"x", string("disk") + b"\xff\xff\xff\xff"):
        assert error(option(number, body), option(Option.STRUCTURED_REPLY)) == Reply.ERR_INVALID


def test_oversized_option_is_skipped_without_being_kept() -> None:
    made = negotiation()
    length = nbdwire.SKIP_MAX
    assert made.receive(struct.pack(">8sII", b"IHAVEOPT", Option.GO, length)) is None
    while length:
        assert 0 < made.wanted <= nbdwire.OPTION_MAX
        assert made.to_send() == b""
        step = made.wanted
        assert made.receive(bytes(step)) is None
        length -= step
    [(_, kind, _)] = replies(made)
    assert kind == Reply.ERR_TOO_BIG
    assert isinstance(feed(made, option(Option.GO, go_body(""))), Go)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">8sII", b"IHAVEOPT", Option.GO, nbdwire.SKIP_MAX + 1),
        struct.pack(">8sII", b"IHAVEOPT", 77, 0xFFFFFFFF),
        struct.pack(">8sII", b"ihaveopt", Option.GO, 0),
    ],
)
def test_beyond_limits_or_out_of_step_is_hung_up_on(sent: bytes) -> None:
    made = negotiation()
    assert isinstance(feed(made, sent), Closed)
    assert made.to_send() == b""


def test_unknown_client_flags_are_hung_up_on() -> None:
    assert isinstance(feed(Negotiation({"": DISK}, ""), struct.pack(">I", 4)), Closed)


def test_a_client_without_fixed_newstyle_gets_no_option_replies() -> None:
    made = Negotiation({"": DISK}, "")
    assert feed(made, struct.pack(">I", 0)) is None
    made.to_send()
    assert isinstance(feed(made, option(Option.LIST)), Closed)
    assert made.to_send() == b""


def test_the_number_of_options_is_limited() -> None:
    made = negotiation(*[option(Option.LIST)] * nbdwire.OPTIONS_MAX)
    assert isinstance(made.receive(option(Option.LIST)[:16]), Closed)


def test_more_than_wanted_is_the_callers_mistake() -> None:
    made = negotiation()
    with pytest.raises(ValueError):
        made.receive(bytes(17))
    feed(made, option(Option.GO, go_body("")))
    with pytest.raises(ValueError):
        made.receive(b"x")


@pytest.mark.parametrize("name", ["x" * 4097, "\ud800"])
def test_names_the_wire_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Export(name, 1)


BODIES = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda name, infos: go_body(name, *infos), st.text(max_size=8), st.lists(st.integers(0, 5), max_size=3)),
    st.builds(lambda queries: context_body("disk", *queries), st.lists(st.text(max_size=16), max_size=3)),
)
OPTIONS = st.builds(option, st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF)), BODIES)


@given(
    sent=st.lists(st.one_of(OPTIONS, st.binary(max_size=40)), max_size=12).map(b"".join),
    flags=st.sampled_from([MODERN, b"\0\0\0\1", b"\0\0\0\0"]),
    pieces=st.lists(st.integers(1, 50), min_size=1),
)
def test_any_bytes_in_any_pieces_get_well_formed_answers(sent: bytes, flags: bytes, pieces: list[int]) -> None:
    made = Negotiation({DISK.name: DISK}, DISK.name)
    made.to_send()
    sent = flags + sent
    outcome = None
    while sent and outcome is None:
        step = min(pieces[len(sent) % len(pieces)], made.wanted)
        assert step > 0
        outcome = made.receive(sent[:step])
        sent = sent[step:]
        if not isinstance(outcome, Go):  # EXPORT_NAME is answered without a head
            list(_replies(made.to_send()))
    assert isinstance(outcome, Go | Closed | None)
    assert (made.wanted == 0) == (outcome is not None)
