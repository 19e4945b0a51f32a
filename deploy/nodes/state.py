"""The state of a deployment: which steps are done. One file, replaced atomically, written only with its lock held."""

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
    """The outcome of a step. `running` in a file that is not locked: the step was killed and will be repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    "Digest of everything that the step depends on. The step is repeated if the digest changes."
    outcome: StepOutcome
    text: str = ""
    "What was done, or why it failed, in one line."
    begun: float
    ended: float | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    "Results for later steps and for `status`, without secrets."


class State(BaseModel):
    """All steps of a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    steps: dict[str, StepRecord] = Field(default_factory=dict)

    def data(self, step: str) -> dict[str, Any]:
        """Results of a step that is done or skipped; empty for other steps."""
        record = self.steps.get(step)
        return record.data if record and record.outcome in ("done", "skipped") else {}


def digest(*inputs: object) -> str:
    """Digest of values that JSON can represent. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(folder: Folder) -> State:
    """Read the state without taking the lock; empty before the first step.

    Raises:
        ConfigError: the file is damaged or from a newer version.
    """
    try:
        text = folder.state.read_bytes()
    except FileNotFoundError:
        return State()
    try:
        state = State.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"{folder.state} is damaged: {error.errors()[0]['msg']}",
            remedy="rename this file, then repeat the command; its steps check the nodes again, and do only what is missing",
        ) from error
    if state.version != VERSION:
        raise ConfigError(
            f"{folder.state}: version {state.version} is unknown",
            remedy="install the version of gracefarm that wrote the file",
        )
    return state


class Keeper:
    """The state while its lock is held. Each change is on disk when the call returns."""

    def __init__(self, folder: Folder, kept: State | None = None) -> None:
        self.folder = folder
        self.state = read(folder) if kept is None else kept

    def begin(self, step: str, digest_: str) -> None:
        """Record that a step starts to change something."""
        self._put(step, StepRecord(digest=digest_, outcome="running", begun=time.time()))

    def end(self, step: str, outcome: StepOutcome, text: str, data: dict[str, Any] | None = None) -> StepRecord:
        """Record the outcome of a step that has begun."""
        begun = self.state.steps[step]
        text = redact.of(self.folder).line(text)  # the text may contain a line of the engine's log
        ended = begun.model_copy(update={"outcome": outcome, "text": text, "ended": time.time(), "data": data or {}})
        self._put(step, ended)
        return ended

    def forget(self, *steps: str) -> None:
        """Remove the records of these steps."""
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
    """Lock the state for one command on this machine. The kernel releases the lock when the process ends.

    `on_wait` is called with the holder of the lock before waiting for it.

    Raises:
        HostError: another command holds the lock, and `wait` is false.
        ConfigError: there is no deployment yet, or the state is damaged.
    """
    folder.id  # noqa: B018 - raises before anything is written
    path = folder.path / "state.lock"

    def held() -> None:
        who = _holder(folder)
        if not wait:
            raise HostError(
                f"{who} is running for this deployment",
                remedy="wait until that command ends, or stop it; then repeat your command",
            )
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
    """A description of the lock's holder. The kernel keeps the lock itself, so the file of a killed command is harmless."""
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
