from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.box import netwatch, supervisor


@pytest.fixture
def fake_bwrap(tmp_path: Path) -> str:
    """Not bubblewrap: says that it has started a process, and ends without a result, as one that is killed does."""
    script = tmp_path / "bwrap"
    script.write_text("#!/bin/bash\necho '{ \"child-pid\": 1 }' >&$2\n")
    script.chmod(0o755)
    return str(script)


def test_what_arrives_while_the_tree_ends_is_still_reported(fake_bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    control_read, control_write = os.pipe()
    sent: list[dict[str, object]] = []

    def start(_pid: int, selector: selectors.BaseSelector, _hostname: str, report: Callable[[str], None]) -> None:
        selector.register(ours, selectors.EVENT_READ, lambda: report(ours.recv(100).decode()))

    def end_tree() -> float:
        theirs.send(b"late.example")
        return 1.5

    monkeypatch.setattr(netwatch, "start", start)
    monkeypatch.setattr(supervisor, "end_tree", end_tree)
    with ours, theirs:
        supervisor.supervise([fake_bwrap], control_read, sent.append, "build")
    os.close(control_read)
    os.close(control_write)
    assert sent == [{"init": 1, "unwatched": None}, {"reached": "late.example"}, {"exit": None, "cpu_s": 1.5}]
