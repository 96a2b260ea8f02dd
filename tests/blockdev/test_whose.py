# SPDX-License-Identifier: Apache-2.0
"""What becomes of an entry's parts, by what its head says and who wants the blob."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from blockdev import entryfiles, whose
from blockdev.config import Policy
from blockdev.errors import CorruptImage
from blockdev.source import Spilled
from blockdev.whose import OfAnother, Word
from formats import presence
from formats.errors import FormatError
from formats.presence import Head
from tests.claimants import DIGEST, EVIL_PAYLOAD, GOOD, HERE, SIZE, TABLE, THERE, WAIT, Bench

NOBODYS = Head(DIGEST, SIZE, verified=False)
OURS = replace(NOBODYS, repository="us")
THEIRS = replace(NOBODYS, repository="them")
HELD = replace(OURS, table="table")
SEALED = replace(THEIRS, verified=True)


@pytest.mark.parametrize(
    ("found", "wanted", "empty", "becomes"),
    [
        (OURS, OURS, False, OURS),
        (HELD, OURS, False, OURS),
        (HELD, replace(THEIRS, table="table"), False, HELD),
        (OURS, HELD, False, NOBODYS),
        (THEIRS, HELD, False, NOBODYS),
        (THEIRS, HELD, True, HELD),
        (HELD, replace(HELD, table="other"), False, NOBODYS),
        (SEALED, OURS, False, SEALED),
        (SEALED, HELD, False, replace(HELD, verified=True)),
        (THEIRS, OURS, False, FormatError),
        (NOBODYS, OURS, False, FormatError),
        (replace(HELD, repository="them"), OURS, False, FormatError),
        (replace(OURS, size=9), OURS, False, FormatError),
        (replace(THEIRS, size=9), OURS, True, FormatError),
        (replace(THEIRS, size=9), OURS, False, OfAnother),
        (replace(SEALED, size=9), OURS, False, CorruptImage),
    ],
)
def test_what_nobody_has_open_is_taken_over(
    found: Head, wanted: Head, *, empty: bool, becomes: Head | type[Exception]
) -> None:
    def taken() -> Head:
        return whose.taken_over(found, wanted, lambda: empty)

    if isinstance(becomes, Head):
        assert taken() == becomes
    else:
        with pytest.raises(becomes):
            taken()


@pytest.mark.parametrize(
    ("head", "wanted", "awaits_table", "suits"),
    [
        (OURS, OURS, None, True),
        (THEIRS, OURS, None, False),
        (replace(OURS, size=9), OURS, None, False),
        (HELD, OURS, None, True),
        (HELD, replace(THEIRS, table="table"), None, True),
        (HELD, replace(OURS, table="other"), None, False),
        (OURS, HELD, None, False),
        (NOBODYS, HELD, True, True),
        (NOBODYS, HELD, False, False),
        (NOBODYS, OURS, False, False),
        (NOBODYS, NOBODYS, False, False),
    ],
)
def test_what_others_have_open_is_used_by_who_believes_them(
    head: Head, wanted: Head, *, awaits_table: bool | None, suits: bool
) -> None:
    assert whose.admits(head, wanted, verified=False, awaits_table=awaits_table) == suits
    if head.size == wanted.size:
        assert whose.admits(head, wanted, verified=True, awaits_table=awaits_table)
    else:
        with pytest.raises(CorruptImage):
            whose.admits(head, wanted, verified=True, awaits_table=awaits_table)


@pytest.mark.parametrize(
    ("head", "words", "was_verified", "becomes"),
    [
        (OURS, [Word(repository="us")], False, OURS),
        (OURS, [Word(repository="them"), Word(repository="us")], True, OURS),
        (OURS, [Word(repository="them")], True, THEIRS),
        (OURS, [Word(table="table")], True, replace(NOBODYS, table="table")),
        (HELD, [Word(table="table")], False, HELD),
        (HELD, [Word(repository="us")], False, OURS),
        (HELD, [Word()], False, NOBODYS),
        (NOBODYS, [Word(table="table")], False, NOBODYS),
        (NOBODYS, [Word(repository="us")], True, OURS),
    ],
)
def test_the_head_says_on_whose_word_parts_come(
    head: Head, words: list[Word], *, was_verified: bool, becomes: Head
) -> None:
    assert whose.brought(head, words, was_verified=was_verified) == becomes


# ---- with files -------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, undo: ExitStack) -> Bench:
    bench = Bench(tmp_path)
    undo.callback(bench.close)
    return bench


def test_parts_come_on_the_words_of_all_who_have_the_blob_open(bench: Bench, undo: ExitStack, tmp_path: Path) -> None:
    bench.adopt(tmp_path)
    policy = Policy("eio", WAIT)
    ours = bench.cache.open(DIGEST, SIZE, policy, None, HERE.key)
    undo.callback(ours.close)
    theirs = bench.cache.open(DIGEST, SIZE, policy, TABLE, THERE.key)
    assert theirs.blob is ours.blob
    with pytest.raises(Spilled):
        ours.claim([ours.word])
    ours.claim([theirs.word, ours.word])
    assert bench.head().table == TABLE.digest
    theirs.close()
    ours.claim([ours.word])
    assert (bench.head().table, bench.head().repository) == ("", HERE.key)


def test_what_a_seal_has_lost_extents_of_is_not_everybodys(bench: Bench) -> None:
    assert bench.read(bench.evil) == EVIL_PAYLOAD
    map_file = entryfiles.map_of(bench.data)
    with open(map_file, "r+b") as file:
        file.write(replace(bench.head(), verified=True).build())
        file.seek(presence.TABLE_OFFSET)
        file.write(bytes(4))
    assert bench.read(bench.good) == GOOD
