# SPDX-License-Identifier: Apache-2.0
"""Words of a command line: what argparse makes of them, but for what it does not do as other tools do.

A command's options stand anywhere up to a `--`, and a command that there is not is told with the one that was meant.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, NoReturn

from blockdev.errors import UsageError

# What other tools call it: what does that here.
_MEANT = {
    "attach": "ociblk mount or ociblk serve",
    "detach": "ociblk umount",
    "df": "ociblk cache stat",
    "gc": "ociblk cache prune",
    "help": "ociblk --help",
    "images": "ociblk cache stat",
    "list": "ociblk ps",
    "logs": "the file owner.log in the root",
    "map": "ociblk mount --raw",
    "prune": "ociblk cache prune",
    "rm": "ociblk umount or ociblk cache prune",
    "rmi": "ociblk cache prune",
    "start": "ociblk daemon",
    "status": "ociblk ps",
    "stop": "ociblk daemon --stop",
    "unmap": "ociblk umount",
}


class Parser(argparse.ArgumentParser):
    """Its errors are UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: {self.prog}: see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest != "command" or value in (action.choices or ()):
            return super()._check_value(action, value)
        near = [f"{self.prog} {name}" for name in get_close_matches(value, action.choices or (), 1)]
        meant = _MEANT.get(value) or "".join(near)
        hint = f"did you mean {meant}?" if meant else f"see {self.prog} --help"
        raise UsageError(f"unknown command: {value}: {hint}")


class Command(Parser):
    """The words of one command. Its options go first before argparse sees them, which takes an argument that may be
    left out for absent as soon as an option stands before it.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(self._options_first(args), namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _options_first(self, words: Sequence[str]) -> list[str]:
        options: list[str] = []
        rest: list[str] = []
        left = iter(words)
        for word in left:
            if word == "--":
                rest += [word, *left]
            elif (option := self._option(word)) is None:
                rest.append(word)
            else:
                apart = 0 if _carries_value(word) else 1 if option.nargs is None else int(option.nargs)
                values = list(islice(left, apart))
                whole = len(values) == apart  # else it stays last, or it would take an argument for its value
                (options if whole else rest).extend([word, *values])
        return options + rest

    def _option(self, word: str) -> argparse.Action | None:
        """The option that a word names, also by its beginning; None if it names none."""
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        known = self._option_string_actions
        begun = (option for text, option in known.items() if name.startswith("--") and text.startswith(name))
        return known.get(name) or next(begun, None)


def _carries_value(word: str) -> bool:
    return "=" in word if word.startswith("--") else len(word) > 2
