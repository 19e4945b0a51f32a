"""git by commit and tree, over file:// and git's own http server; and the tree that a build gets from it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.fetch import fetch, fetch_git, source
from builder.fetch.git import repository_path
from builder.planning.recipe import Recipe
from builder.planning.settings import Settings
from builder.planning.sources import GitSource
from gracefarm import tables
from gracefarm.errors import ConfigError, DigestError, FetchError, HostError
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Repository, Server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project=tmp_path)


@pytest.fixture
def upstream(tmp_path: Path) -> Repository:
    """Three commits, so that the second is neither a tip nor a root."""
    repository = Repository(tmp_path / "served" / "upstream")
    for number in range(3):
        repository.commit({"setup.py": f"number = {number}\n", "pkg/__init__.py": ""})
    return repository


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with fetch_kit.running() as running:
        running.repositories = tmp_path / "served"
        yield running


def mirrored(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"mirrors": {"https://far.invalid/": url}})


def git(folder: Path, *arguments: str) -> str:
    """git as a build script runs it, without configuration."""
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, check=True, text=True, capture_output=True
    ).stdout.rstrip("\n")


def exported(pinned: GitSource, settings: Settings, into: Path) -> Path:
    recipe = fetch_kit.recipe(pinned)
    fetched = fetch(recipe.data, settings)
    return source.unpack(recipe, fetched, into, source.source_date_epoch(recipe.data, fetched))


def test_commit_in_the_middle_of_history_then_without_network(
    upstream: Repository, settings: Settings, tmp_path: Path
) -> None:
    middle = upstream.git("rev-parse", "HEAD~1")
    pinned = upstream.source(middle)
    assert fetch_git(pinned, settings) == repository_path(settings, middle)
    shutil.rmtree(upstream.folder)
    tree = exported(pinned, settings, tmp_path / "tree")
    assert (tree / "setup.py").read_text() == "number = 1\n"


def test_tree_knows_its_commit_and_has_one_time(upstream: Repository, settings: Settings, tmp_path: Path) -> None:
    commit = upstream.git("rev-parse", "HEAD")
    tree = exported(upstream.source(commit), settings, tmp_path / "tree")
    assert git(tree, "rev-parse", "--short=8", "HEAD") == commit[:8]
    assert commit.startswith(git(tree, "describe", "--always", "--dirty", "--abbrev=8"))
    assert git(tree, "status", "--porcelain") == ""
    assert {path.stat().st_mtime for path in (tree, tree / "pkg", tree / "setup.py")} == {1_700_000_000}
    assert not list((tree / ".git" / "hooks").glob("*"))


def test_commit_that_does_not_exist(upstream: Repository, settings: Settings) -> None:
    pinned = upstream.source(upstream.git("rev-parse", "HEAD")).model_copy(update={"commit": "a" * 40})
    with pytest.raises(FetchError, match=f"has no commit {'a' * 40}"):
        fetch_git(pinned, settings)
    assert not repository_path(settings, "a" * 40).exists()


def test_wrong_tree(upstream: Repository, settings: Settings) -> None:
    pinned = upstream.source(upstream.git("rev-parse", "HEAD"), tree="b" * 40)
    for _ in range(2):  # the second time from the store
        with pytest.raises(
            DigestError, match=f"has the git tree id {upstream.tree('HEAD')}, but the tree id {'b' * 40} is pinned"
        ):
            fetch_git(pinned, settings)


def test_tag_object_pinned_as_a_commit(upstream: Repository, settings: Settings) -> None:
    upstream.git("tag", "--annotate", "--message", "one", "v1")
    tag = upstream.git("rev-parse", "v1")
    pinned = upstream.source(upstream.git("rev-parse", "HEAD")).model_copy(update={"commit": tag})
    with pytest.raises(FetchError, match="is a tag, not a commit"):
        fetch_git(pinned, settings)


@pytest.mark.parametrize("name", ["main", "v0.6.4.post1", "HEAD", "8b8d2ce"])
def test_branch_or_tag_where_a_commit_belongs(tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\nversion = "1"\nlicense = "MIT"\n[smoke]\nimports = ["x"]\n'
        f'[source]\nkind = "git"\nurl = "https://far.invalid/x"\ncommit = "{name}"\ntree = "{"a" * 40}"\n'
    )
    with pytest.raises(ConfigError, match=r"recipe\.toml:9: key 'source\.commit'"):
        tables.read(recipe, Recipe)


@pytest.fixture
def spied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The arguments of every git that the builder starts, a line each."""
    real = shutil.which("git")
    spy = tmp_path / "bin" / "git"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\nexec {real} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    return tmp_path / "arguments"


@pytest.mark.parametrize("way", ["folder", "http", "plain files"])
@pytest.mark.parametrize("lacking", ["HEAD:pkg/__init__.py", "HEAD:pkg", "HEAD^{tree}"])
def test_incomplete_mirror_is_named_with_the_object_and_asked_once(
    upstream: Repository, settings: Settings, server: Server, way: str, lacking: str, spied: Path
) -> None:
    commit, missing = upstream.git("rev-parse", "HEAD"), upstream.git("rev-parse", lacking)
    source = upstream.source(commit, url="https://far.invalid/upstream/.git")
    upstream.git("update-server-info")
    (upstream.folder / ".git/objects" / missing[:2] / missing[2:]).unlink()
    for path in (upstream.folder / ".git").rglob("*"):
        if path.is_file():
            server.served[f"/plain/upstream/{path.relative_to(upstream.folder)}"] = fetch_kit.Served(path.read_bytes())
    url = {"folder": f"file://{upstream.folder.parent}/", "http": f"{server.url}/git/", "plain files": f"{server.url}/plain/"}
    with pytest.raises(FetchError) as caught:
        fetch_git(source, mirrored(settings, url[way]))
    assert f"commit {commit} cannot be fetched: object {missing} is missing in the mirror {url[way]}" in caught.value.cause
    fetches = [line for line in spied.read_text().splitlines() if line.startswith("fetch ")]
    assert len(fetches) == (2 if way == "plain files" else 1), "plain files: one for only the commit, one for all branches"
    assert not repository_path(settings, commit).exists()


def test_mirror_that_leaves_large_files_out_is_named_as_incomplete(
    upstream: Repository, settings: Settings, tmp_path: Path
) -> None:
    """A partial clone, whose own origin is gone."""
    commit = upstream.commit({"large.png": "x" * 5000})
    upstream.git("config", "uploadpack.allowFilter", "true")
    mirror = tmp_path / "partial"
    subprocess.run(["git", "clone", "--quiet", "--bare", "--filter=blob:limit=4k", upstream.url, mirror], check=True)
    pinned = upstream.source(commit)
    missing = upstream.git("rev-parse", "HEAD:large.png")
    shutil.rmtree(upstream.folder)
    with pytest.raises(FetchError, match=f"object {missing} is missing in the repository file://") as caught:
        fetch_git(pinned.model_copy(update={"url": f"file://{mirror}"}), settings)
    assert "git fsck" in caught.value.remedy


def test_absent_repository(settings: Settings, tmp_path: Path) -> None:
    pinned = GitSource(kind="git", url=f"file://{tmp_path}/none", commit="a" * 40, tree="b" * 40)
    with pytest.raises(FetchError, match="does not exist or refuses access"):
        fetch_git(pinned, settings)


def test_unreachable_server(settings: Settings) -> None:
    with fetch_kit.Server() as closed:
        url = closed.url.replace("http:", "https:").replace("//", "//user:s3cret@")
    pinned = GitSource(kind="git", url=f"{url}/x", commit="a" * 40, tree="b" * 40)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1.*cannot be fetched") as caught:
        fetch_git(pinned, settings)
    assert "GRACEFARM_MIRRORS" in caught.value.remedy
    assert "s3cret" not in caught.value.cause


@pytest.mark.parametrize(
    "url", ["ext::touch%20mark", "http://far.invalid/x", "git://far.invalid/x", "/folder", "--upload-pack=x"]
)
def test_address_outside_the_allow_list(settings: Settings, url: str) -> None:
    pinned = GitSource(kind="git", url=url, commit="a" * 40, tree="b" * 40)
    with pytest.raises(FetchError, match="not a supported git URL"):
        fetch_git(pinned, settings)


@pytest.mark.parametrize("single", [True, False], ids=["gives single commits", "refuses them"])
def test_http_server(upstream: Repository, settings: Settings, server: Server, tmp_path: Path, single: bool) -> None:
    """Without protocol v2 git's server refuses a commit that is not a tip; then all branches are fetched."""
    server.git_protocol = single
    middle = upstream.git("rev-parse", "HEAD~1")
    pinned = upstream.source(middle, url="https://far.invalid/upstream/.git")
    tree = exported(pinned, mirrored(settings, f"{server.url}/git/"), tmp_path / "tree")
    assert (tree / "setup.py").read_text() == "number = 1\n"
    assert git(tree, "rev-list", "--count", "HEAD") == "1"
    wants = git(repository_path(settings, middle), "rev-list", "--all", "--count")
    assert wants == ("1" if single else "3")


def test_http_server_that_refuses_and_has_no_such_commit(upstream: Repository, settings: Settings, server: Server) -> None:
    server.git_protocol = False
    pinned = upstream.source(upstream.git("rev-parse", "HEAD"), url="https://far.invalid/upstream/.git")
    pinned = pinned.model_copy(update={"commit": "a" * 40})
    with pytest.raises(FetchError, match=f"has no commit {'a' * 40}"):
        fetch_git(pinned, mirrored(settings, f"{server.url}/git/"))


def test_plain_files_of_a_repository_on_a_web_server(
    upstream: Repository, settings: Settings, server: Server, tmp_path: Path
) -> None:
    """git's dumb protocol, which knows no shallow fetch."""
    upstream.git("update-server-info")
    for path in (upstream.folder / ".git").rglob("*"):
        if path.is_file():
            server.served[f"/plain/{path.relative_to(upstream.folder / '.git')}"] = fetch_kit.Served(path.read_bytes())
    middle = upstream.git("rev-parse", "HEAD~1")
    pinned = upstream.source(middle, url="https://far.invalid/plain")
    tree = exported(pinned, mirrored(settings, f"{server.url}/"), tmp_path / "tree")
    assert (tree / "setup.py").read_text() == "number = 1\n"


def test_credentials_reach_the_server_and_no_argument_list(
    upstream: Repository, settings: Settings, server: Server, spied: Path
) -> None:
    server.git_password = "s3cret"
    url = server.url.replace("//", "//user:s3cret@") + "/git/"
    pinned = upstream.source(upstream.git("rev-parse", "HEAD"), url="https://far.invalid/upstream/.git")
    fetch_git(pinned, mirrored(settings, url))
    arguments = spied.read_text()
    assert "fetch" in arguments
    assert "s3cret" not in arguments
    stored = [path for path in settings.home.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert stored == []
    with pytest.raises(FetchError, match="refuses access") as caught:
        fetch_git(pinned.model_copy(update={"commit": "a" * 40}), mirrored(settings, url.replace("s3cret", "wr0ng")))
    assert "wr0ng" not in caught.value.cause + caught.value.remedy


def test_nothing_is_executed(
    upstream: Repository, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's filters, templates and hooks would all leave the mark."""
    mark = tmp_path / "mark"
    commit = upstream.commit({".gitattributes": "*.py filter=lfs\n"})
    hooks = tmp_path / "templates" / "hooks"
    hooks.mkdir(parents=True)
    for name in ("post-checkout", "reference-transaction"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
        (hooks / name).chmod(0o755)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / ".gitconfig").write_text(
        f'[init]\ntemplateDir = {hooks.parent}\n[core]\nhooksPath = {hooks}\n[filter "lfs"]\nsmudge = "touch {mark}; cat"\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    subprocess.run(["git", "clone", "--quiet", upstream.url, tmp_path / "clone"], check=True)
    assert mark.exists(), "the mark is a real one"
    mark.unlink()
    exported(upstream.source(commit), settings, tmp_path / "tree")
    assert not mark.exists()


def test_a_hook_around_us_does_not_lead_git_astray(
    upstream: Repository, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(upstream.folder / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    tree = exported(upstream.source(upstream.git("rev-parse", "HEAD")), settings, tmp_path / "tree")
    assert (tree / "setup.py").exists()
    assert not (tmp_path / "index").exists()


def test_mirror_that_belongs_to_somebody_else(upstream: Repository, settings: Settings) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    for path in (upstream.folder, *upstream.folder.rglob("*")):
        os.chown(path, 12345, 12345, follow_symlinks=False)
    commit = (upstream.folder / ".git" / "refs" / "heads" / "main").read_text().strip()
    tree = subprocess.run(
        ["git", "-c", "safe.directory=*", "rev-parse", "HEAD^{tree}"],
        cwd=upstream.folder,
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    fetch_git(GitSource(kind="git", url=upstream.url, commit=commit, tree=tree), settings)


def test_missing_git(upstream: Repository, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = upstream.source(upstream.git("rev-parse", "HEAD"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="git is not installed") as caught:
        fetch_git(pinned, settings)
    assert "doctor" in caught.value.remedy


def test_killed_fetch_leaves_nothing_that_counts(upstream: Repository, settings: Settings) -> None:
    commit = upstream.git("rev-parse", "HEAD")
    partial = repository_path(settings, commit).with_name(f".{commit}.git.partial")
    (partial / "objects").mkdir(parents=True)
    (partial / "shallow.lock").touch()
    assert fetch_git(upstream.source(commit), settings).exists()
    assert not partial.exists()


def fetching_in(folder: Path) -> set[int]:
    """Processes `git fetch` that work there."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if arguments[:2] == [b"git", b"fetch"] and (process / "cwd").readlink().is_relative_to(folder):
                found.add(int(process.name))
    return found


def test_killed_while_fetching_takes_git_along_and_the_next_run_succeeds(
    upstream: Repository, settings: Settings, server: Server
) -> None:
    """git's helper still waits for the server then; the next run does not mind."""
    held = server.git_gate = threading.Event()
    pinned = upstream.source(upstream.git("rev-parse", "HEAD"), url="https://far.invalid/upstream/.git")
    near = mirrored(settings, f"{server.url}/git/")
    code = (
        "import sys; from builder.fetch import fetch_git; from builder.planning.sources import GitSource\n"
        "from builder.planning.settings import Settings\n"
        "fetch_git(GitSource.model_validate_json(sys.argv[1]), Settings.model_validate_json(sys.argv[2]))"
    )
    try:
        with subprocess.Popen([sys.executable, "-c", code, pinned.model_dump_json(), near.model_dump_json()]) as process:
            assert server.git_asked.wait(60)
            assert fetching_in(settings.home)
            process.kill()
        for _ in range(50):
            if not fetching_in(settings.home):
                break
            time.sleep(0.1)
        assert not fetching_in(settings.home)
        server.git_gate = None
        assert fetch_git(pinned, near).exists()
    finally:
        held.set()


@pytest.fixture
def nested(tmp_path: Path, upstream: Repository) -> Repository:
    """A repository with a submodule that has one itself."""
    middle = Repository(tmp_path / "served" / "middle")
    middle.git("submodule", "--quiet", "add", upstream.url, "deps/inner")
    middle.commit({"middle.txt": "m"})
    outer = Repository(tmp_path / "served" / "outer")
    outer.git("submodule", "--quiet", "add", middle.url, "third party/middle")
    outer.git("submodule", "--quiet", "add", upstream.url, "unused")
    outer.commit({"outer.txt": "o"})
    return outer


def with_submodules(nested: Repository, tmp_path: Path, **changes: object) -> GitSource:
    middle, inner = (Repository.__new__(Repository) for _ in range(2))
    middle.folder, inner.folder = tmp_path / "served" / "middle", tmp_path / "served" / "upstream"

    def module(repository: Repository) -> dict[str, str]:
        head = repository.git("rev-parse", "HEAD")
        return {"url": repository.url, "commit": head, "tree": repository.tree(head)}

    modules = {"third party/middle": module(middle), "third party/middle/deps/inner": module(inner)}
    return nested.source(nested.git("rev-parse", "HEAD"), submodules=modules | changes)


def test_submodules_are_there_and_git_agrees(nested: Repository, settings: Settings, tmp_path: Path) -> None:
    pinned = with_submodules(nested, tmp_path)
    tree = exported(pinned, settings, tmp_path / "tree")
    shutil.rmtree(tmp_path / "served")
    assert (tree / "third party/middle/middle.txt").exists()
    assert (tree / "third party/middle/deps/inner/setup.py").read_text() == "number = 2\n"
    assert list((tree / "unused").iterdir()) == []
    assert git(tree, "status", "--porcelain") == ""
    for path, module in pinned.submodules.items():
        assert git(tree / path, "rev-parse", "HEAD") == module.commit
    # What a setup.py does before it compiles: it must find nothing left to fetch.
    git(tree, "submodule", "update", "--init", "third party/middle")
    assert {path.stat().st_mtime for path in tree.rglob("*") if ".git" not in path.parts} == {1_700_000_000}


def test_submodule_at_another_commit_than_the_parent_says(
    nested: Repository, upstream: Repository, settings: Settings, tmp_path: Path
) -> None:
    old = upstream.git("rev-parse", "HEAD~1")
    other = {"url": upstream.url, "commit": old, "tree": upstream.tree(old)}
    pinned = with_submodules(nested, tmp_path, **{"third party/middle/deps/inner": other})
    with pytest.raises(DigestError, match=f"contains commit {upstream.git('rev-parse', 'HEAD')} as the submodule"):
        fetch_git(pinned, settings)


def test_submodule_where_the_parent_has_none(
    nested: Repository, upstream: Repository, settings: Settings, tmp_path: Path
) -> None:
    head = upstream.git("rev-parse", "HEAD")
    other = {"url": upstream.url, "commit": head, "tree": upstream.tree(head)}
    with pytest.raises(DigestError, match=r"no submodule at 'outer\.txt'"):
        fetch_git(with_submodules(nested, tmp_path, **{"outer.txt": other}), settings)


def test_submodule_with_a_wrong_tree(nested: Repository, upstream: Repository, settings: Settings, tmp_path: Path) -> None:
    other = {"url": upstream.url, "commit": upstream.git("rev-parse", "HEAD"), "tree": "c" * 40}
    with pytest.raises(DigestError, match=r"submodule third party/middle/deps/inner: .* but the tree id ccc"):
        fetch_git(with_submodules(nested, tmp_path, **{"third party/middle/deps/inner": other}), settings)
