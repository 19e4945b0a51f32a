"""Downloads the weights to the shared folder: pinned, distributed over all nodes, each file verified by another node."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from deploy.fleet.calls import RemoteNode, call, settle
from deploy.fleet.results import combined_error, on_all, try_all
from deploy.nodes import paths
from deploy.nodes.state import StepRecord, digest
from deploy.remote.wire import Json
from deploy.steps import assignment
from deploy.steps.assignment import Manifest, Portion, WeightsFile
from deploy.steps.processes import NO_MARK
from deploy.steps.step import Applied, Looks, Step, Undone, Work, end_jobs
from gracefarm.console import Console, Tick
from gracefarm.errors import DigestError, DiskFullError, GracefarmError, HostError, NodeError, SshError

JOB = "weights"
"Name of the detached job on each node."
ROUNDS = 4
"Maximum number of rounds. A corrupt file or a lost node requires one more round."
SIGN = 5.0
"Seconds between signs of life of a deployment that works on the shared folder."
ROOM = 1 << 30
"Bytes to keep free on the shared folder."


@dataclass(frozen=True, kw_only=True)
class WeightsSpec:
    """The model to download, and where to."""

    root: str
    "Folder of gracefarm on the shared file system."
    repo: str
    owner: str = ""
    "The deployment's id. It separates the partial files of deployments on one share whose nodes have the same names."
    revision: str = "main"
    "A commit, branch or tag. A branch or tag is resolved to a commit, which is printed."
    endpoint: str | None = None
    "HF_ENDPOINT: a mirror of the Hub."
    token: str | None = field(default=None, repr=False)
    "Passed on stdin. The worker keeps it in memory and writes it to no file."
    skip: Sequence[str] = assignment.SKIP
    workers: int = 8
    "Concurrent downloads on each node."
    patience: float = 120.0
    "Seconds without a sign of life of a node, after which the others stop waiting for its files."
    busy: float = 600.0
    "Seconds for which requests to a busy Hub (429, 5xx) are repeated, for each file."
    python: str | None = None
    "Python with huggingface_hub; default: that of the download environment."

    @property
    def worker_python(self) -> str:
        """The Python for calls that use the Hub."""
        return self.python or f"{self.root}/download/bin/python"


@dataclass(frozen=True, kw_only=True)
class Brought:
    """The result of a download."""

    manifest: Manifest
    folder: str
    "Path on every node, for the engine."
    fetched: int
    "Bytes that this run downloaded."
    rounds: int


def spec_of(work: Work) -> WeightsSpec:
    """The deployment's model, with the caller's token and endpoint."""
    model = work.deployment.data.model
    return WeightsSpec(
        root=paths.root(work.deployment),
        owner=work.fleet.mark,
        repo=model.repo,
        revision=model.revision,
        endpoint=work.environ.get("HF_ENDPOINT"),
        token=work.environ.get("HF_TOKEN"),
        python=paths.download_python(work.deployment),
    )


class WeightsStep(Step):
    """The model's files at a commit."""

    name = "weights"

    def inputs(self, work: Work, looks: Looks) -> str:
        """The model and its revision. A branch is resolved once; `--from weights` resolves it again."""
        model = work.deployment.data.model
        return digest("weights", paths.root(work.deployment), model.repo, model.revision)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Check that every node sees the manifest, and the head sees every file with its size."""
        for node, seen in looks.items():
            if seen["weights"] is None or seen["weights"]["manifest"] != record.data["manifest"]:
                return f"{node} does not see the files of the model"
            if seen["weights"]["wrong"]:
                return f"missing or of a different size: {', '.join(seen['weights']['wrong'][:3])}"
        return None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Download the files."""
        spec = spec_of(work)
        brought = await bring(work.nodes, spec, work.console)
        pinned, size = brought.manifest, assignment.told(brought.manifest.size)
        seen = await call(work.nodes[0], "look.look", {"prefix": NO_MARK, "weights": brought.folder, "count": False})
        return Applied(
            text=f"{spec.repo} at {pinned.commit[:12]}: {len(pinned.files)} files, {size}",
            now=f"{assignment.told(brought.fetched)} downloaded now by {len(work.nodes)} nodes" if brought.fetched else "",
            data={
                "folder": brought.folder,
                "commit": pinned.commit,
                "manifest": (seen["weights"] or {}).get("manifest"),
            },
        )

    async def undo(self, work: Work) -> Undone:
        """Stop downloads."""
        return await end_jobs(work, JOB, grace=20, stopped=[(node, JOB) for node in work.deployment.nodes])


@dataclass
class BusyNotice:
    """Reports at most once a minute that the Hub is busy, for all downloads together."""

    console: Console
    told: float = -60.0

    def __call__(self, node: str, event: Json) -> None:
        """An event of deploy.remote.hub."""
        if event["event"] == "busy" and time.monotonic() - self.told >= 60:
            self.told = time.monotonic()
            self.console.step("wait", f"{node}: HTTP {event['status']} from the Hub; trying again in {event['wait']:.0f} s")


async def bring(targets: Sequence[RemoteNode], spec: WeightsSpec, console: Console) -> Brought:
    """Download every file of the pinned commit. Verified files are kept if this fails, and are not downloaded again.

    Raises:
        FetchError: the Hub refuses (gated, unknown revision) or cannot be reached.
        DigestError: a file was corrupt in every round.
        DiskFullError: the shared folder has no room for the missing files.
        HostError: a node does not see the shared folder, or all nodes were lost.
    """
    pinned = await _manifest(targets[0], spec, console)
    place = paths.weights(spec.root, spec.repo, pinned.commit)
    console.step("weights", f"{spec.repo} at {pinned.commit[:12]}: {len(pinned.files)} files, {assignment.told(pinned.size)}")
    with console.progress("weights") as tick:
        notice = BusyNotice(console)
        run = _Run(spec=spec, manifest=pinned, place=place, console=console, tick=tick, notice=notice)
        return await run.go(list(targets))


async def _manifest(head: RemoteNode, spec: WeightsSpec, console: Console) -> Manifest:
    request: Json = {"repo": spec.repo, "revision": spec.revision, "endpoint": spec.endpoint, "token": spec.token}
    request["busy"] = spec.busy
    told = BusyNotice(console)
    answer = await call(
        head,
        "weights.manifest",
        request,
        python=spec.worker_python,
        on_event=lambda event: told(head.name, event),
    )
    return assignment.manifest(answer["repo"], answer["commit"], answer["files"], skip=spec.skip)


@dataclass(kw_only=True)
class _Run:
    """The rounds of one command."""

    spec: WeightsSpec
    manifest: Manifest
    place: str
    console: Console
    tick: Tick
    notice: BusyNotice
    fetched: int = 0
    corrupt: list[str] = field(default_factory=list)
    _done: int = 0

    async def go(self, nodes: list[RemoteNode]) -> Brought:
        # Wait for the downloads of a killed command first, so that nothing is downloaded twice.
        _, bad = await try_all(nodes, lambda node: settle(node, JOB, partial(self._told, node.name)))
        nodes = self._without(nodes, bad)
        for number in range(1, ROUNDS + 1):
            head = nodes[0]
            state = await self._alone(head)
            shares = assignment.rounds(self.manifest, state["final"], state["ready"], [node.name for node in nodes])
            if not any(portion.fetch or portion.verify for portion in shares.values()):
                return await self._finish(head, number - 1)
            self._measure(shares, state)
            nodes = self._without(nodes, await self._round(nodes, shares))
        raise DigestError(
            f"{', '.join(sorted(set(self.corrupt))[:3]) or 'some files'}: corrupt in each of {ROUNDS} downloads",
            remedy="download from a different server (environment variable HF_ENDPOINT), or set a later commit as `revision` "
            "in [model] of deploy.toml",
        )

    @property
    def _staging(self) -> str:
        return f"{self.place}{'.' + self.spec.owner if self.spec.owner else ''}.staging"

    async def _alone(self, head: RemoteNode) -> Json:
        """The state of the files. Waits while another deployment on this shared folder downloads the same files."""
        before: Mapping[str, object] = {}
        told = False
        while True:
            state: Json = await call(head, "weights.state", {"final": self.place, "staging": self._staging})
            now = state["others"]
            alive = [name for name in now if name not in before or before[name] != now[name]]
            if not alive:
                return state
            if before and not told:
                told = True
                self.console.step(
                    "wait", f"another deployment on this share downloads these files ({alive[0]}); waiting for it"
                )
            before = now
            await asyncio.sleep(SIGN)

    def _measure(self, shares: Mapping[str, Portion], state: Json) -> None:
        """Check that the missing files fit on the shared folder, before anything is downloaded."""
        missing = sum(file.size for portion in shares.values() for file in portion.fetch)
        self._done = self.manifest.size - missing
        if missing and state["free"] < missing + min(ROOM, missing):
            raise DiskFullError(
                f"{assignment.told(missing)} of the model must still be downloaded, but the shared folder has only "
                f"{assignment.told(state['free'])} free",
                remedy="free space on the shared folder: remove old environments with `deploy env gc`, or remove "
                f"models that you do not need from the folder {self.spec.root}/weights",
            )

    async def _round(self, nodes: Sequence[RemoteNode], shares: Mapping[str, Portion]) -> dict[str, GracefarmError]:
        """Run one round. Return the errors of lost nodes."""
        nonce = secrets.token_hex(16)
        await call(nodes[0], "weights.prepare", {"final": self.place, "staging": self._staging, "nonce": nonce})
        busy = [node for node in nodes if shares[node.name].fetch or shares[node.name].verify]
        good, bad = await try_all(busy, lambda node: self._fetch(node, shares[node.name], nonce))
        for corrupt in (answer["corrupt"] for answer in good.values()):
            self.corrupt += corrupt
            if corrupt:
                self.console.warn(f"these files are corrupt, and another node will download them again: {', '.join(corrupt)}")
        return bad

    def _without(self, nodes: list[RemoteNode], bad: Mapping[str, GracefarmError]) -> list[RemoteNode]:
        """The remaining nodes. Raises errors that would occur on every node, and the error if no node is left."""
        for error in bad.values():
            if not isinstance(error, (HostError, SshError, NodeError)) or "shared folder" in error.cause:
                raise error
        left = [node for node in nodes if node.name not in bad]
        if not left:
            raise combined_error(bad, len(nodes))
        for error in bad.values():
            self.console.warn(f"{error.cause}; the other nodes download the files of this node")
        return left

    async def _fetch(self, node: RemoteNode, share: Portion, nonce: str) -> Json:
        request = {
            "me": node.name,
            "final": self.place,
            "staging": self._staging,
            "nonce": nonce,
            "repo": self.spec.repo,
            "commit": self.manifest.commit,
            "endpoint": self.spec.endpoint,
            "token": self.spec.token,
            "workers": self.spec.workers,
            "patience": self.spec.patience,
            "busy": self.spec.busy,
            "files": [file.model_dump() for file in share.fetch],
            "verify": [{**file.model_dump(), "node": stager} for stager, file in share.verify],
        }
        on_event = partial(self._told, node.name)
        return await call(node, "weights.fetch", request, python=self.spec.worker_python, on_event=on_event, job=JOB)

    def _told(self, node: str, event: Json) -> None:
        if event["event"] == "staged":
            self.fetched += event["size"]
            self._done += event["size"]
            self.tick(self._done, self.manifest.size, f"{node}: {event['path']}")
        elif event["event"] == "corrupt":
            self._done -= next((file.size for file in self.manifest.files if file.path == event["path"]), 0)
        elif event["event"] == "busy":
            self.notice(node, event)
        elif event["event"] == "wait":
            self.console.step("wait", f"{node}: an earlier download is still running ({event['owner']}); waiting for it")

    async def _finish(self, head: RemoteNode, rounds: int) -> Brought:
        text = self.manifest.model_dump_json(indent=1)
        await call(head, "weights.finish", {"final": self.place, "staging": self._staging, "manifest": text})
        return Brought(manifest=self.manifest, folder=self.place, fetched=self.fetched, rounds=rounds)


async def verify(targets: Sequence[RemoteNode], spec: WeightsSpec, commit: str, *, remove: bool = False) -> list[str]:
    """Hash all files again, distributed over all nodes, and return the paths that are wrong or missing.

    `remove`: delete the wrong files.
    """
    place = paths.weights(spec.root, spec.repo, commit)
    text = (await call(targets[0], "weights.read_manifest", {"final": place}))["manifest"]
    pinned = Manifest.model_validate(json.loads(text))
    shares: dict[str, list[WeightsFile]] = assignment.deal(pinned.files, [node.name for node in targets])

    async def rehash(node: RemoteNode) -> Json:
        files = [file.model_dump() for file in shares[node.name]]
        return await call(node, "weights.rehash", {"final": place, "files": files, "remove": remove})

    answers = await on_all(targets, rehash)
    return sorted(path for answer in answers.values() for path in answer["wrong"])
