# SPDX-License-Identifier: Apache-2.0
"""The sources of all users of a blob, as one Source: while one of them delivers, it is well.

Users take bytes on a word (blockdev/openentry.py). Those who take them on the same one are served by whichever
source delivers. Where there is more than one word, bytes are what a source of each says they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from blockdev.engine import EngineStopped, Fetch
from blockdev.errors import BlockdevError, CorruptImage
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.registry.credentials import LoginUnknown
from blockdev.source import Source, Spilled

log = logging.getLogger(__name__)

REFUSED_DELAY = 5.0  # seconds; one that was denied or has not got the blob is not asked before the others
_DIFFERENT_DELAY = 1.0
_AT_ONCE = 0.001  # seconds; a pause of 0 would mean that nobody asks again

Word = TypeVar("Word", bound=Hashable)
Done = TypeVar("Done")


class AskAnother(Spilled):
    """A source has failed, and another can be asked now."""


@dataclass(eq=False)
class _User(Generic[Word]):
    source: Source
    word: Word
    refused_until: float = 0.0  # monotonic


class Several(Generic[Word]):
    """Source over sources of one blob, at least one. Thread-safe."""

    def __init__(self, backoff: Backoff, claim: Callable[[Sequence[Word]], None]) -> None:
        """claim(words) comes before bytes do that are taken on these words."""
        self._backoff = backoff
        self._claim = claim
        self._users: list[_User[Word]] = []  # replaced whole; the one to be asked first is the first
        self._lock = threading.Lock()

    def add(self, source: Source, word: Word) -> Callable[[], bool]:
        """One more user, whose source has not been tried. When it leaves, the answer is to be called: whether any is
        left. The last one's source is still what a fetch in hand asks."""
        user = _User(source, word)
        with self._lock:
            self._users = [*self._users, user]

        def leave() -> bool:
            with self._lock:
                left = [other for other in self._users if other is not user]
                self._users = left or self._users
                return bool(left)

        return leave

    @property
    def hosts(self) -> set[str]:
        """All that its users' sources ask."""
        return {user.source.host for user in self._users}

    @property
    def name(self) -> str:
        """As Source.name: of the one that is asked next."""
        return self._chosen()[0].source.name

    @property
    def host(self) -> str:
        """As Source.host: of the one that is asked next."""
        return self._chosen()[0].source.host

    @property
    def size(self) -> int:
        """As Source.size."""
        return self._users[0].source.size

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """As Source.read_into(); AskAnother if there is one to ask."""
        users = self._chosen()
        self._claim([user.word for user in users])
        if len(users) == 1:
            self._read(users[0], offset, buffer, deadline, progress)
        else:
            self._read_agreed(users, offset, buffer, deadline)
            progress(len(buffer))

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """As Source.fill()."""
        users = self._chosen()
        if len(users) > 1:
            return False
        self._claim([user.word for user in users])
        return self._try(users[0], lambda: users[0].source.fill(fetch, deadline))

    def probe(self, deadline: float) -> None:
        """As Source.probe(): whether any can."""
        error: BlockdevError | None = None
        for user in [user for user in self._users if self._usable(user)] or self._chosen():
            try:
                user.source.probe(deadline)
            except BlockdevError as failed:
                error = failed
            else:
                self._to_front(user)
                return
        if error:
            raise error

    # ---- which one ----

    def _usable(self, user: _User[Word]) -> bool:
        return time.monotonic() >= user.refused_until and not self._backoff.waiting(user.source.host)

    def _chosen(self) -> list[_User[Word]]:
        """Whom to ask: for each word the first that can be asked now, or else will be sooner than others."""
        chosen: dict[Word, _User[Word]] = {}
        now = time.monotonic()
        for user in sorted(self._users, key=lambda user: (user.refused_until > now, not self._usable(user))):
            chosen.setdefault(user.word, user)
        return list(chosen.values())

    def _to_front(self, user: _User[Word]) -> None:
        with self._lock:
            if user in self._users and self._users[0] is not user:
                self._users = [user, *(other for other in self._users if other is not user)]

    def _to_end(self, user: _User[Word]) -> None:
        with self._lock:
            if user in self._users:
                self._users = [*(other for other in self._users if other is not user), user]

    def _try(self, user: _User[Word], ask: Callable[[], Done]) -> Done:
        try:
            done = ask()
        except (Spilled, EngineStopped, CorruptImage):
            raise
        except BlockdevError as error:
            self._pass_on(user, error)
            raise
        self._to_front(user)
        return done

    def _read(
        self, user: _User[Word], offset: int, buffer: memoryview, deadline: float, progress: Callable[[int], None]
    ) -> None:
        self._try(user, lambda: user.source.read_into(offset, buffer, deadline=deadline, progress=progress))

    def _pass_on(self, user: _User[Word], error: BlockdevError) -> None:
        """AskAnother, if a source that is believed as much as the one that failed is not known to fail too."""
        if user not in self._users:  # it was ended because he has left
            raise AskAnother(str(error), delay=_AT_ONCE) from error
        others = [other for other in self._users if other is not user and other.word == user.word]
        if not others:
            return
        his = not error.retriable or isinstance(error, LoginUnknown)  # others are let in where he is not
        if his:
            user.refused_until = time.monotonic() + REFUSED_DELAY
        self._to_end(user)
        host = "" if his else user.source.host  # others of an ill host are ill
        usable = [other for other in others if self._usable(other) and other.source.host != host]
        later = [other for other in others if other.refused_until <= time.monotonic()]
        if usable:
            if host and not isinstance(error, LeftAlone):
                self._backoff.failed(host, error)
            log.warning("source left for another source=%s: %s", user.source.name, error)
            raise AskAnother(str(error), delay=_AT_ONCE) from error
        if later and his:
            wait = min(self._backoff.waiting(other.source.host) for other in later)
            raise AskAnother(str(error), delay=max(wait, _AT_ONCE)) from error
        if host:
            self._to_front(user)  # whoever asks what host has failed is to hear of this one

    def _read_agreed(self, users: Sequence[_User[Word]], offset: int, buffer: memoryview, deadline: float) -> None:
        """Fill the buffer with what a source of each word says."""
        for user in users:
            found = memoryview(bytearray(len(buffer)))
            self._read(user, offset, found, deadline, lambda filled: None)
            if user is not users[0] and found != buffer:
                names = " and ".join(user.source.name for user in users)
                raise LeftAlone(f"reading a blob failed: {names} at {offset}: they differ", seconds=_DIFFERENT_DELAY)
            buffer[:] = found
