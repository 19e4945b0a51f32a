"""Fixtures of the sandbox's tests."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.sandbox.kit import USERS, User, acting_as, processes


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    """Each user that may build: the user of the tests, and if that is root, also an ordinary user."""
    with acting_as(request.param) as someone:
        yield someone


@pytest.fixture
def me(tmp_path: Path) -> User:
    """The user of the tests."""
    (tmp_path / "build").mkdir()
    return User(uid=os.getuid(), folder=tmp_path, python=sys.executable, prefix=())


@pytest.fixture
def marker() -> Iterator[str]:
    """A word for the command lines of processes. All processes with this word are killed at the end."""
    word = f"marker-{uuid.uuid4()}"
    yield word
    for pid in processes(word):
        os.kill(pid, signal.SIGKILL)
