"""A node's part of fetching weights: download its own files, verify a neighbour's, rename what is right.

    SHARE/…/COMMIT/                    verified files, each renamed into place: what is there is right
    SHARE/…/COMMIT.staging/NODE/part/  being downloaded by NODE
    SHARE/…/COMMIT.staging/NODE/ready/ downloaded by NODE, not yet verified by another

Nodes speak over the shared folder alone, so that a cut connection to the one who asked stops nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

from deploy.remote import hub, mounts
from deploy.remote.sharedlock import SharedLock
from deploy.remote.wire import Json, WorkerError, event

CHUNK = 1 << 22
POLL = 0.2
STALE = 86400.0
PULSE = 2.0


def manifest(request: Json) -> Json:
    """The repository at a revision: commit, and path, size and digest of each file. Run by the download environment's Python.

    `repo`, `revision`, `endpoint`, `token`. Asks for access to the content too, before anything is downloaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=request["endpoint"], token=_token(request), library_name="gracefarm")
    try:
        info = hub.patiently(
            request, lambda: api.model_info(request["repo"], revision=request["revision"], files_metadata=True)
        )
        try:
            hub.patiently(request, lambda: api.auth_check(request["repo"]))
        except (GatedRepoError, RepositoryNotFoundError):
            raise
        except HfHubHTTPError as error:  # a mirror may not know this question; the first download will tell
            if hub.busy(error):
                raise
            event(
                "note",
                text=f"{request['endpoint'] or 'the Hub'} does not answer whether access is granted: {hub.short(error)}",
            )
    except Exception as error:
        raise hub.explain(error, request) from error
    files = [
        {
            "path": file.rfilename,
            "size": file.size,
            "sha256": file.lfs.sha256 if file.lfs else None,
            "git": None if file.lfs else file.blob_id,
        }
        for file in info.siblings or []
    ]
    return {"repo": request["repo"], "commit": info.sha, "files": files}


def state(request: Json) -> Json:
    """What is verified (`final`: path to size), what waits to be verified (`ready`: node to {path: size}), and free bytes.

    `others`: other deployments' staging folders for the same files, and the last sign of life in each.
    """
    final, staging = Path(request["final"]), Path(request["staging"])
    ready = {folder.name: _sizes(folder / "ready") for folder in staging.iterdir()} if staging.is_dir() else {}
    space = mounts.space(mounts.existing(final)) or {"free": 0}
    others = {folder.name: _sign(folder) for folder in _stagings(final) if folder != staging}
    return {"final": _sizes(final), "ready": ready, "free": space["free"], "others": others}


def _stagings(final: Path) -> list[Path]:
    return sorted(final.parent.glob(f"{final.name}*.staging"))


def _sign(staging: Path) -> list[str]:
    """What its nodes last said of themselves."""
    return [_read(pulse) or "" for pulse in sorted(staging.glob("*/pulse"))]


def prepare(request: Json) -> Json:
    """Make the folders, and leave the nonce by which every other node proves that it sees the same ones."""
    staging = Path(request["staging"])
    Path(request["final"]).mkdir(parents=True, exist_ok=True)
    staging.mkdir(parents=True, exist_ok=True)
    _write(staging / "share", request["nonce"])
    return {}


def fetch(request: Json) -> Json:
    """Download `files`, verify `verify` (files of others); run by the download environment's Python.

    `me`, `final`, `staging`, `nonce`, `repo`, `commit`, `endpoint`, `token`, `workers`, `patience` (seconds without a sign of
    a neighbour after which its verifier stops waiting for it), `busy` (seconds to wait for a Hub that is busy);
    `files`: [{path, size, sha256, git}], `verify`: the same with `node`, who stages it.
    """
    final, staging = Path(request["final"]), Path(request["staging"])
    _same_share(staging, request["nonce"])
    mine = staging / request["me"]
    with SharedLock(mine / "lock", on_wait=lambda who: event("wait", owner=who)):
        stop = threading.Event()
        pulse = threading.Thread(target=_pulse, args=(mine, stop), daemon=True)
        pulse.start()
        _write(mine / "round", request["nonce"])
        checker = _Verifier(request, final, staging)
        checker.start()
        problem: WorkerError | None = None
        try:
            _download_all(request, final, mine)
        except WorkerError as failure:
            problem = failure
            shutil.rmtree(mine / "part", ignore_errors=True)  # on a full disk the next line needs room
        _write(mine / "end", request["nonce"])
        checker.join()
        stop.set()
        pulse.join()
        if problem:
            raise problem
        return {"corrupt": checker.corrupt}


def _same_share(staging: Path, nonce: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        if _read(staging / "share") == nonce:
            return
        if time.monotonic() > deadline:
            raise WorkerError(
                "share",
                f"this node does not see the shared folder: {staging} is not what the others see",
                "mount the shared file system at the same path on every node (`deploy preflight` shows which have it)",
            )
        time.sleep(POLL)


def _download_all(request: Json, final: Path, mine: Path) -> None:
    """All files, several at a time, largest first; the first refusal ends the round (a gated file stays gated).

    The threads are daemons: when this process is told to end, it waits for none of them and begins no further file.
    """
    part, ready = mine / "part", mine / "ready"
    shutil.rmtree(part, ignore_errors=True)  # huggingface_hub >= 1 resumes no partial file, and ours are whole or nothing
    part.mkdir(parents=True)
    waiting = deque(sorted(request["files"], key=lambda file: -int(file["size"])))
    problems: list[Exception] = []

    def work() -> None:
        while not problems:
            try:
                file = waiting.popleft()
            except IndexError:
                return
            if file["size"] in (mounts.size(final / file["path"]), mounts.size(ready / file["path"])):
                continue
            try:
                _download(request, file, part, ready)
            except Exception as error:  # noqa: BLE001 - told below, in the thread that answers
                problems.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(request["workers"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise hub.explain(problems[0], request) from problems[0]
    shutil.rmtree(part, ignore_errors=True)


def _download(request: Json, file: Json, part: Path, ready: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    started, endpoint, token = time.monotonic(), request["endpoint"], _token(request)
    url = hf_hub_url(request["repo"], file["path"], revision=request["commit"], endpoint=endpoint)
    # Asked first by ourselves: hf_hub_download waits for a busy Hub too, five times as long as that says, and without a word.
    hub.patiently(request, lambda: get_hf_file_metadata(url, token=token, endpoint=endpoint, library_name="gracefarm"))
    download = partial(
        hf_hub_download,
        request["repo"],
        file["path"],
        revision=request["commit"],
        local_dir=part,
        endpoint=endpoint,
        token=token,
        library_name="gracefarm",
        user_agent={"node": request["me"]},
    )
    got = Path(hub.patiently(request, download))
    target = ready / file["path"]
    target.parent.mkdir(parents=True, exist_ok=True)
    got.rename(target)
    event("staged", path=file["path"], size=file["size"], seconds=round(time.monotonic() - started, 3))


class _Verifier(threading.Thread):
    """Hashes what other nodes stage, as it comes, through this node's own client: the stager's cache would prove nothing."""

    def __init__(self, request: Json, final: Path, staging: Path) -> None:
        super().__init__(daemon=True)
        self.corrupt: list[str] = []
        self._final, self._staging, self._nonce = final, staging, request["nonce"]
        self._patience = float(request["patience"])
        self._waiting: list[Json] = list(request["verify"])
        self._seen: dict[str, tuple[object, float]] = {}

    def run(self) -> None:
        while self._waiting:
            over = {node: self._is_over(node) for node in {file["node"] for file in self._waiting}}
            before = len(self._waiting)
            self._waiting = [file for file in self._waiting if not self._settle(file, over[file["node"]])]
            if len(self._waiting) == before:
                time.sleep(POLL)

    def _settle(self, file: Json, over: bool) -> bool:
        """True when there is nothing left to wait for. `over` was asked before we looked, so that no late file is missed."""
        path = self._staging / file["node"] / "ready" / file["path"]
        target = self._final / file["path"]
        if not path.is_file():
            return over or mounts.size(target) == file["size"]
        try:
            right = _digest(path, file)
            if right:
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        except OSError as error:  # somebody took it away, or the disk is full: the next round sees what is there
            event("unread", path=file["path"], cause=str(error))
            return True
        if right:
            event("verified", path=file["path"], size=file["size"], staged_by=file["node"])
        else:
            path.unlink()
            self.corrupt.append(file["path"])
            event("corrupt", path=file["path"], staged_by=file["node"])
        return True

    def _is_over(self, node: str) -> bool:
        """The node said that it ended this round, or has given no sign for `patience` by our own clock."""
        folder = self._staging / node
        if _read(folder / "end") == self._nonce:
            return True
        sign = (_read(folder / "round"), _read(folder / "pulse"))
        if node not in self._seen or self._seen[node][0] != sign:
            self._seen[node] = (sign, time.monotonic())
        return time.monotonic() - self._seen[node][1] > self._patience


def _digest(path: Path, file: Json) -> bool:
    if path.stat().st_size != file["size"]:
        return False
    digest = hashlib.sha256() if file["sha256"] else hashlib.sha1(b"blob %d\0" % file["size"], usedforsecurity=False)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the bytes that are stored, not those held in memory
        while block := stream.read(CHUNK):
            digest.update(block)
    return bool(digest.hexdigest() == (file["sha256"] or file["git"]))


def rehash(request: Json) -> Json:
    """Hash finished files again (`deploy weights verify`): the paths that are wrong or missing."""
    final = Path(request["final"])
    wrong = []
    for file in request["files"]:
        try:
            right = _digest(final / file["path"], file)
        except OSError:
            right = False
        event("hashed", path=file["path"], size=file["size"], right=right)
        if not right:
            wrong.append(file["path"])
            if request.get("remove"):
                (final / file["path"]).unlink(missing_ok=True)
    return {"wrong": wrong}


def read_manifest(request: Json) -> Json:
    """The manifest that `finish` left."""
    path = Path(request["final"] + ".manifest.json")
    if not path.is_file():
        raise WorkerError("fetch", f"{request['final']} is not complete", "`deploy up` completes it")
    return {"manifest": path.read_text()}


def finish(request: Json) -> Json:
    """All is verified: write the manifest, take our staging folders away, and others' that nobody has worked in for a day."""
    _write(Path(request["final"] + ".manifest.json"), request["manifest"])
    shutil.rmtree(request["staging"], ignore_errors=True)
    for staging in _stagings(Path(request["final"])):
        with suppress(OSError):
            last = max(file.stat().st_mtime for file in (staging, *staging.glob("*/pulse")))
            if time.time() - last > STALE:
                shutil.rmtree(staging, ignore_errors=True)
    return {}


def _token(request: Json) -> str | bool:
    """False says: send none, also not one that a person left in ~/.cache/huggingface."""
    return request.get("token") or False


def _pulse(mine: Path, stop: threading.Event) -> None:
    for count in itertools.count(1):
        with suppress(OSError):  # a full disk is told by the download itself
            _write(mine / "pulse", str(count))
            event("part", bytes=sum(file.stat().st_size for file in (mine / "part").rglob("*.incomplete")))
        if stop.wait(PULSE):
            return


def _sizes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.rename(path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
