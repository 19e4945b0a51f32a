"""Builds on a cluster, for the machine that uses it: send cells, receive output and wheels."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.farm import code, job
from builder.farm.cluster import Cluster
from builder.flow import history
from builder.flow.attempt import BuildOptions
from builder.flow.matrix import fits, served_by
from builder.flow.publishing import publish_build, refuse_objects, send_failure
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from builder.proof.record import Failure, Record
from gracefarm.console import Console
from gracefarm.errors import FarmError, GracefarmError, VerifyError
from gracefarm.files import atomic_write, full_disk, lock

LOOK = 0.5
"Seconds between two looks at the foreman."

Result = Record | GracefarmError


def build(
    plans: Sequence[Plan],
    served: Callable[[Plan], Plan],
    options: BuildOptions,
    cluster: Cluster,
    settings: Settings,
    console: Console,
) -> Iterator[Result]:
    """Each plan's record or error, or that of the plan that serves it, as they come. Ctrl-C ends what no other run waits for.

    Raises:
        FarmError: the cluster has ended.
    """
    run = _FarmRun(served=served, options=options, cluster=cluster, settings=settings, console=console)
    try:
        yield from run.follow(plans)
    finally:
        run.leave()


class _FarmRun:
    """The cells that this process waits for.

    Of plans that differ only in Python, one is sent at a time until a wheel shows that the recipe's ABI is not stable.
    """

    def __init__(
        self,
        *,
        served: Callable[[Plan], Plan],
        options: BuildOptions,
        cluster: Cluster,
        settings: Settings,
        console: Console,
    ) -> None:
        self.served = served
        self.options = options
        self.cluster = cluster
        self.settings = settings
        self.console = console
        self.digest, self.title = code.digest(), code.title()
        self.driver = uuid.uuid4().hex
        self.waiting: dict[str, Plan] = {}
        self.heard: dict[str, int] = {}
        "Lines by build id."

    @cached_property
    def project(self) -> bytes:
        """The archive that every cell of this run is built from."""
        return code.pack(self.settings.project)

    def _ask(self, plans: Sequence[Plan]) -> Generator[Result, None, list[Plan]]:
        """Send the cells. Yields those that are built already, and those that cannot be sent; returns those held back."""
        records = record.all_of(self.settings)
        new: dict[str, tuple[Plan, job.Job]] = {}
        under_way = {history.but_python(plan) for plan in self.waiting.values()}
        held: list[Plan] = []
        for planned in plans:
            alike = history.but_python(planned)
            if alike in under_way and history.stable(planned.recipe.key, records) is not False:
                held.append(planned)
                continue
            try:
                plan = self.served(planned)
                here = record.settled(plan, self.settings)
                if self.options.publish:
                    refuse_objects(plan.stack.data)
                if here is not None:
                    self.console.step("done", f"{plan.title}: built already, build id {plan.build_id[:16]}")
                    yield self._published(here)
                    continue
                plan.require_digests()
                share = self.cluster.share(plan, self.options.jobs)
            except GracefarmError as error:
                yield error
                continue
            under_way.add(alike)
            if plan.build_id not in self.waiting:
                new[plan.build_id] = plan, job.of_plan(plan, self.options, share, code=self.digest, gracefarm=self.title)
        if new:
            self._send(new)
            if held:
                self.console.step(
                    "farm", f"cells that wait, because an abi3 wheel of another cell may serve them: {len(held)}"
                )
        return held

    def _send(self, new: Mapping[str, tuple[Plan, job.Job]]) -> None:
        self.console.step("farm", f"cells: {len(new)}; workers: {len(self.cluster.workers)}, at {self.cluster.address}")
        jobs = [entry.model_dump(mode="json") for _, entry in new.values()]
        project = self.project
        self.waiting |= {build_id: plan for build_id, (plan, _) in new.items()}
        for build_id in self.cluster.call("ask", self.driver, jobs, project):
            name = job.title(self.waiting[build_id])
            self.console.event(
                "cell", f"{name}  is already being built for another run; this run waits for that build", cell=name
            )

    def follow(self, plans: Sequence[Plan]) -> Iterator[Result]:
        """Send the cells and print their lines; yields each that has ended."""
        held = yield from self._ask(plans)
        while self.waiting:
            ended = False
            news: Mapping[str, dict[str, Any]] = self.cluster.call("news", self.driver, self.heard)
            for build_id, plan in tuple(self.waiting.items()):
                if build_id not in self.waiting:
                    continue  # the wheel of a cell before it serves it
                if build_id not in news:
                    raise FarmError(
                        f"the Ray cluster at {self.cluster.address} was restarted and has lost {job.title(plan)}",
                        remedy="repeat the command: finished builds are kept",
                    )
                self._print(plan, news[build_id]["lines"])
                outcome = news[build_id]["outcome"]
                if outcome is not None:
                    result = self._result(plan, outcome)
                    self._end(build_id)
                    ended = True
                    yield result
                    yield from self._end_served(plan)
            if ended and held:
                held = yield from self._ask(held)
            if self.waiting:
                time.sleep(LOOK)

    def _end(self, build_id: str) -> None:
        del self.waiting[build_id]
        self.cluster.call("leave", self.driver, [build_id])

    def _end_served(self, plan: Plan) -> Iterator[Result]:
        """End the cells that the wheel of a finished cell serves; all were sent if the wheel before had no stable ABI."""
        built = record.settled(plan, self.settings)
        if built is None:
            return
        for build_id, other in tuple(self.waiting.items()):
            if fits(built, other.stack.python) and history.but_python(other) == history.but_python(plan):
                self._end(build_id)
                self.console.step("done", served_by(built, other))
                yield self._published(built)

    def leave(self) -> None:
        """Wait for nothing more, whatever was the end."""
        if self.waiting:
            self.console.step("farm", "ending the builds that no other run waits for")
            left, self.waiting = list(self.waiting), {}
            try:
                self.cluster.call("leave", self.driver, left)
            except FarmError as error:
                self.console.warn(f"{error.cause}; the cluster continues the builds that are running")

    def _print(self, plan: Plan, lines: Sequence[str]) -> None:
        name = job.title(plan)
        for line in lines:
            self.console.event("cell", f"{name}  {line}", cell=name)
        self.heard[plan.build_id] = self.heard.get(plan.build_id, 0) + len(lines)

    def _result(self, plan: Plan, outcome: Mapping[str, Any]) -> Result:
        """What came back, kept here as if it had been built here."""
        files: Mapping[str, bytes] = {}
        (reference,) = self.cluster.call("take", plan.build_id)
        failure = Failure.model_validate(outcome["failure"]) if outcome.get("failure") else None
        try:
            if failure is None or outcome.get("machine"):
                files = self.cluster.fetch(reference)
            built = _keep(plan, files, self.settings) if files else None
            if failure is None:
                assert built is not None
                return self._published(built)
        except FarmError:
            raise
        except GracefarmError as error:
            return error
        if built is not None and self.options.publish:
            send_failure(plan.build_id, self.options.publish, self.settings, self.console)
        return job.error(failure, plan.repeat)

    def _published(self, built: Record) -> Result:
        if not self.options.publish:
            return built
        try:
            return publish_build(built, self.options.publish, self.settings, self.console)
        except GracefarmError as error:
            return error


def _keep(plan: Plan, files: Mapping[str, bytes], settings: Settings) -> Record | None:
    """Write the files of a build to its folder here, the record last; the record as it is read again.

    Raises:
        VerifyError: the wheel is not the one that the record names.
        DiskFullError: no space is left here.
    """
    folder = record.folder(settings, plan.build_id)
    with full_disk(folder), lock(settings.home / "locks" / f"build-{plan.build_id}"):
        place = record.path(settings, plan.build_id)
        if "record.json" not in files:
            return None
        if not place.is_file() or place.read_bytes() != files["record.json"]:
            sent = Record.model_validate_json(files["record.json"])
            if sent.wheel is not None:
                wheel = files.get(f"dist/{sent.wheel.filename}", b"")
                if hashlib.sha256(wheel).hexdigest() != sent.wheel.sha256 or sent.build_id != plan.build_id:
                    raise VerifyError(
                        f"the sha256 of {sent.wheel.filename} from the Ray cluster differs from the one in its record",
                        remedy="do not use this wheel; check the worker that built it (`ray status`), then repeat the command",
                    )
            for name, content in files.items():
                if name == "log.txt" or name == f"dist/{Path(name).name}":
                    atomic_write(folder / name, content)
            atomic_write(place, files["record.json"])
    return record.read(settings, plan.build_id)
