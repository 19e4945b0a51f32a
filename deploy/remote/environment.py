"""Environments on the shared file system: built once, named by their content, activated with a symbolic link, rolled back.

    ROOT/envs/ID/                  complete if it has environment.json, and never changed afterwards
    ROOT/generations-env/000007    symbolic link to ../envs/ID; the generations that were active, in order
    ROOT/env                       symbolic link to generations-env/000007, the active environment
    ROOT/python/ID/                interpreter that uv or conda installed
    ROOT/locks/                    deploy.remote.sharedlock

The environment for downloads is also in ROOT/envs. Its links are ROOT/download and ROOT/generations-download.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from deploy.remote.driver import cuda
from deploy.remote.libraries import requirements
from deploy.remote.removal import remove_all
from deploy.remote.sharedlock import SharedLock
from deploy.remote.wire import Json, WorkerError, event
from gracefarm.process import last_line
from gracefarm.uv import explain

_MANAGED = 'set `python = "managed"` in deploy.toml, so that uv installs Python in the shared folder'
_BRING = (
    "check that the head reaches the releases of python-build-standalone; or set `python_mirror` in deploy.toml to a mirror "
    'of them; or install Python 3.11 on every node and set `python = "system"`'
)
DESCRIPTION = "environment.json"
OWNER = "owner"
SCRATCH = "gracefarm-env-"
"Prefix of a build's temporary folders on a node's local disk. The process id of the build follows."


def build(request: Json) -> Json:
    """Build ROOT/envs/ID unless it exists. If several nodes call this, the first one builds, and the others wait.

    `root`, `id`, `lock` (text of the requirements), `packages` (its pins), `index` (simple API), `python` ({source, version,
    mirror}), `uv` (path of uv on this node), `engine` and `set` (for the description).
    """
    root = Path(request["root"])
    final = root / "envs" / request["id"]
    with SharedLock(root / "locks" / f"env-{request['id']}", on_wait=lambda who: event("wait", owner=who)) as held:
        if (final / DESCRIPTION).is_file():
            return {"built": False, **_described(final)}
        for left in (root / "envs").glob(f".{request['id']}.*"):
            remove_all(left)
        partial = root / "envs" / f".{request['id']}.{uuid.uuid4().hex[:8]}"
        try:
            described = _make(request, partial)
            if not held.still_mine():
                raise WorkerError("busy", "another node has taken over this build", "repeat the command")
            partial.rename(final)
        except BaseException:
            remove_all(partial)
            raise
    return {"built": True, **described}


def sweep(request: Json) -> Json:
    """Remove files of killed builds: partial environments in ROOT, and temporary folders on this node's local disk.

    A build that gets TERM removes them itself, but a killed one, as at the end of `deploy down`, cannot.
    """
    root, removed = Path(request["root"]), []
    for left in sorted((root / "envs").glob(".*")):
        with suppress(WorkerError), SharedLock(root / "locks" / f"env-{left.name.split('.')[1]}", give_up=0):
            remove_all(left)
            removed.append(left.name)
    for left in sorted(Path(tempfile.gettempdir()).glob(f"{SCRATCH}[0-9]*-*")):
        pid = left.name.removeprefix(SCRATCH).partition("-")[0]
        if left.stat().st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
            remove_all(left)
            removed.append(left.name)
    return {"removed": removed}


def _make(request: Json, partial: Path) -> Json:
    started = time.monotonic()
    partial.parent.mkdir(parents=True, exist_ok=True)
    base = interpreter(request)
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True) as scratch:
        lock = Path(scratch) / "requirements.lock"
        lock.write_text(request["lock"])
        event("step", text=f"creating a virtual environment with {base}")
        _uv(request, "venv", "--quiet", "--relocatable", "--no-project", "--python", base, str(partial), scratch=scratch)
        event("step", text=f"installing {len(request['packages'])} pinned packages")
        _uv(
            request,
            *("pip", "install", "--quiet", "--python", str(partial / "bin" / "python"), "--require-hashes", "--no-deps"),
            *("--only-binary", ":all:", "--link-mode", "copy", "--compile-bytecode", "--requirements", str(lock)),
            *(("--default-index", request["index"]) if request["index"] else ()),
            scratch=scratch,
        )
    libraries = requirements(partial)
    described = {
        "id": request["id"],
        "engine": request.get("engine"),
        "set": request.get("set"),
        "interpreter": base,
        "packages": request["packages"],
        "machine": os.uname().machine,
        "created": time.time(),
        "build_s": round(time.monotonic() - started, 2),
        **libraries,
    }
    with (partial / DESCRIPTION).open("w") as stream:
        json.dump(described, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    return described


def about(request: Json) -> Json:
    """Architecture, home folder, and the exact version of the Python for an environment."""
    version = request["python"]
    if request["source"] == "system":
        executable = shutil.which(f"python{'.'.join(version.split('.')[:2])}")
        if executable is not None:
            code = "import platform; print(platform.python_version())"
            version = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return {"machine": os.uname().machine, "home": str(Path.home()), "python": version}


def digest(request: Json) -> Json:
    """sha256 of a file on this node; None if it does not exist."""
    path = Path(request["path"])
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None}


def interpreter(request: Json) -> str:
    """The base Python of an environment: the node's, or one on the shared folder from uv or conda, installed if missing."""
    wanted, source = request["python"]["version"], request["python"]["source"]
    if source == "system":
        executable = shutil.which(f"python{'.'.join(wanted.split('.')[:2])}")
        if executable is None:
            raise WorkerError("python", f"no python{wanted} on this node", f"install it on every node, or {_MANAGED}")
        return os.path.realpath(executable)
    place = Path(request["root"]) / "python" / f"{source}-{wanted}-{os.uname().machine}"
    with SharedLock(Path(request["root"]) / "locks" / place.name, on_wait=lambda who: event("wait", owner=who)):
        if not (place / ".complete").is_file():
            remove_all(place)
            place.mkdir(parents=True)
            event("step", text=f"installing Python {wanted} with {'uv' if source == 'managed' else 'conda'}")
            _bring(request, source, wanted, place)
            (place / ".complete").touch()
    pattern = "bin/python3" if source == "conda" else "*/bin/python3"
    return os.path.realpath(min(place.glob(pattern)))


def _bring(request: Json, source: str, wanted: str, place: Path) -> None:
    if source == "managed":
        mirror = request["python"].get("mirror")
        where = ("--install-dir", str(place), *(("--mirror", mirror) if mirror else ()))
        with tempfile.TemporaryDirectory() as scratch:
            # No --quiet, which hides the reason of a failure.
            _uv(request, "python", "install", "--no-progress", "--no-bin", *where, wanted, scratch=scratch)
        return
    tool = next((program for program in _conda() if shutil.which(program)), None)
    if tool is None:
        raise WorkerError("python", "no conda, mamba or micromamba on this node", f"install one of them, or {_MANAGED}")
    process = subprocess.run(
        [tool, "create", "--yes", "--prefix", str(place), f"python={wanted}"], capture_output=True, text=True, check=False
    )
    if process.returncode:
        reason = last_line(process.stderr or process.stdout)
        raise WorkerError(
            "python", f"{tool}: {reason}", "check on the node that the channels in conda's configuration can be reached"
        )


def _conda() -> list[str]:
    """Names and usual paths of conda. The paths are necessary since a login without a terminal does not read the profile."""
    folders = [Path.home() / name / "bin" for name in ("miniforge3", "miniconda3", "anaconda3", "micromamba")]
    return ["micromamba", "mamba", "conda", *(str(folder / "conda") for folder in [*folders, Path("/opt/conda/bin")])]


def _uv(request: Json, *arguments: str, scratch: str) -> None:
    """Run uv without the user's configuration, with a cache on this node's local disk."""
    kept = ("UV_PYTHON_INSTALL_MIRROR", "UV_PYTHON_DOWNLOADS_JSON_URL")
    environment = {key: value for key, value in os.environ.items() if key in kept or not key.startswith(("UV_", "PIP_"))}
    process = subprocess.run(
        [request["uv"], *arguments, "--no-config", "--cache-dir", f"{scratch}/cache"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if process.returncode:
        raise _failure(arguments[0], request["root"], process.stderr.strip())


def _failure(command: str, root: str, text: str) -> WorkerError:
    """The error for a failure of uv."""
    kind, words = explain(text[max(0, text.find("error:")) :] if command == "python" else text)
    words = words[:400]
    if kind == "disk":
        return WorkerError(
            "disk",
            f"no space left while installing to {root}",
            "remove old environments with `deploy env gc`, then repeat the command",
        )
    if command == "python":
        if kind == "digest":
            return WorkerError(
                "digest",
                f"the mirror has a different file than uv pins: {words}",
                "set python_mirror in deploy.toml to a different mirror",
            )
        return WorkerError("python", f"uv could not install Python: {words}", _BRING)
    if kind == "digest":
        return WorkerError(
            "digest",
            f"the index has a different file than the lock pins: {words}",
            "set index in deploy.toml to the index for which this lock was written",
        )
    if kind in ("absent", "unsolved"):
        return WorkerError(
            "install",
            f"the index lacks a package of the lock: {words}",
            "add the missing wheels of the lock to the index that `index` in deploy.toml names",
        )
    return WorkerError("install", f"uv {command}: {words}", "check that the index serves every file of the lock")


def matrix(request: Json) -> Json:
    """Import each module of an environment in a separate process, and run each command.

    `environment` (folder), `modules` ([{module, gpu}]), `commands` ([[program, argument…]]), `seconds` (timeout of each).
    """
    folder = Path(request["environment"])
    gpu = "gpus" in cuda()
    rows = [_row(folder, module, gpu, request["seconds"]) for module in request["modules"]]
    rows += [
        _try(" ".join(command), [str(folder / "bin" / command[0]), *command[1:]], folder, request["seconds"])
        for command in request["commands"]
    ]
    return {"rows": rows}


def _row(folder: Path, module: Json, gpu: bool, seconds: float) -> Json:
    if module["gpu"] and not gpu:
        return {"name": module["module"], "skipped": "no usable GPU on this node"}
    code = module["code"] or f"import {module['module']}"
    return _try(module["module"], [str(folder / "bin" / "python"), "-c", code], folder, seconds)


def _try(name: str, command: list[str], folder: Path, seconds: float) -> Json:
    started = time.monotonic()
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', '')}", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=environment, cwd=tempfile.gettempdir()
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"timed out after {seconds:.0f} s"}
    except OSError as error:
        return {"name": name, "error": f"{command[0]}: {os.strerror(error.errno or 0).lower()}"}
    if process.returncode:
        return {"name": name, "error": last_line(process.stderr, f"exit code {process.returncode}")}
    return {"name": name, "seconds": round(time.monotonic() - started, 2)}


def switch(request: Json) -> Json:
    """Activate ROOT/envs/ID atomically, as a new generation of `link` (env or download), unless it is active already."""
    root, link = Path(request["root"]), request["link"]
    if not (root / "envs" / request["id"] / DESCRIPTION).is_file():
        raise WorkerError(
            "node", f"there is no complete environment {request['id']}", "build the environment with `deploy env up`"
        )
    with SharedLock(root / "locks" / f"switch-{link}"):
        if active(root, link) == request["id"]:
            return {"switched": False, "active": request["id"]}
        return _switch(root, link, request["id"])


def _switch(root: Path, link: str, identifier: str) -> Json:
    generations = root / f"generations-{link}"
    generations.mkdir(parents=True, exist_ok=True)
    number = max((int(generation.name) for generation in generations.iterdir() if generation.name.isdigit()), default=0) + 1
    (generations / f"{number:06}").symlink_to(Path("..") / "envs" / identifier)
    _point(root / link, Path(generations.name) / f"{number:06}")
    return {"switched": True, "active": identifier, "generation": number}


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    temporary.symlink_to(target)
    temporary.rename(link)


def claim(request: Json) -> Json:
    """Make `owner` (a deployment's id) the owner of `root`, unless it has one. Return the owner."""
    root = Path(request["root"])
    root.mkdir(parents=True, exist_ok=True)
    mine = root / f".owner.{uuid.uuid4().hex[:8]}"
    mine.write_text(request["owner"])
    with suppress(FileExistsError):
        os.link(mine, root / OWNER)  # only one of several concurrent calls succeeds
    mine.unlink()
    return {"owner": owner(root)}


def owner(root: Path) -> str | None:
    """The id of the deployment that owns the environments in `root`, or None."""
    try:
        return (root / OWNER).read_text().strip()
    except OSError:
        return None


def active(root: Path, link: str) -> str | None:
    """The id of the active environment, or None."""
    path = root / link
    return Path(os.path.realpath(path)).name if path.is_symlink() else None


def roll_back(request: Json) -> Json:
    """Activate the latest earlier generation with another environment that still exists."""
    root, link = Path(request["root"]), request["link"]
    with SharedLock(root / "locks" / f"switch-{link}"):
        now = active(root, link)
        current = (root / link).readlink().name if (root / link).is_symlink() else "000000"
        for generation in sorted((root / f"generations-{link}").glob("[0-9]*"), reverse=True):
            target = Path(os.path.realpath(generation))
            if generation.name < current and target.name != now and (target / DESCRIPTION).is_file():
                _point(root / link, Path(f"generations-{link}") / generation.name)
                return {"from": now, "active": target.name, "generation": int(generation.name)}
    raise WorkerError("nothing", "there is no earlier environment to activate", "see the environments with `deploy env list`")


def listing(request: Json) -> Json:
    """The complete environments, newest first, with their links, and the partial ones."""
    root = Path(request["root"])
    rows: list[Json] = []
    for folder in (root / "envs").glob("*"):
        if not folder.name.startswith(".") and (folder / DESCRIPTION).is_file():
            described = _described(folder)
            links = [link for link in ("env", "download") if active(root, link) == folder.name]
            told = {key: described.get(key) for key in ("id", "engine", "set", "created", "build_s", "machine")}
            rows.append({**told, "active": links})
    rows.sort(key=lambda row: -float(row["created"] or 0))
    return {"environments": rows, "partial": sorted(folder.name for folder in (root / "envs").glob(".*"))}


def collect(request: Json) -> Json:  # noqa: C901 - one rule a line
    """Remove environments that are not in use.

    Kept are the active ones, the last `keep` generations, those in `used`, and those younger than `grace` seconds.
    """
    root = Path(request["root"])
    removed, freed, kept_by_use = [], 0, []
    kept: set[str] = set()
    for link in ("env", "download"):
        generations = sorted((root / f"generations-{link}").glob("[0-9]*"), reverse=True)
        names = list(dict.fromkeys(Path(os.path.realpath(generation)).name for generation in generations))
        kept |= {*names[: int(request["keep"])], active(root, link) or ""}
    for folder in sorted((root / "envs").glob("*")) if (root / "envs").is_dir() else []:
        identifier = folder.name.split(".")[1] if folder.name.startswith(".") else folder.name
        if not folder.name.startswith(".") and folder.name in kept:
            continue
        if time.time() - folder.stat().st_mtime < float(request["grace"]) and not folder.name.startswith("."):
            continue
        if folder.name in request["used"]:
            kept_by_use.append(folder.name)
            continue
        try:
            with SharedLock(root / "locks" / f"env-{identifier}", give_up=0):
                size = sum(path.lstat().st_size for path in folder.rglob("*"))
                gone = folder.with_name(f".{identifier}.gone-{uuid.uuid4().hex[:8]}")
                folder.rename(gone)
                remove_all(gone)
        except WorkerError as failure:
            if failure.kind != "busy":
                raise
            continue
        removed.append(folder.name)
        freed += size
    for link in ("env", "download"):
        for generation in (root / f"generations-{link}").glob("[0-9]*"):
            if not generation.exists():
                generation.unlink()
    return {"removed": removed, "freed": freed, "in_use": kept_by_use}


def users(request: Json) -> Json:
    """The ids of environments in `root` that a process of this node has mapped or in its command line."""
    pattern = re.compile(re.escape(os.path.realpath(Path(request["root"]) / "envs")).encode() + rb"/([0-9a-f]+)/")
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        for name in ("maps", "cmdline"):
            with suppress(OSError):
                used |= {identifier.decode() for identifier in pattern.findall((process / name).read_bytes())}
    return {"used": sorted(used)}


def _described(folder: Path) -> Json:
    value: Json = json.loads((folder / DESCRIPTION).read_text())
    return value
