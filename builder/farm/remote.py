"""The code that runs on the cluster: an actor on the head, which is called the foreman, and a task for each cell.

Ray sends this module by value, with gracefarm.process; both import only Ray and the standard library. So a machine without
gracefarm, or with a different one, can report that.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from gracefarm.process import first_line, last_line

RETRIES = 3
"Further tries of a cell whose worker died."
LONELY = 60.0
"Seconds that a cell waits while no worker of the cluster could take it."
PATIENCE = 20.0
"Seconds that a build may take to end itself."
GONE = 60.0
"Seconds of silence after which a driver counts as gone: it was killed, or its network broke."
KEPT = 86400.0
"Seconds that the result of a cell is kept for a driver that is gone."
OF_THE_MACHINE = (4, 23)
"Exit codes of failures that another machine may not have: host, disk."
TICK = 0.5
"Seconds between two looks at a build's output."
AT_ONCE = 500
"Lines of one cell in an answer."


class CellTask:
    """A build under way, or a finished one whose result no driver has taken yet."""

    def __init__(self, job: dict[str, Any], project: Any) -> None:
        self.job = job
        self.project = project
        self.drivers: set[str] = set()
        self.lines: list[str] = []
        self.task: Any = None
        self.files: Any = None
        self.outcome: dict[str, Any] | None = None
        self.follower: asyncio.Task[None] | None = None
        self.tries = 0

    def say(self, text: str) -> None:
        """A line for the drivers that asked for the cell."""
        self.lines.append(text)

    @property
    def options(self) -> dict[str, Any]:
        """What Ray is asked for."""
        job = self.job
        return {
            "num_cpus": job["cpus"],
            "memory": job["memory"],
            "resources": {job["host"]: 0.001},
            "max_retries": RETRIES,
            "num_returns": 2,
            "name": job["title"],
        }


class Foreman:
    """Owns the tasks, so that they continue when a driver disconnects; each build id is built once for all drivers."""

    def __init__(self, build: Any) -> None:
        import ray

        self.build = build
        self.own = ray.get_runtime_context().current_actor
        self.cells: dict[str, CellTask] = {}
        self.heard: dict[str, float] = {}
        self.unfit: set[str] = set()

    async def ask(self, driver: str, jobs: Sequence[dict[str, Any]], project: bytes) -> list[str]:
        """Build these cells, or wait for those that are built already. Returns the ids of cells that build for another run."""
        import ray

        self.heard[driver] = time.monotonic()
        self.unfit.clear()  # it may have the right gracefarm by now
        ended = [build_id for build_id, cell in self.cells.items() if cell.outcome is not None]
        for build_id in [build_id for build_id in ended if not self._wanted(build_id, KEPT)]:
            del self.cells[build_id]
        sent, others = ray.put(project), []
        for job in jobs:
            cell = self.cells.get(job["build_id"])
            if cell is None or (cell.outcome is not None and cell.outcome.get("failure")):
                cell = self.cells[job["build_id"]] = CellTask(job, sent)
                cell.follower = asyncio.create_task(self._follow(cell))
            elif cell.outcome is None and driver not in cell.drivers:
                others.append(job["build_id"])
            cell.drivers.add(driver)
        return others

    def _wanted(self, build_id: str, silence: float) -> bool:
        """A driver that asked for the cell has been heard since."""
        return any(time.monotonic() - self.heard[driver] < silence for driver in self.cells[build_id].drivers)

    async def news(self, driver: str, since: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Of each cell that a driver waits for: lines from number `since` on, and the outcome where there is one."""
        self.heard[driver] = time.monotonic()
        answer = {}
        for build_id, cell in self.cells.items():
            if driver in cell.drivers:
                lines = cell.lines[since.get(build_id, 0) :][:AT_ONCE]
                ended = cell.outcome is not None and since.get(build_id, 0) + len(lines) == len(cell.lines)
                answer[build_id] = {"lines": lines, "outcome": cell.outcome if ended else None}
        return answer

    async def take(self, build_id: str) -> list[Any]:
        """The reference to a cell's files. A driver calls `leave` when it has them."""
        return [self.cells[build_id].files]

    async def leave(self, driver: str, build_ids: Sequence[str]) -> None:
        """A driver waits for these no more; what no driver has asked for ends."""
        ending = []
        for build_id in build_ids:
            cell = self.cells.get(build_id)
            if cell is None:
                continue
            cell.drivers.discard(driver)
            if not self._wanted(build_id, GONE):
                del self.cells[build_id]
                ending += [self._end(cell)] if cell.outcome is None else []
        await asyncio.gather(*ending)

    async def began(self, build_id: str, machine: str) -> None:
        """A task of the cell has begun."""
        cell = self.cells.get(build_id)
        if cell is not None:
            cell.tries += 1
            again = "its worker died; " if cell.tries > 1 else ""
            cpus, memory = cell.job["cpus"], cell.job["memory"] / 2**30
            cell.say(f"{again}building on {machine}, with {cpus} {'CPU' if cpus == 1 else 'CPUs'} and {memory:.1f} GiB")

    async def lines(self, build_id: str, texts: Sequence[str]) -> None:
        """Output of a build."""
        cell = self.cells.get(build_id)
        if cell is not None:
            cell.lines += texts

    async def _end(self, cell: CellTask) -> None:
        import ray

        for force in (False, True):
            if cell.task is not None:
                ray.cancel(cell.task, force=force)
            if cell.follower is not None:
                ended, _ = await asyncio.wait({cell.follower}, timeout=PATIENCE)
                if ended:
                    return

    async def _follow(self, cell: CellTask) -> None:
        avoided: set[str] = set()
        while True:
            options = cell.options
            if away := avoided | self.unfit:
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(away))})"}
            cell.tries = 0
            cell.task, cell.files = self.build.options(**options).remote(cell.job, cell.project, self.own)
            outcome = await self._outcome(cell, away)
            failure = outcome.get("failure")
            if not failure or not (outcome.get("unfit") or failure["exit_code"] in OF_THE_MACHINE):
                break
            (self.unfit if outcome.get("unfit") else avoided).add(outcome["node"])
            if not fit(cell.job, avoided | self.unfit):
                break
            cell.say(f"{outcome['machine']}: {failure['cause']}; trying another worker")
        cell.outcome = outcome

    async def _outcome(self, cell: CellTask, away: set[str]) -> dict[str, Any]:
        """What became of the task that was started last."""
        from ray import exceptions

        future = asyncio.wrap_future(cell.task.future())
        lonely = time.monotonic()
        while not future.done():
            await asyncio.wait({future}, timeout=2.0)
            if fit(cell.job, away):
                lonely = time.monotonic()
            elif time.monotonic() - lonely > LONELY and not future.done():
                import ray

                ray.cancel(cell.task, force=True)
                return lost(f"{cell.job['title']}: no worker for {cell.job['host']} is left in the Ray cluster")
        try:
            answer: dict[str, Any] = future.result()
        except exceptions.RayError as error:
            return lost(cause_of(error, cell.job["title"], cell.tries))
        return answer


def cause_of(error: Exception, title: str, tries: int) -> str:
    """Why a cell left no record, from the error of its last task."""
    from ray import exceptions

    match error:
        case exceptions.TaskCancelledError():
            return "the build was ended"
        case exceptions.RayTaskError(cause=cause):
            return f"{title}: {last_line(str(cause or error))}"
    return f"{title}: its worker died {tries} times: {type(error).__name__}, {first_line(str(error))}"


def lost(cause: str) -> dict[str, Any]:
    """The outcome of a cell that left no record."""
    remedy = (
        "find the cause with `ray status` and in Ray's logs on the worker, then repeat the command; finished builds are kept"
    )
    return {"failure": {"kind": "farm", "exit_code": 51, "cause": cause, "remedy": remedy}}


def fit(job: Mapping[str, Any], away: set[str]) -> bool:
    """Whether a worker that is there could take the cell, if it had nothing else to do."""
    import ray

    for node in ray.nodes():
        has = node["Resources"]
        enough = has.get("CPU", 0) >= job["cpus"] and has.get("memory", 0) >= job["memory"] and has.get(job["host"], 0) > 0
        if node["Alive"] and node["NodeID"] not in away and enough:
            return True
    return False


def build_cell(job: dict[str, Any], project: bytes, foreman: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The task of a cell: the program of this machine's own gracefarm, its output to the foreman, its files returned."""
    import ray

    machine, node = socket.gethostname(), ray.get_runtime_context().get_node_id()
    ray.get(foreman.began.remote(job["build_id"], machine))
    answer, words = run_program(job, project, lambda texts: foreman.lines.remote(job["build_id"], texts))
    if answer is None:
        absent = "No module named 'builder" in words
        cause = (
            f"{machine} has no gracefarm, or a version that is too old for --farm"
            if absent
            else f"the build on {machine} ended without a result: {words}"
        )
        remedy = f"install this version on that worker: pip install 'gracefarm[farm]=={job['gracefarm'].split()[0]}'"
        answer = {**lost(cause), "unfit": absent}
        if absent:
            answer["failure"]["remedy"] = remedy
    files = {}
    for name, place in answer.pop("files", {}).items():
        with open(place, "rb") as stream:  # noqa: PTH123
            files[name] = stream.read()
    return {**answer, "machine": machine, "node": node}, files


def run_program(job: dict[str, Any], project: bytes, send: Callable[[list[str]], object]) -> tuple[dict[str, Any] | None, str]:
    """The last line of the program that builds, and the last words of one that left none."""
    command = [sys.executable, "-P", "-m", "builder.farm.worker"]
    if shutil.which("setpriv"):  # so that it ends with this process, however that ends
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        output: queue.Queue[bytes | None] = queue.Queue()
        errors: list[bytes] = []
        readers = [
            threading.Thread(target=read_into, args=(program.stdout, output.put), daemon=True),
            threading.Thread(target=read_into, args=(program.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            with suppress(BrokenPipeError):
                program.stdin.write(json.dumps(job).encode() + b"\n" + project)
                program.stdin.close()
            answer = listen(output, send)
            readers[1].join(PATIENCE)
        finally:
            end_group(program)
    return answer, last_line(b"".join(errors).decode(errors="replace"), f"exit code {program.returncode}")


def read_into(stream: IO[bytes], put: Callable[[bytes], object]) -> None:
    """Every line of a stream; at its end, b""."""
    for line in stream:
        put(line)
    put(b"")


def listen(output: queue.Queue[bytes | None], send: Callable[[list[str]], object]) -> dict[str, Any] | None:
    """Forward a build's output, several lines at once, until its end. Waits are short, so that a cancel can arrive."""
    answer: dict[str, Any] | None = None
    texts: list[str] = []
    sent = time.monotonic()
    while True:
        line: bytes | None = None
        with suppress(queue.Empty):
            line = output.get(timeout=TICK)
        event = parsed(line)
        if event.get("event") == "answer":
            answer = {key: value for key, value in event.items() if key not in ("event", "text")}
        elif event.get("event") in ("step", "progress", "warning"):
            counts = f"{event['done']}/{event['total']}  " if event["event"] == "progress" else ""
            texts.append(f"{event.get('step', event['event']):>9}  {counts}{event['text']}")
        if texts and (line == b"" or time.monotonic() - sent > TICK):
            send(texts)
            texts, sent = [], time.monotonic()
        if line == b"":
            return answer


def parsed(line: bytes | None) -> dict[str, Any]:
    """An event of the builder's console; {} for anything else."""
    try:
        event = json.loads(line or b"{}")
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def end_group(program: subprocess.Popen[bytes]) -> None:
    """End a program as Ctrl-C on a terminal would; one that stays is killed."""
    for number, patience in ((signal.SIGINT, PATIENCE - 5), (signal.SIGKILL, PATIENCE)):
        if program.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, number)
            with suppress(subprocess.TimeoutExpired):
                program.wait(patience)
