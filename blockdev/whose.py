# SPDX-License-Identifier: Apache-2.0
"""Whose the parts of a blob are that the cache has, and what that means for who wants the blob.

Whoever uses a blob takes its parts on somebody's word: that of the digest table which the image's manifest names, or
else that of the image's own repository. Only the digest of the whole goes for everybody. The head of an entry's map
says on whose word its parts are there. It is `nobody's` if it names neither: parts that nobody uses before they were
held against a table.

taken_over()   somebody wants what nobody has open: with what head it goes on
admits()       somebody else has it open: whether both may use the same
brought()      parts come on these words now: what the head says before

Only decisions are here. Who asks does what they say (entryfiles.py, openentry.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from blockdev.errors import CorruptImage
from formats.errors import FormatError
from formats.presence import Head


class OfAnother(Exception):
    """An entry is not what is wanted, and not to be thrown away for that: others say otherwise of the blob."""


@dataclass(frozen=True)
class Word:
    """On which a user of a blob takes its parts. One of the two: the sha256 of a table, or a repository's key."""

    table: str = ""
    repository: str = ""


def taken_over(head: Head, wanted: Head, empty: Callable[[], bool]) -> Head:
    """The head that an entry goes on with; nobody's if it is to be held against the table that is wanted.

    empty(): whether no part is here. FormatError, which says why: it starts empty. OfAnother: it is left as it is, and
    who wants the blob has files of his own. CorruptImage: the blob is known to have another size.
    """
    others = head.repository != wanted.repository
    if head.verified:
        check_size(head, wanted.size)
    elif head.size != wanted.size:
        text = f"it is the map of {head.size} bytes, {wanted.size} are expected"
        raise OfAnother(text) if others and not empty() else FormatError(text)
    if not wanted.table:
        if others and not head.verified:
            raise FormatError("what it has came from another repository")
        return replace(head, table="")
    if head.table == wanted.table:
        return head
    if head.verified or empty():
        return replace(head, table=wanted.table, repository=wanted.repository)
    return replace(head, table="", repository="")


def admits(head: Head, wanted: Head, *, verified: bool, awaits_table: bool | None) -> bool:
    """Whether who wants the blob may use an entry beside those who have it open.

    awaits_table: whether its parts are still to be held against the very table that is wanted; None: against none.
    CorruptImage: the blob is known to have another size.
    """
    if verified:
        check_size(head, wanted.size)
        return True
    if head.size != wanted.size:
        return False
    if wanted.table:
        return head.table == wanted.table or awaits_table is True
    return head.repository == wanted.repository and awaits_table is None


def brought(head: Head, words: Sequence[Word], *, was_verified: bool) -> Head:
    """The head before parts come on these words, all of which say the same of them.

    What is here its users believe already; but what is nobody's stays so, unless it was verified once.
    """
    nobodys = not (head.table or head.repository)
    said = Word(table=head.table) if head.table else Word(repository=head.repository)
    if (nobodys and not was_verified) or said in words:
        return head
    return replace(head, table=words[0].table, repository=words[0].repository)


def check_size(head: Head, size: int) -> None:
    """CorruptImage if the blob has not `size` bytes."""
    if head.size != size:
        raise CorruptImage(f"open blob: {head.blob_digest}: offset {size}: said to end here, but has {head.size} bytes")
