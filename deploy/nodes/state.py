"""What was done for a deployment: one file, replaced whole, changed only by whoever holds the lock."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.nodes import redact
from deploy.nodes.deployment import Folder
from gracefarm.errors import ConfigError, HostError
from gracefarm.files import atomic_write, lock

VERSION = 1
StepOutcome = Literal["running", "done", "skipped", "failed"]


class StepRecord(BaseModel):
    """What became of a step. `running` in a file that nobody holds: it was killed there, and will be done again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    "Of everything that the step depends on: another digest, and it is done again."
    outcome: StepOutcome
    text: str = ""
    "What was done, or why not, in one line."
    begun: float
    ended: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    "What later steps and `status` need of it. No secret."


class State(BaseModel):
    """All steps of a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    steps: dict[str, StepRecord] = Field(default_factory=dict)

    def data(self, step: str) -> dict[str, Any]:
        """What a step that is done or skipped left for others; empty for any other."""
        record = self.steps.get(step)
        return record.data if record and record.outcome in ("done", "skipped") else {}


def digest(*inputs: object) -> str:
    """Of values that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(folder: Folder) -> State:
    """The state as it is now, without the lock; empty before the first step.

    Raises:
        ConfigError: the file is damaged or of a newer version.
    """
    try:
        text = folder.state.read_bytes()
    except FileNotFoundError:
        return State()
    try:
        state = State.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{folder.state}: {error.errors()[0]['msg']}",
            remedy="move it away: every step looks at the nodes before it does anything",
        ) from error
    if state.version != VERSION:
        raise ConfigError(f"{folder.state}: version {state.version} is not known", remedy="use the gracefarm that wrote it")
    return state


class Keeper:
    """The state while its lock is held; each change is on disk when the call returns."""

    def __init__(self, folder: Folder, kept: State | None = None) -> None:
        self.folder = folder
        self.state = read(folder) if kept is None else kept

    def begin(self, step: str, digest_: str) -> None:
        """A step starts to change something."""
        self._put(step, StepRecord(digest=digest_, outcome="running", begun=time.time()))

    def end(self, step: str, outcome: StepOutcome, text: str, data: dict[str, Any] | None = None) -> StepRecord:
        """How it ended. The step has begun."""
        begun = self.state.steps[step]
        text = redact.of(self.folder).line(text)  # a line of the engine's log may stand in it
        ended = begun.model_copy(update={"outcome": outcome, "text": text, "ended": time.time(), "data": data or {}})
        self._put(step, ended)
        return ended

    def forget(self, *steps: str) -> None:
        """As if never done."""
        kept = {name: record for name, record in self.state.steps.items() if name not in steps}
        if kept != self.state.steps:
            self._write(self.state.model_copy(update={"steps": kept}))

    def _put(self, step: str, record: StepRecord) -> None:
        self._write(self.state.model_copy(update={"steps": {**self.state.steps, step: record}}))

    def _write(self, state: State) -> None:
        atomic_write(self.folder.state, state.model_dump_json(indent=1) + "\n")
        self.state = state


@contextmanager
def hold(folder: Folder, command: str, *, wait: bool = True, on_wait: Callable[[str], None]) -> Iterator[Keeper]:
    """The state, for one command at a time on this machine; the kernel lets go of it when its process dies.

    `on_wait` is told who holds it.
    Raises:
        HostError: somebody holds it and `wait` is false. ConfigError: no deployment yet, or a damaged state.
    """
    folder.id  # noqa: B018 - raises before anything is written
    path = folder.path / "state.lock"

    def held() -> None:
        who = _holder(folder)
        if not wait:
            raise HostError(f"{who} is at work on this deployment", remedy="wait for it, or end it: it goes on from there")
        on_wait(who)

    with lock(path, held):
        mine = {"pid": os.getpid(), "user": _user(), "host": socket.gethostname(), "command": command, "since": time.time()}
        atomic_write(_holder_file(folder), json.dumps(mine))
        try:
            yield Keeper(folder)
        finally:
            _holder_file(folder).unlink(missing_ok=True)


def _holder_file(folder: Folder) -> Path:
    return folder.path / "holder.json"


def _holder(folder: Folder) -> str:
    """Who holds the lock, for people. The lock itself is the kernel's, so a file that a killed command left does no harm."""
    try:
        holder = json.loads(_holder_file(folder).read_text())
        since = time.strftime("%H:%M:%S", time.localtime(holder["since"]))
        return f"`{holder['command']}` of {holder['user']} on {holder['host']} (process {holder['pid']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
