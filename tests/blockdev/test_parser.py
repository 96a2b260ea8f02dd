# SPDX-License-Identifier: Apache-2.0
"""Command lines: options stand anywhere, and an unknown command is told with the one that was meant."""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Iterator

import pytest

from blockdev import cli
from blockdev.cli.parser import Command
from blockdev.errors import UsageError

COMMON = [["--json"], ["--root", "r"], ["--root=r"]]
_EXAMPLES = ("2", "eio:30s", "some")  # one of them suits each option and argument
_COUNTS = {None: [1], "?": [0, 1], "*": [0, 1, 2], "+": [1, 2]}


def command_of(name: str) -> Command:
    command = Command(prog=name)
    importlib.import_module(f"blockdev.cli.{cli._COMMANDS[name][0]}").add_arguments(command)
    return command


def example(action: argparse.Action) -> str:
    for text in [*(action.choices or ()), *_EXAMPLES]:
        try:
            (action.type or str)(text)  # type: ignore[operator]
        except (ValueError, TypeError, argparse.ArgumentTypeError, UsageError):
            continue
        return text
    raise AssertionError(action)


def spelled(action: argparse.Action) -> list[list[str]]:
    """An option in every way it can be written."""
    values = [example(action)] * (1 if action.nargs is None else int(action.nargs))
    ways = [[text, *values] for text in action.option_strings]
    if len(values) == 1:
        ways += [[f"{text}{'=' if text.startswith('--') else ''}{values[0]}"] for text in action.option_strings]
    return ways


def lines(name: str) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """Each option of a command in every way, what it cannot do without, and as many arguments as it takes."""
    actions = command_of(name)._actions
    needed = [*(a for a in actions if a.option_strings and a.required)]
    needed += [a for a in actions if a.dest == "socket"]  # serve: one of a group
    without = list(itertools.chain(*(spelled(action)[0] for action in needed)))
    counts = [_COUNTS[action.nargs] for action in actions if not action.option_strings]  # type: ignore[index]
    arguments = [action for action in actions if not action.option_strings]
    ways = [way for a in actions if a.option_strings and a.dest not in ("help", "port") for way in spelled(a)]
    for many in itertools.product(*counts):
        words = [example(action) for action, count in zip(arguments, many, strict=True) for _ in range(count)]
        for way in [*COMMON, *ways]:
            yield way, [] if way[0].partition("=")[0] in without else without, words


@pytest.mark.parametrize("name", sorted(cli._COMMANDS))
def test_an_option_may_stand_anywhere(name: str) -> None:
    for option, without, words in lines(name):
        first = vars(cli._parse([name, *without, *option, *words]))
        for place in range(len(words) + 1):
            line = [name, *words[:place], *option, *words[place:], *without]
            assert vars(cli._parse(line)) == first, line


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["cat", "i", "--", "-R", "--json"], ["-R", "--json"]),
        (["cat", "--json", "--", "i", "-x"], ["-x"]),
        (["cat", "i", "-", "--plain", "-1"], ["-", "-1"]),
        (["cat", "i", "a", "--on-err", "hang", "b"], ["a", "b"]),
    ],
)
def test_what_is_no_option_keeps_its_place(words: list[str], paths: list[str]) -> None:
    found = cli._parse(words)
    assert (found.image, found.paths) == ("i", paths)


@pytest.mark.parametrize("words", [["ls", "i", "-R", "/etc", "more"], ["ls", "i", "/etc", "--bogus"], ["ps", "--all"]])
def test_what_a_command_does_not_know_is_said_with_the_command(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"^unrecognized arguments: (more|--bogus|--all): ociblk {words[0]}: see "):
        cli._parse(words)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["fsck", "i", "--root"], "--root"),
        (["ls", "i", "/etc", "--ca"], "--ca"),
        (["commit", "d", "i", "--json", "-o"], "-o/--output"),
        (["mount", "i", "d", "--rw", "--upper", "u"], "--upper"),
    ],
)
def test_an_option_takes_no_argument_for_the_value_it_lacks(words: list[str], option: str) -> None:
    with pytest.raises(UsageError, match=f"^argument {option}: expected "):
        cli._parse(words)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("attach", "did you mean ociblk mount or ociblk serve?"),
        ("list", "did you mean ociblk ps?"),
        ("unmount", "did you mean ociblk umount?"),
        ("xyzzy", "see ociblk --help"),
    ],
)
def test_a_command_that_there_is_not_is_told_with_the_one_that_was_meant(word: str, said: str) -> None:
    with pytest.raises(UsageError) as told:
        cli._parse(["--json", word, "image", "--unknown"])
    assert str(told.value) == f"unknown command: {word}: {said}"


def test_only_what_a_command_needs_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"required: stat\|prune\|add: ociblk cache: see"):
        cli._parse(["cache"])
