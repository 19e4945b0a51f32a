"""The part of one node in downloading weights: download files, verify files of another node, rename correct files.

    SHARE/…/COMMIT/                    verified files, each renamed to this folder
    SHARE/…/COMMIT.staging/NODE/part/  files that NODE is downloading
    SHARE/…/COMMIT.staging/NODE/ready/ files that NODE has downloaded, and another node has not verified yet

Nodes communicate only over the shared folder, so a lost connection to the caller does not stop them.
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
    """The commit of a revision, and path, size and digest of each file. Run by the download environment's Python.

    `repo`, `revision`, `endpoint`, `token`. It also checks the access to the files, before anything is downloaded.
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
        except HfHubHTTPError as error:  # a mirror may not support this request; then the first download shows it
            if hub.busy(error):
                raise
            event(
                "note",
                text=f"{request['endpoint'] or 'the Hub'} does not support checking the access: {hub.short(error)}",
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
    """The verified files (`final`: path to size), the files to verify (`ready`: node to {path: size}), and the free bytes.

    `others`: staging folders of other deployments for the same files, with the last sign of life in each.
    """
    final, staging = Path(request["final"]), Path(request["staging"])
    ready = {folder.name: _sizes(folder / "ready") for folder in staging.iterdir()} if staging.is_dir() else {}
    space = mounts.space(mounts.existing(final)) or {"free": 0}
    others = {folder.name: _sign(folder) for folder in _stagings(final) if folder != staging}
    return {"final": _sizes(final), "ready": ready, "free": space["free"], "others": others}


def _stagings(final: Path) -> list[Path]:
    return sorted(final.parent.glob(f"{final.name}*.staging"))


def _sign(staging: Path) -> list[str]:
    """The last signs of life of its nodes."""
    return [_read(pulse) or "" for pulse in sorted(staging.glob("*/pulse"))]


def prepare(request: Json) -> Json:
    """Create the folders and write a nonce, with which the other nodes check that they see the same folder."""
    staging = Path(request["staging"])
    Path(request["final"]).mkdir(parents=True, exist_ok=True)
    staging.mkdir(parents=True, exist_ok=True)
    _write(staging / "share", request["nonce"])
    return {}


def fetch(request: Json) -> Json:
    """Download `files`, and verify `verify` (files of other nodes). Run by the download environment's Python.

    `me`, `final`, `staging`, `nonce`, `repo`, `commit`, `endpoint`, `token`, `workers`, `patience` (seconds without a sign of
    life after which this node stops waiting for another), `busy` (seconds to wait for a busy Hub); `files`: [{path, size,
    sha256, git}], `verify`: the same with `node`, which downloads the file.
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
            shutil.rmtree(mine / "part", ignore_errors=True)  # the next line needs free space
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
                f"this node does not see the shared folder: {staging} does not have the files of the other nodes",
                "mount the shared file system at the same path on every node; `deploy preflight` checks it",
            )
        time.sleep(POLL)


def _download_all(request: Json, final: Path, mine: Path) -> None:
    """Download all files in parallel, largest first. The first error ends the round, since it would occur for other files too.

    The threads are daemons, so that this process can end without waiting for them.
    """
    part, ready = mine / "part", mine / "ready"
    shutil.rmtree(part, ignore_errors=True)  # huggingface_hub >= 1 does not resume partial files
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
            except Exception as error:  # noqa: BLE001 - raised below, in the main thread
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
    # This request comes first since hf_hub_download also waits for a busy Hub, but up to five times as long and silently.
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
    """Hashes files when other nodes have downloaded them. Hashing on the downloading node would only read its own cache."""

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
        """Verify a file if it exists. Return True if it need not be waited for any longer.

        `over` was determined before, so that a late file is not missed.
        """
        path = self._staging / file["node"] / "ready" / file["path"]
        target = self._final / file["path"]
        if not path.is_file():
            return over or mounts.size(target) == file["size"]
        try:
            right = _digest(path, file)
            if right:
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        except OSError as error:  # the file was removed or the disk is full; the next round checks again
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
        """Whether the node has finished this round, or gave no sign of life for `patience` seconds of our clock."""
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
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read the stored bytes, not those in memory
        while block := stream.read(CHUNK):
            digest.update(block)
    return bool(digest.hexdigest() == (file["sha256"] or file["git"]))


def rehash(request: Json) -> Json:
    """Hash the files again (`deploy weights verify`). Return the paths that are wrong or missing."""
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
    """The manifest that `finish` wrote."""
    path = Path(request["final"] + ".manifest.json")
    if not path.is_file():
        raise WorkerError("fetch", f"{request['final']} is not complete", "run `deploy up` to complete it")
    return {"manifest": path.read_text()}


def finish(request: Json) -> Json:
    """Write the manifest, and remove our staging folder and those of others without a sign of life for a day."""
    _write(Path(request["final"] + ".manifest.json"), request["manifest"])
    shutil.rmtree(request["staging"], ignore_errors=True)
    for staging in _stagings(Path(request["final"])):
        with suppress(OSError):
            last = max(file.stat().st_mtime for file in (staging, *staging.glob("*/pulse")))
            if time.time() - last > STALE:
                shutil.rmtree(staging, ignore_errors=True)
    return {}


def _token(request: Json) -> str | bool:
    """The token. False: send no token, not even one in ~/.cache/huggingface."""
    return request.get("token") or False


def _pulse(mine: Path, stop: threading.Event) -> None:
    for count in itertools.count(1):
        with suppress(OSError):  # the download itself reports a full disk
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
