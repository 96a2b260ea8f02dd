# SPDX-License-Identifier: Apache-2.0
"""An entry of the cache that is open, and what may be believed of it.

admit()     one more uses it, if he believes what the others have brought (whose.py)
trust()     before its first use: its parts are what its digest table says
claim()     from now on parts come on somebody else's word
check()     the whole blob is what its digest says, or it is dropped

Any thread may call; whoever is first does the work, the others wait for what he finds.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from blockdev import entryfiles, whose
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Blob
from blockdev.entryfiles import EntryFiles
from blockdev.errors import CorruptImage, DeviceError, EngineError, SourceError
from blockdev.source import Spilled
from blockdev.units import UNIT_EXTENTS, Units
from blockdev.whose import Word
from formats.digests import Place, Table
from formats.presence import Head

log = logging.getLogger(__name__)

DROP_ROUNDS = 100  # a reader pins an extent for one pread: one more round finds it free
_PIECE = 4 << 20  # bytes hashed at a time; a multiple of the extent
_WRITE_LIMIT = 10.0  # seconds for a disk to take the last fetches: some 4 MiB each
_WRITE_POLL = 0.005  # seconds; nothing tells when a write has failed
_JOINING = 0.005  # seconds; between a user and his source there is nothing that waits
_HASH_ROUNDS = 3  # what is taken away while a blob is hashed came back once at the most: its second loss is final


@dataclass(eq=False)
class User:
    """One that has a blob open. None: somebody who brings no bytes, or does not wait for any.

    `units`: of the table that is his word.
    """

    word: Word | None = None
    policy: Policy | None = None
    units: Units | None = None


class OpenEntry:
    """What all users of an open entry share. `named`: its files are the ones that have the blob's names.

    admit(), join(), leave() and give_up() are its cache's to call, one at a time.
    """

    def __init__(
        self, files: EntryFiles, blob: Blob, id: int, place: Place | None, *, repository: str, named: bool
    ) -> None:
        self.files = files
        self.blob = blob
        self.id = id
        self.named = named
        self.users: list[User] = []
        self._repository = repository  # of who opened it
        # Of what all that is here is to be held against before its first use; None once it has been, or need not be.
        self._unlooked = self._units(place) if place and files.head.table != place.digest else None
        self._policy = Policy("eio")
        self._claiming = threading.Lock()
        self._closed = False
        self._sealed = 0 if files.head.verified else None  # what had been taken away of the blob when it was verified
        self._checking = threading.Lock()
        self._findings = 0  # how often its digest has been compared, and what was wrong the last time
        self._wrong = ""

    @property
    def digest(self) -> str:
        return self.files.head.blob_digest

    @property
    def verified(self) -> bool:
        """Whether the whole blob is here, and its digest matched."""
        return self._sealed is not None and self.blob.stat().retired == self._sealed

    # ---- its users ----

    def admit(self, wanted: Head, place: Place | None, policy: Policy) -> User | None:
        """One more, if it suits him. Who has a table takes parts on the word of that one only, whoever else is here;
        who has none, on that of his repository, or of the table of another of its images.

        CorruptImage if the blob is known to have another size.
        """
        with self._claiming:  # from here on nothing comes on others' words alone
            head, unlooked = self.files.head, self._unlooked
            awaits = unlooked.place == place if unlooked else None
            if not whose.admits(head, wanted, verified=self.verified, awaits_table=awaits):
                return None
            units: Units | None = None
            if place:
                units = self._units_in_use(lambda units: units.place == place) or self._units(place)
            elif head.table and head.repository == wanted.repository:
                units = self._units_in_use(lambda units: units.place.digest == head.table)
            word = Word(table=units.place.digest) if units else Word(repository=wanted.repository)
            user = User(word, policy, units)
            self.users.append(user)
        self._set_policy()
        return user

    def _units_in_use(self, wanted: Callable[[Units], bool]) -> Units | None:
        in_use = [self._unlooked, *(user.units for user in self.users)]
        return next((units for units in in_use if units and wanted(units)), None)

    def _units(self, place: Place) -> Units:
        offer = partial(self.offer, Word(table=place.digest))
        return Units(self.digest, place, offer, self.files.read, self.files.folder)

    def join(self) -> User:
        """One more, who brings no bytes, and does not wait for any."""
        user = User()
        with self._claiming:
            self.users.append(user)
        return user

    def leave(self, user: User) -> None:
        """One that uses it does no longer."""
        with self._claiming:
            self.users.remove(user)
        self._set_policy()

    def give_up(self, user: User) -> None:
        """One that uses it waits for nothing any more."""
        user.policy = Policy("eio", 0.0)
        self._set_policy()

    def _set_policy(self) -> None:
        """The most patient of those who are here rules. What a less patient one gave up is tried again for him."""
        policies = [user.policy for user in self.users if user.policy]
        if not policies:
            return
        before, self._policy = self._policy, max(policies, key=lambda policy: policy.patience)
        self.blob.set_policy(self._policy)
        if self._policy.patience > before.patience and self.blob.stat().down:
            self.blob.healthy()

    @property
    def words(self) -> list[Word]:
        """On which its users take parts."""
        return list({user.word for user in self.users if user.word})

    def claim(self, words: Sequence[Word]) -> None:
        """Say durably on whose word parts come from now on; all of `words` say the same of them.

        EngineError if that cannot be written. Spilled, to be tried again: there is one who takes nothing on these.
        """
        with self._claiming:
            if self._closed:
                raise SourceError(f"read blob: {self.digest}: it has been closed")
            if not set(self.words) <= set(words):
                raise Spilled(f"read blob: {self.digest}: somebody joins, or leaves", delay=_JOINING)
            head = whose.brought(self.files.head, words, was_verified=self._sealed is not None)
            if head != self.files.head:
                self.files.write_words(head.table, head.repository)

    def offer(self, word: Word, offset: int, content: memoryview) -> int:
        """As Blob.offer(), for what came unasked on this word: kept if all its users take parts on it."""
        with self._claiming:
            alone = self.words == [word]
        return self.blob.offer(offset, content) if alone else 0

    def close(self) -> None:
        """Once. A fetch may still be in hand, or a request wait: the blob's end is final for these."""
        with self._claiming:
            self._closed = True
            self.blob.close()
            self.files.close()

    # ---- its parts ----

    def trust(self, load: Callable[[Units], Table]) -> None:
        """Have all that is here checked, if it was not held against the table when it came; load() gets the table."""
        if self._unlooked is None:
            return  # and does not wait for who compares the whole, which takes as long as a pull
        with self._checking:
            units = self._unlooked
            if units is None:
                return
            table = load(units)
            bad = list(units.bad_spans(table, entryfiles.read_table(self.files.map_fd, self.blob.size)))
            for offset, length in bad:
                self.blob.drop(offset, length)
            left = entryfiles.read_table(self.files.map_fd, self.blob.size)
            if any(any(left[offset // EXTENT_SIZE :][:UNIT_EXTENTS]) for offset, _ in bad):
                raise DeviceError(f"check blob: {self.digest}: what is wrong in the cache cannot be taken away")
            self.files.sync()
            head = self.files.head
            self.files.write_head(replace(head, table=units.place.digest, repository=self._repository))
            self._unlooked = None
            log.info("blob checked against its digest table digest=%s dropped=%d", self.digest, len(bad))

    # ---- the whole ----

    def check(self, reach: Callable[[int], None] | None, *, fetching: bool) -> bool:
        """Compare the whole blob's digest: CorruptImage if it is another, and then the blob is dropped.

        reach(n) comes before bytes up to n are read. False: not all of it is here, and nothing is to be fetched.
        """
        seen = self._findings  # before anything else: a blob that is dropped from now on is so by a finding
        if not fetching and self.blob.stat().present_bytes != self.blob.size:
            return False
        with self._checking:
            if self._findings == seen:  # nobody else has looked while we waited
                self._wrong = self._compare(reach)
                self._findings += 1
            if self._wrong:
                raise CorruptImage(self._wrong)
            return True

    def _compare(self, reach: Callable[[int], None] | None) -> str:
        """Seal the blob, or drop it; what is wrong with its digest, "" if nothing."""
        for _ in range(_HASH_ROUNDS):
            before = self.blob.stat().retired
            found = _digest_of_blob(self.blob, self.digest, reach)
            if found != self.digest:
                break
            if self._seal(before):
                return ""
        else:
            raise DeviceError(f"verify blob: {self.digest}: parts of it are taken away all the time")
        dropped = _drop_all(self.blob)
        log.error("blob dropped digest=%s extents=%d: its content has digest %s", self.digest, dropped, found)
        return f"verify blob: {self.digest}: offset 0: the content's digest is {found}"

    def _seal(self, before: int) -> bool:
        """Mark the blob as verified, unless something was taken away since `before`. First the bytes, then the claim.

        Looked at again after the claim: from then on, whatever takes an extent away breaks the seal itself.
        """
        self._await_written()
        self.files.sync()
        if self.blob.stat().retired != before:
            return False
        self.files.write_seal()
        if self.blob.stat().retired != before:
            self.files.break_seal()
            return False
        self._sealed = before
        self._unlooked = None  # it is right, whatever a table says
        return True

    def _await_written(self) -> None:
        """What was fetched last is read from memory first, and in the cache a moment later, or never."""
        deadline = time.monotonic() + _WRITE_LIMIT
        while self.blob.stat().present_bytes != self.blob.size:
            if time.monotonic() > deadline:
                raise EngineError(f"verify blob: {self.digest}: not all of it could be written")
            time.sleep(_WRITE_POLL)


def _drop_all(blob: Blob) -> int:
    """Empty the entry; extents that somebody reads at this moment in a later round."""
    dropped = 0
    for _ in range(DROP_ROUNDS):
        dropped += blob.drop(0, blob.size)
        if not blob.stat().present_bytes:
            return dropped
    raise DeviceError(f"drop blob: {blob.size} bytes: some stay in use")


def _digest_of_blob(blob: Blob, like: str, reach: Callable[[int], None] | None) -> str:
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm)
    buffer = memoryview(bytearray(_PIECE))
    for offset in range(0, blob.size, _PIECE):
        piece = buffer[: min(_PIECE, blob.size - offset)]
        if reach:
            reach(offset + len(piece))
        blob.read_into(offset, piece)
        digest.update(piece)
    return f"{algorithm}:{digest.hexdigest()}"
