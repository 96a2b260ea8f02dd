# SPDX-License-Identifier: Apache-2.0
"""Every dialect of tar gives the values its writer meant, and any other bytes a FormatError."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.archive import PIECE, Archive, Kind, Member
from formats.errors import FormatError
from formats.tarheader import BLOCK, EXTENSION_COUNT, EXTENSION_LIMIT
from tests.mutations import damaged, value_or_format_error
from tests.requires import scaled
from tests.tars import (
    END,
    GNU,
    USTAR,
    V7,
    binary,
    extension,
    file,
    folder,
    hardlink,
    header,
    octal,
    padded,
    pax,
    reader,
    summed,
    symlink,
)

Read = list[tuple[Member, bytes]]


def read(tar: bytes, piece: int = 1 << 20) -> Read:
    """Members with their content, holes as zeros."""
    archive = Archive(reader(tar, piece))
    found: Read = []
    for member in archive:
        content = bytearray(member.size if member.size < 1 << 24 else 0)
        for offset, part in archive.content():
            assert len(part) <= PIECE
            content[offset : offset + len(part)] = part
        found.append((member, bytes(content)))
    return found


def only(tar: bytes) -> Member:
    ((member, _),) = read(tar)
    return member


def refused(tar: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        read(tar)


# ---- headers ----


def test_all_kinds_and_their_fields() -> None:
    tar = b"".join(
        (
            folder(b"d/", mode=0o1777, uid=3, gid=4, mtime=5),
            file(b"d/f", b"content", mode=0o100644),
            hardlink(b"d/h", b"d/f"),
            symlink(b"d/s", b"../x/"),
            header(b"c", b"3", major=1, minor=3),
            header(b"b", b"4", major=259, minor=1 << 19),
            header(b"p", b"6"),
            header(b"contiguous", b"7", size=1) + padded(b"x"),
            END,
        )
    )
    found = read(tar)
    assert [(member.path, member.kind) for member, _ in found] == [
        (b"d/", Kind.DIRECTORY),
        (b"d/f", Kind.FILE),
        (b"d/h", Kind.HARDLINK),
        (b"d/s", Kind.SYMLINK),
        (b"c", Kind.CHARACTER),
        (b"b", Kind.BLOCK),
        (b"p", Kind.FIFO),
        (b"contiguous", Kind.FILE),
    ]
    members = [member for member, _ in found]
    assert (members[0].mode, members[0].uid, members[0].gid, members[0].mtime_ns) == (0o1777, 3, 4, 5 * 10**9)
    assert (members[1].mode, members[1].size, found[1][1]) == (0o644, 7, b"content")
    assert [member.link for member in members[2:4]] == [b"d/f", b"../x/"]
    assert [member.device for member in members[4:6]] == [(1, 3), (259, 1 << 19)]
    assert [member.offset for member in members[:3]] == [0, BLOCK, 3 * BLOCK]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    name=st.text("abc/é中", min_size=1, max_size=120).filter(lambda n: n.strip("/")),
    mode=st.integers(0, 0o7777),
    owner=st.integers(0, 0o7777777),
    content=st.binary(max_size=1200),
    kind=st.sampled_from((tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)),
)
def test_what_tarfile_writes_is_read(form: int, name: str, mode: int, owner: int, content: bytes, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid, info.type, info.mtime = mode, owner, owner // 2, kind, owner
        info.linkname = name[::-1] if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        info.size = len(content) if kind == tarfile.REGTYPE else 0
        try:
            archive.addfile(info, io.BytesIO(content))
        except ValueError:
            return  # a name that this format has no place for
    ((member, body),) = read(out.getvalue(), piece=700)
    assert member.path.rstrip(b"/") == name.encode().rstrip(b"/")
    assert (member.mode, member.uid, member.gid, member.mtime_ns) == (mode, owner, owner // 2, owner * 10**9)
    assert member.link == info.linkname.encode()
    assert body == (content if info.size else b"")


def test_a_v7_header_has_no_prefix_and_its_directories_end_in_a_slash() -> None:
    old = header(b"dir/", b"\0", magic=V7, prefix=b"not a prefix")
    assert (only(old).path, only(old).kind) == (b"dir/", Kind.DIRECTORY)
    assert only(header(b"file", b"\0", magic=V7)).kind is Kind.FILE


def test_prefixes_of_posix_star_and_old_go() -> None:
    assert only(header(b"name", prefix=b"the/prefix")).path == b"the/prefix/name"
    star = header(b"name", prefix=b"p" * 131 + b"00000000000 ", trailer=b"tar\0")
    assert only(star).path == b"p" * 131 + b"/name"
    # Go before 1.8 wrote prefixes into GNU headers, where GNU has times.
    assert only(header(b"name", magic=GNU, prefix=b"a/prefix/of/go")).path == b"a/prefix/of/go/name"
    assert only(header(b"name", magic=GNU, prefix=octal(1 << 30, 12) + octal(1 << 30, 12))).path == b"name"
    assert only(header(b"name", magic=GNU, prefix=b"\xff\xfe" * 12)).path == b"name"


@pytest.mark.parametrize("signed", [False, True])
def test_checksums_of_signed_and_unsigned_bytes(signed: bool) -> None:
    assert only(summed(header(b"\xff\xfe" * 40), signed)).path == b"\xff\xfe" * 40


@pytest.mark.parametrize("place", [0, 99, 100, 148, 150, 156, 300, 511])
def test_a_wrong_checksum_is_refused(place: int) -> None:
    block = bytearray(header(b"name" * 20))
    block[place] ^= 1
    refused(bytes(block), "tar header is damaged")


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"644", 0o644),
        (b"\0\0\0\0" + b"0644", 0o644),
        (b"644\0" + b"junk", 0o644),
        (b"", 0),
        (b"        ", 0),
        (binary(0x7FFFFFFF, 8), 0x7FFFFFFF),
        (binary(1 << 40, 8), 1 << 40),
    ],
)
def test_numbers(field: bytes, expected: int) -> None:
    assert only(header(b"x", uid=field)).uid == expected


@pytest.mark.parametrize("field", [b"0000648\0", b"-000644\0", b"0o644\0", b"6_4\0", b"+644\0", b"6 4\0", b"\x7f"])
@pytest.mark.parametrize("name", ["mode", "uid", "gid", "size", "mtime"])
def test_bad_numbers(field: bytes, name: str) -> None:
    refused(header(b"x", **{name: field}), "bad octal number")


@pytest.mark.parametrize("name", ["uid", "gid"])
def test_binary_numbers_that_are_impossible(name: str) -> None:
    refused(header(b"x", **{name: binary(-1, 8)}), "impossible number")
    refused(header(b"x", size=binary(-1, 12)), "impossible number")
    refused(header(b"x", size=binary(1 << 63, 12)), "impossible number")
    refused(header(b"x", mtime=binary(-(1 << 63) - 1, 12)), "impossible number")


@pytest.mark.parametrize("seconds", [-1, -(1 << 40), 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_times_before_1970_and_far_away(seconds: int) -> None:
    assert only(header(b"x", mtime=binary(seconds, 12))).mtime_ns == seconds * 10**9


@pytest.mark.parametrize("flag", [b"V", b"M", b"D", b"N", b"A", b"X", b"\xff", b"8"])
def test_unknown_types_are_refused(flag: bytes) -> None:
    refused(file(b"first", b"x") + header(b"x", flag) + END, "unknown tar entry type")


def test_only_files_have_content() -> None:
    """The size that some writers give links and directories means nothing."""
    tar = b"".join(header(b"x", flag, size=4096) for flag in (b"1", b"2", b"3", b"4", b"5", b"6"))
    assert [member.size for member, _ in read(tar + file(b"f", b"end"))] == [0] * 6 + [3]


# ---- pax and GNU extensions ----


def test_pax_records_override_the_header() -> None:
    records = {
        b"path": b"\xff/long" * 300,
        b"linkpath": b"target\n=x",
        b"uid": b"4294967294",
        b"gid": b"3000000000",
        b"mtime": b"1600000000.123456789",
        b"uname": b"nobody",
        b"SCHILY.xattr.user.b": b"\0\xff\n=",
        b"SCHILY.xattr.user.a=b": b"",
        b"unknown.key": b"ignored",
    }
    member = only(pax(records) + header(b"short", b"2", link=b"l", uid=b"garbage!", mtime=b"garbage!"))
    assert (member.path, member.link) == (b"\xff/long" * 300, b"target\n=x")
    assert (member.uid, member.gid, member.mtime_ns) == (4294967294, 3000000000, 1600000000123456789)
    assert member.xattrs == ((b"user.a", b"b="), (b"user.b", b"\0\xff\n="))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"0", 0),
        (b"12.", 12 * 10**9),
        (b"-1", -(10**9)),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"1.9999999999999", 1_999_999_999),
        (b"1.5", 1_500_000_000),
    ],
)
def test_pax_times(text: bytes, expected: int) -> None:
    assert only(pax({b"mtime": text}) + header(b"x")).mtime_ns == expected


@pytest.mark.parametrize("text", [b".5", b"-", b"1e3", b"1.5.2", b" 1", b"1.-5", b"9" * 20, b"+1"])
def test_bad_pax_times(text: bytes) -> None:
    refused(pax({b"mtime": text}) + header(b"x"), "bad mtime")


def test_pax_size_is_the_size() -> None:
    member, body = read(pax({b"size": b"600"}) + header(b"x") + padded(b"y" * 600))[0]
    assert (member.size, body) == (600, b"y" * 600)
    for value in (b"-1", b"0x10", b"9223372036854775808", b"1" * 30):
        refused(pax({b"size": value}) + header(b"x"), "bad size")
    for key in (b"uid", b"gid"):
        refused(pax({key: b"-5"}) + header(b"x"), f"bad {key.decode()}")


def test_global_records_hold_until_they_are_changed_or_taken_back() -> None:
    tar = (
        pax({b"uid": b"7", b"mtime": b"1.5", b"SCHILY.xattr.user.g": b"all", b"comment": b"c"}, b"g")
        + header(b"a")
        + pax({b"uid": b"8", b"SCHILY.xattr.user.l": b"one"})
        + header(b"b")
        + pax({b"uid": b"", b"mtime": b""})
        + header(b"c", uid=1, mtime=2)
        + pax({b"uid": b"9"}, b"g")
        + header(b"d")
    )
    members = [member for member, _ in read(tar)]
    assert [member.uid for member in members] == [7, 8, 1, 9]
    assert [member.mtime_ns for member in members] == [1_500_000_000, 1_500_000_000, 2_000_000_000, 1_500_000_000]
    assert members[1].xattrs == ((b"user.g", b"all"), (b"user.l", b"one"))
    assert members[3].xattrs == ((b"user.g", b"all"),)


def test_global_records_are_bounded() -> None:
    part = {b"k%d" % i: b"v" * 1000 for i in range(40)}
    tar = pax(part, b"g") + pax({b"x" + key: value for key, value in part.items()}, b"g") + header(b"x")
    refused(tar, "bytes of global pax records")


def test_libarchives_own_xattrs() -> None:
    records = {
        b"LIBARCHIVE.xattr.user.%C3%A9": b"AP8K",
        b"LIBARCHIVE.xattr.user.unpadded": b"YQ",
        b"LIBARCHIVE.xattr.user.both": b"eA==",
        b"SCHILY.xattr.user.both": b"schily",
    }
    assert only(pax(records) + header(b"x")).xattrs == (
        (b"user.both", b"schily"),
        (b"user.unpadded", b"a"),
        ("user.é".encode(), b"\0\xff\n"),
    )
    refused(pax({b"LIBARCHIVE.xattr.user.x": b"!!"}) + header(b"x"), "bad base64")
    refused(pax({b"LIBARCHIVE.xattr.user.x": b"A"}) + header(b"x"), "bad base64")


def test_gnu_long_names() -> None:
    tar = extension(b"L", b"n" * 300 + b"\0") + extension(b"K", b"l" * 300 + b"\0") + symlink(b"n", b"l", magic=GNU)
    assert (only(tar).path, only(tar).link) == (b"n" * 300, b"l" * 300)
    both = pax({b"path": b"pax"}) + extension(b"L", b"gnu\0") + header(b"x")
    assert only(both).path == b"gnu"


@pytest.mark.parametrize("key", [b"path", b"linkpath", b"GNU.sparse.name"])
def test_a_nul_in_a_name_is_refused(key: bytes) -> None:
    refused(pax({key: b"a\0b"}) + header(b"x"), "NUL")


BAD_RECORDS = [
    b"8 path=x\n",
    b"11 path=x\n",
    b"0 path=x\n",
    b"x",
    b"9 path x\n",
    b"99 path=x\n",
    b"-9 path=x\n",
    b"9 path=x\n" + bytes(9),
]


@pytest.mark.parametrize("body", BAD_RECORDS)
def test_bad_pax_records(body: bytes) -> None:
    assert only(extension(b"x", b"9 path=x\n") + header(b"y")).path == b"x"
    refused(extension(b"x", body) + header(b"x"), "bad pax record")


def test_extensions_are_bounded() -> None:
    refused(header(b"x", b"x", size=EXTENSION_LIMIT + 1), "extension header of")
    refused(header(b"x", b"L", size=octal((1 << 33) - 1, 12)), "extension header of")
    most = pax({b"uid": b"1"}) * EXTENSION_COUNT
    assert only(most + header(b"x")).uid == 1
    refused(most + pax({b"uid": b"1"}) + header(b"x"), "tar extension headers")


def test_an_extension_needs_its_member() -> None:
    refused(pax({b"path": b"x"}), "ends after an extension header")
    refused(extension(b"L", b"x") + END, "ends after an extension header")
    assert read(pax({b"comment": b"x"}, b"g") + END) == []


# ---- sparse files ----


def sparse_entries(*pairs: tuple[int, int], room: int) -> bytes:
    return b"".join(octal(offset, 12) + octal(length, 12) for offset, length in pairs).ljust(room, b"\0")


def test_old_gnu_sparse_files() -> None:
    pairs = [(512 * i, 10) for i in range(30)]
    further = sparse_entries(*pairs[4:25], room=504) + b"\1".ljust(8, b"\0") + sparse_entries(*pairs[25:], room=512)
    tar = (
        header(
            b"s",
            b"S",
            magic=GNU,
            size=300,
            sparse=sparse_entries(*pairs[:4], room=96),
            goes_on=b"\1",
            real_size=20000,
        )
        + further
        + padded(b"x" * 300)
        + file(b"after")
    )
    (member, body), (after, _) = read(tar, piece=513)
    expected = bytearray(20000)
    for offset, _ in pairs:
        expected[offset : offset + 10] = b"x" * 10
    assert (member.size, body, after.path) == (20000, bytes(expected), b"after")


PARTS = [(100, 3), (1000, 4)]
SPARSE = bytes(100) + b"abc" + bytes(897) + b"defg" + bytes(996)


@pytest.mark.parametrize("form", ["0.0", "0.1", "1.0"])
def test_pax_sparse_files(form: str) -> None:
    body = b"abcdefg"
    if form == "0.0":
        records = [(b"GNU.sparse.size", b"2000"), (b"GNU.sparse.numblocks", b"2")]
        for offset, length in PARTS:
            records += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
    elif form == "0.1":
        records = [(b"GNU.sparse.size", b"2000"), (b"GNU.sparse.map", b"100,3,1000,4")]
        records += [(b"GNU.sparse.name", b"right"), (b"GNU.sparse.numblocks", b"2")]
    else:
        records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"2000")]
        records += [(b"GNU.sparse.name", b"right")]
        body = padded(b"2\n100\n3\n1000\n4\n") + body
    (member, content), (after, _) = read(
        pax(records) + file(b"right" if form == "0.0" else b"wrong", body) + file(b"z")
    )
    assert (member.path, member.size, content, after.path) == (b"right", 2000, SPARSE, b"z")


def test_a_file_of_one_hole_takes_no_memory() -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"%d" % ((1 << 63) - 1)}
    archive = Archive(reader(pax(records) + file(b"x", padded(b"0\n"))))
    assert next(archive).size == (1 << 63) - 1
    assert list(archive.content()) == []
    assert list(archive) == []


V10 = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"100"}
V01 = {b"GNU.sparse.size": b"100"}


@pytest.mark.parametrize(
    ("tar", "why"),
    [
        (pax(V10) + file(b"x", padded(b"2\n5\n1\n0\n1\n") + b"ab"), "goes back"),
        (pax(V10) + file(b"x", padded(b"2\n5\n2\n6\n1\n") + b"abc"), "goes back"),
        (pax(V10) + file(b"x", padded(b"1\n99\n2\n") + b"ab"), "does not fit"),
        (pax(V10) + file(b"x", padded(b"1\n9\n3\n") + b"ab"), "does not fit"),
        (pax(V10) + file(b"x", padded(b"0\n") + b"ab"), "does not fit"),
        (pax(V10) + file(b"x", padded(b"1\n9\n")), "without an end"),
        (pax(V10) + file(b"x", b"1\n9\n0\n"), "without an end"),
        (pax(V10) + file(b"x", padded(b"1\n-9\n0\n")), "bad GNU.sparse.map"),
        (pax(V10) + file(b"x", padded(b"9" * 30 + b"\n")), "bad GNU.sparse.map"),
        (pax(V10) + file(b"x", padded(b"9" * 18 + b"\n")), "without an end"),
        (pax(V10) + header(b"x", size=2 << 20) + bytes(b"\n" * (2 << 20)), "bad GNU.sparse.map"),
        (pax(V10) + header(b"x", size=2 << 20) + b"9" * (2 << 20), "without an end"),
        (pax(V10 | {b"GNU.sparse.minor": b"7"}) + file(b"x"), "unknown form"),
        (pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}) + file(b"x"), "unknown form"),
        (pax(V01 | {b"GNU.sparse.map": b"1,2,3"}) + file(b"x", b"ab"), "odd count"),
        (pax(V01 | {b"GNU.sparse.map": b"1,,2"}) + file(b"x", b"ab"), "bad GNU.sparse.map"),
        (pax([(b"GNU.sparse.numbytes", b"1"), *V01.items()]) + file(b"x"), "bad sparse map"),
        (pax([(b"GNU.sparse.offset", b"1,2"), *V01.items()]) + file(b"x"), "bad sparse map"),
        (header(b"x", b"S", magic=GNU, goes_on=b"\1"), "without an end"),
        (header(b"x", b"S", magic=GNU, goes_on=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 2049, "without an end"),
        (header(b"x", b"S", magic=GNU, real_size=b"nonsense"), "bad octal"),
        (header(b"x", b"S", magic=GNU, size=5, real_size=5), "does not fit"),
    ],
)
def test_sparse_maps_that_lie(tar: bytes, why: str) -> None:
    refused(tar, why)


# ---- the stream ----


def test_end_blocks_may_be_missing_and_what_follows_them_is_not_read() -> None:
    tar = file(b"a", b"content")
    for end in (b"", bytes(BLOCK), END, END + b"anything", bytes(100 * BLOCK)):
        assert [member.path for member, _ in read(tar + end)] == [b"a"]
    assert [body for _, body in read(tar[: BLOCK + 7])] == [b"content"]
    assert read(b"") == []


def test_a_lone_block_of_zeros_is_refused() -> None:
    refused(file(b"a") + bytes(BLOCK) + file(b"b") + END, "after a block of zeros")


@pytest.mark.parametrize("cut", [1, 511, BLOCK + 1, BLOCK + 6])
def test_a_cut_tar_is_refused(cut: int) -> None:
    refused(file(b"a", b"content")[:cut], "the tar ends")


@given(piece=st.integers(1, 3000), take=st.integers(0, 3))
def test_pieces_of_any_size_and_content_that_nobody_reads(piece: int, take: int) -> None:
    sizes = [0, 1, 511, 512, 513, 5000]
    tar = b"".join(file(b"%d" % size, b"x" * size) for size in sizes) + END
    archive = Archive(reader(tar, piece))
    for member, size in zip(archive, sizes, strict=True):
        assert member.size == size
        for _, (offset, part) in zip(range(take), archive.content(), strict=False):
            assert bytes(part) == b"x" * len(part)
            assert offset + len(part) <= size


def test_a_size_that_the_stream_does_not_have_is_an_error_at_once() -> None:
    refused(header(b"x", size=binary((1 << 63) - 1, 12)) + b"x" * 5000, "the tar ends 9223372036854770807 bytes before")


SEEDS = [
    file(b"a", b"content") + folder(b"d") + hardlink(b"h", b"a") + END,
    pax({b"path": b"x" * 200, b"mtime": b"-1.5", b"SCHILY.xattr.user.x": b"\0"}) + file(b"a", b"xyz") + END,
    pax(V10) + file(b"x", padded(b"1\n9\n2\n") + b"ab") + END,
    header(b"x", b"S", magic=GNU, size=2, real_size=5, sparse=octal(1, 12) + octal(2, 12)) + padded(b"ab") + END,
    extension(b"L", b"l" * 150) + header(b"x", uid=binary(1 << 40, 8), magic=GNU) + END,
    pax({b"LIBARCHIVE.xattr.user.x": b"AAAA", b"uid": b"5"}, b"g") + symlink(b"s", b"t", magic=USTAR) + END,
]


def resummed(tar: bytes) -> bytes:
    """Every block that looks like a header, with a right checksum."""
    blocks = [tar[at : at + BLOCK] for at in range(0, len(tar), BLOCK)]
    return b"".join(summed(block) if block[257:262] == b"ustar" and len(block) == BLOCK else block for block in blocks)


@settings(max_examples=scaled(300, 20_000))
@given(content=damaged(SEEDS, hot=[range(100, 160), range(512, 600), range(1024 + 100, 1024 + 160)]), fix=st.booleans())
def test_damaged_tars_are_values_or_format_errors(content: bytes, fix: bool) -> None:
    tar = resummed(content) if fix else content
    value_or_format_error(lambda: read(tar))
