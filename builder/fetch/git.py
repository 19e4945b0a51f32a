"""Git repositories by commit and tree: one bare, shallow repository for each commit, complete or absent.

    HOME/git/<commit>.git       the commit, its tree and blobs; without history if the server allows that
    HOME/git/<commit>.lock      held while one process fetches it
    HOME/git/config             the only configuration that git reads here

git runs without hooks, templates, filters (such as git-lfs), prompts, and configuration of the system or the user, and only
with the protocols below. So nothing of a repository is executed.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from builder.fetch.transfer import ATTEMPTS, mirror_remedy, pause
from builder.fetch.urls import shown, split_credentials
from builder.planning.settings import Settings
from builder.planning.sources import GitSource, Repository, Submodule
from gracefarm.console import Say, Tick, no_tick, silent
from gracefarm.errors import DigestError, DiskFullError, FetchError, HostError
from gracefarm.files import atomic_directory, atomic_write, full_disk, lock
from gracefarm.process import die_with_us, last_line

CONFIG = (files("builder") / "data" / "git-config").read_text()
KEPT = ("GIT_SSL_", "GIT_PROXY_SSL_", "GIT_SSH", "GIT_HTTP_PROXY_")
"Variables that say how git reaches a server. Others would change what git does, such as GIT_DIR inside a hook."
TRANSIENT = (
    "could not resolve host",
    "timed out",
    "connection refused",
    "connection reset",
    "couldn't connect",
    "failed to connect",
    "early eof",
    "rpc failed",
    "remote end hung up",
    "operation too slow",
    "returned error: 429",
    "returned error: 5",
)
ABSENT = ("not our ref",)
INCOMPLETE = "repository corruption on the remote side"
MISSING_OBJECT = re.compile(
    r"(?:fatal|error): (?:unable to read|could not (?:read|fetch)|bad (?:\w+ )?object|missing \w+ object) '?([0-9a-f]{40})"
    r"|cannot obtain needed \w+ ([0-9a-f]{40})",
    re.IGNORECASE,
)
"Messages of git about a missing object, from a server and from a repository that is read as plain files."
REFUSED_ADDRESS = ("not found", "does not appear to be a git repository", "could not read username", "authentication failed")


Pinned = GitSource | Submodule | Repository
"One repository at one commit, as pinned in a recipe."
Git = Callable[..., str]
"Runs git with arguments, returns its output."


class GitError(Exception):
    """git failed. The message is the error message of git."""


def repository_path(settings: Settings, commit: str) -> Path:
    """Path of the bare repository of that commit; it exists only when complete and verified."""
    return settings.home / "git" / f"{commit}.git"


def fetch_git(source: GitSource, settings: Settings, tick: Tick = no_tick, say: Say = silent) -> Path:
    """Fetch the repository at the pinned commit and those of its submodules, if they are not in the store.

    `say` gets a line for each verified repository.

    Raises:
        FetchError: the commit does not exist, the repository is absent or unreachable.
        DigestError: the commit has another tree, or a submodule's commit is not the one that the parent's tree names.
        HostError: git is not installed.
        DiskFullError: no space left.
    """
    pins: dict[str, Pinned] = {source.url: source}
    pins |= {f"submodule {path}": module for path, module in sorted(source.submodules.items())}
    for number, (what, pin) in enumerate(pins.items()):
        tick(number, len(pins), shown(what))
        fetch_commit(pin, what, settings)
        say(commit_line(what, pin))
    tick(len(pins), len(pins), "")
    check_submodules(source, settings)
    if source.submodules:
        for path in sorted(source.submodules):
            say(f"submodule {path}: the tree of its parent repository has the same commit")
    return repository_path(settings, source.commit)


def commit_line(what: str, pin: Pinned) -> str:
    """One line of output about a commit that was checked against its pin."""
    return f"{shown(what)}: commit {pin.commit}" + (f", tree {pin.tree}, as pinned" if pin.tree else ", as pinned")


def check_submodules(source: GitSource, settings: Settings) -> None:
    """Check that each pinned submodule is a gitlink with exactly that commit in its parent's tree.

    Raises:
        DigestError: the parent's tree has another commit, or no submodule at that path.
    """
    for path, module in sorted(source.submodules.items()):
        parent, inner = enclosing(path, source.submodules)
        outer = source.submodules[parent] if parent else source
        commit = outer.commit
        listed = run_git(
            ["ls-tree", "-z", commit, "--", inner], cwd=repository_path(settings, commit), config=git_config(settings.home)
        )
        mode, _, entry = listed.split("\t")[0].partition(" ")
        if mode != "160000":
            raise DigestError(
                f"{shown(outer.url)}: commit {commit} has no submodule at {inner!r}",
                remedy="correct the path in [source.submodules]; in a clone of this repository,"
                " `git ls-tree -r COMMIT | grep ^160000` lists the paths of its submodules",
            )
        if entry != f"commit {module.commit}":
            raise DigestError(
                f"{shown(source.url)}: the parent commit contains {entry} as the submodule {path!r}, but {module.commit} "
                "is pinned",
                remedy=f"pin {entry} for this submodule in [source.submodules]",
            )


def enclosing(path: str, submodules: Mapping[str, object]) -> tuple[str, str]:
    """The submodule that contains the submodule at `path` ('' for the main repository), and the path inside it."""
    parent = max((other for other in submodules if path.startswith(f"{other}/")), key=len, default="")
    return parent, path[len(parent) + 1 :] if parent else path


def run_git(
    arguments: Sequence[str], *, cwd: Path, config: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Run git with the configuration file `config` (None: without configuration) and return its output.

    Raises:
        HostError: git is not installed.
        GitError: git failed.
        DiskFullError: no space left.
    """
    if shutil.which("git") is None:
        raise HostError("git is not installed", remedy="install git with `builder doctor --fix`, as root or with sudo")
    process = subprocess.run(
        die_with_us(["git", *arguments]),
        cwd=cwd,
        env=_environment(config) | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if process.returncode == 0:
        return process.stdout.decode(errors="surrogateescape")
    message = process.stderr.decode(errors="replace")
    if "No space left on device" in message or "Disk quota exceeded" in message:
        raise DiskFullError(
            f"no space left on the file system that holds {cwd}",
            remedy="free space there, or set GRACEFARM_HOME to a folder on a larger disk",
        )
    raise GitError(message)


def git_config(home: Path) -> Path:
    """Path of our git configuration, written if it is missing or differs."""
    config = home / "git" / "config"
    if not config.exists() or config.read_text() != CONFIG:
        atomic_write(config, CONFIG)
    return config


def _environment(config: Path | None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key.startswith(KEPT)}
    kept.pop("SSH_ASKPASS", None)
    return {
        "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15",
        **kept,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": str(config or os.devnull),
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "https:http:ssh:file",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "LC_ALL": "C",
    }


def fetch_commit(pin: Pinned, what: str, settings: Settings) -> None:
    """Fetch one repository at one commit, if it is not in the store. `what` is its name in messages.

    Raises:
        FetchError, DigestError, HostError, DiskFullError: as in `fetch_git`.
    """
    place = repository_path(settings, pin.commit)
    if not place.exists():
        url = _checked_url(pin, settings)
        with full_disk(settings.home), lock(place.with_suffix(".lock")):
            if not place.exists():
                with atomic_directory(place) as partial:
                    _bring(pin, what, url, partial, settings)
    tree = run_git(["rev-parse", f"{pin.commit}^{{tree}}"], cwd=place, config=git_config(settings.home)).strip()
    if pin.tree is not None and tree != pin.tree:
        raise DigestError(
            f"{shown(what)}: commit {pin.commit} has the git tree id {tree}, but the tree id {pin.tree} is pinned",
            remedy="find out which of the two is right, then pin the commit and its tree id",
        )


def _checked_url(pin: Pinned, settings: Settings) -> str:
    """The URL to fetch from. Plain http is accepted only from the user's mirror setting."""
    url = settings.redirect(pin.url)
    allowed = ("https", "ssh", "file") if url == pin.url else ("https", "ssh", "file", "http")
    scheme = urlsplit(url).scheme
    if scheme not in allowed or "::" in url.partition("://")[0]:
        raise FetchError(
            f"{shown(url)} is not a supported git URL",
            remedy="write the URL as https://, ssh:// or file:// (http:// is allowed only for a mirror in GRACEFARM_MIRRORS)",
        )
    return url


def _bring(pin: Pinned, what: str, url: str, repository: Path, settings: Settings) -> None:
    """Fetch the commit into a new bare repository: only that commit if the server allows it, else all branches and tags."""
    bare, credentials = split_credentials(url)
    environment, config = _authorization(bare, credentials), git_config(settings.home)

    def git(*arguments: str) -> str:
        return run_git(arguments, cwd=repository, config=config, environment={"GIT_DIR": ".", **environment})

    git("init", "--quiet", "--bare")
    message = ""
    for attempt in range(ATTEMPTS):
        pause(attempt)
        try:
            _ask(git, pin.commit, bare)
        except GitError as error:
            message = str(error)
            if _incomplete(message) or not any(word in message.lower() for word in TRANSIENT):
                break
        else:
            _require_commit(pin, what, git("cat-file", "-t", pin.commit).strip())
            git("update-ref", "refs/heads/pinned", pin.commit)
            git("symbolic-ref", "HEAD", "refs/heads/pinned")
            return
    raise _failure(pin, bare, message)


def _require_commit(pin: Pinned, what: str, kind: str) -> None:
    """Refuse other objects: an annotated tag also has an id, which is easily pinned by mistake."""
    if kind != "commit":
        raise FetchError(
            f"{shown(what)}: {pin.commit} is a {kind}, not a commit",
            remedy=f"pin the id that `git rev-parse {pin.commit}^{{commit}}` prints in a clone of the repository"
            if kind == "tag"
            else "pin the id of a commit",
        )


def _ask(git: Git, commit: str, url: str) -> None:
    try:
        git("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--depth", "1", "--", url, commit)
    except GitError as error:
        message = str(error).lower()
        if _incomplete(message) or any(word in message for word in (*ABSENT, *REFUSED_ADDRESS, *TRANSIENT)):
            raise
        # The server does not serve single commits (protocol v0 without uploadpack.allowReachableSHA1InWant, or dumb http).
        everything = ("+refs/heads/*:refs/all/heads/*", "+refs/tags/*:refs/all/tags/*")
        git("fetch", "--quiet", "--no-write-fetch-head", "--", url, *everything)
        try:
            git("cat-file", "-e", commit)
        except GitError:
            raise GitError(f"not our ref {commit}") from error


def _authorization(url: str, credentials: tuple[str, str] | None) -> dict[str, str]:
    """Credentials as a header for only that host, in the environment: every user can read the arguments of a process."""
    if credentials is None:
        return {}
    parts = urlsplit(url)
    token = base64.b64encode(":".join(credentials).encode()).decode()
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"http.{parts.scheme}://{parts.netloc}/.extraHeader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Basic {token}",
    }


def _incomplete(message: str) -> bool:
    """Whether objects are missing in the repository, so that another attempt is useless."""
    return INCOMPLETE in message or MISSING_OBJECT.search(message) is not None


def _failure(pin: Pinned, url: str, message: str) -> FetchError:
    low = message.lower()
    if _incomplete(message):
        named = MISSING_OBJECT.search(message)
        lacks = f"object {named[1] or named[2]} is missing" if named else "an object is missing"
        kind = "repository" if url == split_credentials(pin.url)[0] else "mirror"
        return FetchError(
            f"commit {pin.commit} cannot be fetched: {lacks} in the {kind} {shown(url)}",
            remedy=f"complete that {kind} (`git fsck` in it lists what is missing), or set GRACEFARM_MIRRORS to a "
            "different mirror",
        )
    if any(word in low for word in ABSENT):
        return FetchError(
            f"{shown(url)} has no commit {pin.commit}", remedy="pin a commit that is on a branch or a tag of this repository"
        )
    fatal = (line for line in message.splitlines() if line.startswith("fatal:"))
    reason = shown(next(fatal, last_line(message)))
    if any(word in low for word in REFUSED_ADDRESS):
        return FetchError(
            f"{shown(url)} does not exist or refuses access: {reason}",
            remedy="correct the URL; or give credentials in ~/.netrc or an ssh key; or set GRACEFARM_MIRRORS to a mirror",
        )
    return FetchError(f"{shown(url)} cannot be fetched: {reason}", remedy=mirror_remedy(pin.url))
