# SPDX-License-Identifier: Apache-2.0
"""The wrapper is overlaybd's to the byte, and every tar shape met in the wild leads to its payload."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import tar
from formats.errors import FormatError
from formats.readat import BytesAt
from formats.tar import Payload, find_payload
from tests import fixtures, requires
from tests.mutations import damaged, value_or_format_error

WRAPPED = ("05-tar-wrapped/basic.lz4-4k.tar", "05-tar-wrapped/basic.zfile-tool.tar", "05-tar-wrapped/a-l2.tar")
LONG = "a/" * 90 + "overlaybd.commit"  # too long for a ustar header with its prefix


def made_by_tarfile(form: int, name: str = "overlaybd.commit", **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        member = tarfile.TarInfo(name)
        member.size = 5
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(b"layer"))
    return out.getvalue()


def wrapped(content: bytes) -> bytes:
    return tar.wrap_head(len(content)) + content + tar.wrap_tail(len(content))


def with_checksums(blob: bytes) -> bytes:
    """Blocks 0 and 2 with right checksums, so that damage elsewhere in them gets past the first check."""
    fixed = bytearray(blob)
    for start in (0, 1024):
        block = fixed[start : start + 512]
        if len(block) == 512:
            fixed[start + 148 : start + 156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:])
    return bytes(fixed)


@pytest.mark.parametrize("path", WRAPPED)
def test_the_wrapper_is_byte_exact(path: str) -> None:
    blob = (fixtures.folder() / path).read_bytes()
    payload = find_payload(BytesAt(blob))
    assert payload is not None
    assert (payload.base, payload.name) == (tar.WRAP_HEAD_SIZE, "overlaybd.commit")
    assert tar.wrap_head(payload.length) == blob[: payload.base]
    assert tar.wrap_tail(payload.length) == blob[payload.base + payload.length :]


def test_the_golden_fields_of_the_wrapper() -> None:
    head = tar.wrap_head(5470)
    assert head[512:527] == b"13 size=5470\n\0\0"
    assert head[124:136] == b"         15 "
    assert (head[148:156], head[1024:][148:156], head[1024:][100:108]) == (b"  5354 \0", b" 12025 \0", b"100644 \0")


@given(st.integers(0, 1 << 62))
def test_a_size_of_any_length_is_found_again(size: int) -> None:
    """The record counts its own digits: 98 or 998 bytes of size text must not confuse it."""
    head = tar.wrap_head(size)
    record = head[512 : head.index(b"\n") + 1]
    assert int(record.split(b" ")[0]) == len(record)
    assert int(record.split(b"=")[1]) == size


@given(st.binary(max_size=3000).filter(bool))
def test_what_is_wrapped_is_found(content: bytes) -> None:
    blob = wrapped(content)
    assert len(blob) % tar.BLOCK == 0
    assert find_payload(BytesAt(blob)) == Payload(tar.WRAP_HEAD_SIZE, len(content), "overlaybd.commit")
    with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
        member = archive.extractfile("overlaybd.commit")
        assert member is not None
        assert member.read() == content


@pytest.mark.parametrize(
    "blob",
    [
        made_by_tarfile(tarfile.USTAR_FORMAT),
        made_by_tarfile(tarfile.GNU_FORMAT),
        made_by_tarfile(tarfile.GNU_FORMAT, uid=1 << 40),
        made_by_tarfile(tarfile.PAX_FORMAT, pax_headers={"mtime": "1672531200.5"}),
        made_by_tarfile(tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 3000}),
    ],
    ids=["ustar", "gnu", "gnu-binary-number", "pax", "pax-of-several-blocks"],
)
def test_other_writers_tars_lead_to_the_payload(blob: bytes) -> None:
    payload = find_payload(BytesAt(blob))
    assert payload is not None
    assert (payload.length, payload.name) == (5, "overlaybd.commit")
    assert blob[payload.base : payload.base + 5] == b"layer"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_long_name_is_read_from_its_extension(form: int) -> None:
    payload = find_payload(BytesAt(made_by_tarfile(form, LONG)))
    assert payload is not None
    assert (payload.name, payload.length) == (LONG, 5)


def test_a_ustar_prefix_belongs_to_the_name() -> None:
    payload = find_payload(BytesAt(made_by_tarfile(tarfile.USTAR_FORMAT, "d" * 90 + "/" + "f" * 90)))
    assert payload is not None
    assert payload.name == "d" * 90 + "/" + "f" * 90


def test_a_global_pax_header_is_passed_over() -> None:
    blob = made_by_tarfile(tarfile.PAX_FORMAT)
    pax = tarfile.TarInfo.create_pax_global_header({"comment": "all"})
    payload = find_payload(BytesAt(pax + blob))
    assert payload == Payload(len(pax) + 512, 5, "overlaybd.commit")


def test_zeros_after_the_archive_do_not_matter() -> None:
    blob = wrapped(b"layer")
    assert find_payload(BytesAt(blob + bytes(1024))) == find_payload(BytesAt(blob))


def test_signed_checksums_of_old_writers_count() -> None:
    blob = bytearray(made_by_tarfile(tarfile.USTAR_FORMAT, "\u00e9"))
    signed = sum(byte - 256 * (byte > 127) for byte in blob[:148] + b" " * 8 + blob[156:512])
    blob[148:156] = b"%06o\0 " % signed
    assert find_payload(BytesAt(bytes(blob))) is not None


@pytest.mark.parametrize("blob", [b"", b"x" * 511, bytes(1024), b"ustar" * 300, wrapped(b"")[1:]])
def test_what_is_no_tar_is_none(blob: bytes) -> None:
    assert find_payload(BytesAt(blob)) is None


@pytest.mark.parametrize("place", [0, 124, 257])
def test_a_first_header_with_a_wrong_checksum_is_no_tar(place: int) -> None:
    blob = bytearray(wrapped(b"layer"))
    blob[place] ^= 1
    assert find_payload(BytesAt(bytes(blob))) is None


@pytest.mark.parametrize(
    "blob",
    [
        wrapped(b"layer")[:1540],
        wrapped(b"layer")[:1300],
        wrapped(b"layer")[:600],
        tar.wrap_head(5)[:1024] + bytes(4096),
        made_by_tarfile(tarfile.USTAR_FORMAT, type=tarfile.DIRTYPE),
        made_by_tarfile(tarfile.USTAR_FORMAT, type=tarfile.SYMTYPE),
        tar.wrap_head(5)[:1024] * 40 + wrapped(b"layer"),
    ],
    ids=["cut-payload", "cut-header", "cut-record", "no-member", "directory", "symlink", "endless-extensions"],
)
def test_a_tar_without_a_whole_regular_member_is_refused(blob: bytes) -> None:
    with pytest.raises(FormatError):
        find_payload(BytesAt(blob))


@pytest.mark.parametrize(
    "record",
    [
        b"13 size=-470\n",
        b"13 size= 470\n",
        b"99 size=5470\n",
        b"12 size=5470\n",
        b"x3 size=5470\n",
        b" 3 size=5470\n",
        b"5 abc\n",
        b"5",
        b"",
    ],
)
def test_a_bad_pax_record_is_refused(record: bytes) -> None:
    pax = tar.wrap_head(5470)
    with pytest.raises(FormatError):
        find_payload(BytesAt(pax[:512] + record.ljust(512, b"\0") + pax[1024:] + bytes(8192)))


def test_an_extension_header_of_megabytes_is_refused() -> None:
    body = (1 << 20) + 512
    pax = bytearray(tar.wrap_head(5)[:512])
    pax[124:136] = b"%011o " % body
    with pytest.raises(FormatError, match="extension header"):
        find_payload(BytesAt(with_checksums(bytes(pax)) + bytes(body) + wrapped(b"layer")))


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\x80\0\0\0" + b"\xff" * 8, b"12345678901x"], ids=["negative", "64-bit", "9"]
)
def test_a_size_that_cannot_be_is_refused(size: bytes) -> None:
    blob = bytearray(made_by_tarfile(tarfile.GNU_FORMAT))
    blob[124:136] = size
    with pytest.raises(FormatError, match="number"):
        find_payload(BytesAt(with_checksums(bytes(blob))))


def test_gnu_tars_keep_times_where_others_have_the_prefix() -> None:
    blob = bytearray(made_by_tarfile(tarfile.GNU_FORMAT))
    blob[345:357] = b"14400000000\0"
    payload = find_payload(BytesAt(with_checksums(bytes(blob))))
    assert payload is not None
    assert payload.name == "overlaybd.commit"


SEEDS = [
    wrapped(b"layer"),
    made_by_tarfile(tarfile.GNU_FORMAT, LONG),
    made_by_tarfile(tarfile.PAX_FORMAT, pax_headers={"mtime": "1.5", "comment": "y" * 600}),
]


@settings(deadline=None, max_examples=requires.scaled(300, 20_000))
@given(damaged(SEEDS, hot=[range(124, 160), range(512, 560), range(1024 + 124, 1024 + 160)]), st.booleans())
def test_any_bytes_give_a_payload_within_them_or_a_format_error(blob: bytes, fix: bool) -> None:
    blob = with_checksums(blob) if fix else blob
    payload = value_or_format_error(lambda: find_payload(BytesAt(blob)))
    if isinstance(payload, Payload):
        assert 0 <= payload.base <= payload.base + payload.length <= len(blob)
