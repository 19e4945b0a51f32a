"""The rehearsal itself: from ips.txt to streamed tokens, and nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from deploy.cli.rehearse import kept
from deploy.nodes import template
from deploy.nodes.config import Access
from deploy.nodes.deployment import load_deployment
from deploy.rehearsal import locks, source, walkthrough
from deploy.rehearsal.rig import Rig
from gracefarm import pins, settings
from gracefarm.console import Console
from gracefarm.errors import ExitCode
from gracefarm.files import remove_tree


def rehearse(*arguments: str) -> list[dict[str, Any]]:
    """The events of `deploy rehearse --json`; the result is the last."""
    argv = [sys.executable, "-m", "deploy", "rehearse", "--json", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(events: list[dict[str, Any]], count: int) -> None:
    result = events[-1]
    assert (result["nodes"], result["tokens"]) == (count, 32)
    assert result["text"].startswith("The rehearsal answers")
    steps = [step["step"] for step in result["steps"]]
    assert steps[:4] == ["init", "plan", "up", "serve"]
    assert steps[-1] == "down"
    output = "\n".join(event["text"] for event in events if event.get("event") == "output")
    tp, pp = walkthrough.layout(count)
    assert f"layout   tp{tp} pp{pp} on {count} nodes" in output
    assert f"imports tested on {count} nodes" in output
    assert f"{count} GPUs at 10.77.0.11:6379" in output


@pytest.mark.root
def test_two_nodes_from_ips_txt_to_tokens_through_the_tunnel() -> None:
    check(rehearse("--nodes", "2"), 2)


@pytest.mark.root
@pytest.mark.slow
def test_ten_nodes_as_the_tutorial_has_them() -> None:
    check(rehearse("--nodes", "10"), 10)


@pytest.mark.root
def test_killed_it_leaves_nothing_and_the_next_one_sweeps(tmp_path: Path) -> None:
    runs = settings.load().home / "rehearsal" / "runs"
    before = set(runs.glob("*")) if runs.exists() else set()
    owner = subprocess.Popen(
        [sys.executable, "-m", "deploy", "rehearse", "--nodes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert owner.stdout
    for line in owner.stdout:
        if "deploy plan" in line:
            break
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) > 6
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    _gone, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    assert set(runs.glob("*")) - before
    time.sleep(0.2)
    with walkthrough.run_folder(settings.load().home) as folder:
        assert set(runs.glob("*")) - before == {folder, folder.with_suffix(".lock")}


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_remainder_though_it_was_started_in_the_background(number: signal.Signals) -> None:
    runs = settings.load().home / "rehearsal" / "runs"
    before = set(runs.glob("*")) if runs.exists() else set()
    owner = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-m", "deploy", "rehearse", "--nodes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout
    for line in owner.stdout:
        if "deploy init" in line:  # the signal comes in the middle of a command
            break
    family = psutil.Process(owner.pid).children(recursive=True)
    owner.send_signal(number)
    assert owner.wait(240) == ExitCode.INTERRUPTED  # the folder of a run has many files, which takes long on a busy machine
    owner.stdout.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert set(runs.glob("*")) - before == set()


def test_the_shell_of_a_kept_rehearsal_has_the_hub(tmp_path: Path) -> None:
    room = cast("Rig", SimpleNamespace(command=lambda argv: ["nsenter", "-t", "7", *argv]))
    environ = {"HF_ENDPOINT": "http://10.77.0.1:8091"}
    lines = kept(walkthrough.Rehearsal(room=room, folder=tmp_path, console=Console(), index="", environ=environ))
    assert lines[1].endswith(": nsenter -t 7 env HF_ENDPOINT=http://10.77.0.1:8091 bash")
    assert str(tmp_path) in lines[0]
    assert "first run `deploy down`" in lines[2]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (8, (8, 1)), (10, (5, 2)), (16, (8, 2))]
)
def test_layouts_are_legal(count: int, expected: tuple[int, int]) -> None:
    assert walkthrough.layout(count) == expected


def test_two_may_rehearse_at_once(tmp_path: Path) -> None:
    home = settings.load().home
    found = source.prepare(home, Console())
    copies = home / "tests" / f"rehearsal-{tmp_path.name}-{os.getpid()}"  # hard links: on the same file system
    pages = []
    try:
        with ExitStack() as stack:
            for name in ("one", "two"):
                mine = source.private(home, found, copies / name)
                argv = [sys.executable, "-m", "index", "--root", str(mine.root), "--json", "serve", "--port", "0"]
                page = f"{stack.enter_context(source.listening(argv))}{mine.path()}aphrodite-engine/"
                (wheel,) = re.findall(r'href="([^"#]+\.whl)', httpx.get(page, headers={"Accept": "text/html"}).text)
                content = httpx.get(httpx.URL(page).join(wheel)).content
                pages.append(hashlib.sha256(content).hexdigest())
    finally:
        remove_tree(copies)
    assert pages[0] == pages[1]
    assert pages[0] in found.lock


def test_a_kept_index_that_this_version_cannot_read_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "rehearsal" / "index" / "catalogue"
    kept.mkdir(parents=True)
    (kept / "catalogue.db").write_bytes(b"SQLite format 3\0" + b"of another version" * 400)
    monkeypatch.setattr(locks, "committed", lambda _name: "")  # only the stand-in: nothing is fetched
    command = source.index_command

    def without_ray(root: Path, *arguments: str) -> object:
        """The stand-in requires Ray, which this set lacks."""
        if arguments[0] == "mirror":
            command(root, "stage", "create", arguments[-1], "--without", "ray")
        return command(root, *arguments)

    monkeypatch.setattr(source, "index_command", without_ray)
    found = source.prepare(tmp_path, Console())
    assert command(found.root, "stage", "list")[0]["state"] == "published"
    assert found.count == 1


def test_locks_hold_one_wheel_for_each_machine() -> None:
    for name in ("rehearsal", "rehearsal-download"):
        for machine in locks.MACHINES:
            text = locks.on(locks.committed(name), machine)
            lines = [line for line in text.splitlines() if "==" in line]
            assert len(lines) == len(set(lines)) == text.count("--hash=sha256:")
            assert "://" not in text
    same, other = (pins.render("a", "1", [digit * 64]) for digit in "01")
    assert locks.merged(same, same) == same
    assert locks.merged(same, other) == same + other


@pytest.mark.root
def test_an_ordinary_user_is_told_in_one_sentence_before_anything_is_fetched(tmp_path: Path) -> None:
    code = (  # imported as root, whose Python another user may not read
        "import os, sys, encodings.idna, deploy.cli.rehearse; from deploy.cli import main\n"
        "os.setuid(65534); sys.argv[1:] = ['rehearse', '--json']; main()"
    )
    env = {**os.environ, "GRACEFARM_HOME": str(tmp_path / "home"), "GRACEFARM_SETTINGS": "/no-such-file", "HOME": "/"}
    tmp_path.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == ExitCode.HOST
    (said,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert said["text"] == "the rehearsal creates network namespaces, which requires root"
    assert not (tmp_path / "home").exists()


def test_each_comment_of_the_edited_deploy_toml_is_on_the_line_of_its_key(tmp_path: Path) -> None:
    room = cast("Rig", SimpleNamespace(nodes=[None, None]))
    rehearsal = walkthrough.Rehearsal(room=room, folder=tmp_path, console=Console(), index="http://10.77.0.1:8090/s/simple/")
    path = tmp_path / "deploy.toml"
    (tmp_path / "ips.txt").write_text("10.77.0.11\n10.77.0.12\n")
    template.write_config(tmp_path / "ips.txt", path, access=Access(), repo=walkthrough.REPO)
    template.propose_set(load_deployment(path), {os.uname().machine})  # as `deploy init` does when it knows the nodes
    walkthrough.configure(rehearsal)
    assert load_deployment(path).data.index == rehearsal.index
    commented = [line.split()[0] for line in path.read_text().splitlines() if " # " in line]
    assert commented == ["name", "index", "#", "revision"]  # the third is the line of `share`
