# SPDX-License-Identifier: Apache-2.0
"""What an owner holds, without its process: how devices end when there are no threads for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from blockdev.device import State
from blockdev.engine import Engine
from blockdev.origin import NOTHING, locate
from blockdev.owner import Owner
from blockdev.root import Root
from blockdev.stack import open_local
from blockdev.upper import create_pair


def test_what_was_written_is_flushed_outside_the_stop_that_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    root = Root(tmp_path / "root")
    root.prepare()
    pair = tmp_path / "data", tmp_path / "index"
    create_pair(*pair, 1 << 20)
    owner = Owner(root)
    with Engine(work_threads=1) as engine:
        with locate(NOTHING, [str(file) for file in pair], write=True) as origin:
            device = owner.add_device(open_local(engine, origin))
        monkeypatch.setattr(threading.Thread, "start", refuse)
        owner.drain(0)
        assert device.state is State.ATTACHING
        owner.finish_writing()
        assert device.state is State.GONE
        owner.close()
