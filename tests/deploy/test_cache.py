"""The NFS cache: what a node says decides, fstab is edited as data with a backup, and nothing is claimed that was not seen."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deploy.remote.cache
from deploy.fleet.calls import Exit, RemoteNode
from deploy.nodes import state
from deploy.remote import mounts
from deploy.remote.cache import inspect, install, measure, undo, write_fstab
from deploy.remote.wire import WorkerError
from deploy.steps import cache, step
from deploy.steps.cache import CacheStep
from gracefarm.console import Console
from gracefarm.errors import SshError
from tests.deploy.test_order import with_work

Json = dict[str, Any]
FSTAB = """\
# /etc/fstab: static file system information.
LABEL=cloudimg-rootfs\t/\t ext4\tdiscard,errors=remount-ro\t0 1

10.1.1.1:/vol-1  /home/ubuntu/share  nfs  rw,nconnect=16,_netdev  0  0
10.1.1.1:/vol-2  /home/ubuntu/other  nfs  rw  0  0
"""
NFS: Json = {
    "target": "/home/ubuntu/share",
    "kind": "nfs4",
    "source": "10.1.1.1:/vol-1",
    "options": ["rw"],
    "fstab": FSTAB,
    "fsc": False,
    "cachefilesd": None,
    "running": False,
    "fscache": True,
    "root": True,
}


class Pretend:
    """Replaces a node with NFS, which this machine's kernel lacks; answers as deploy.remote.cache does."""

    def __init__(self, found: Json, *, fsc_after: bool = True, busy: str | None = None) -> None:
        self.found, self.fsc_after, self.busy = found, fsc_after, busy
        self.calls: list[str] = []
        self.written: Json = {}

    async def stream(self, _command: str, *, stdin: bytes, on_line: Any) -> Exit:
        import json

        request = json.loads(stdin[stdin.rindex(b'{"call"') :])
        name = request["call"].split(".")[1]
        self.calls.append(name)
        on_line(json.dumps({"result": getattr(self, name)(request["arguments"])}))
        return Exit(code=0, stderr="")

    def inspect(self, _request: Json) -> Json:
        return self.found

    def install(self, _request: Json) -> Json:
        return {"changed": True}

    def write_fstab(self, request: Json) -> Json:
        self.written = request
        return {"backup": "/etc/fstab.gracefarm-0123"}

    def remount(self, _request: Json) -> Json:
        return {"fsc": self.fsc_after, "busy": self.busy}

    def measure(self, _request: Json) -> Json:
        return {"path": "/x", "bytes": 1, "cold": 100e6, "warm": 2000e6}


def up(*nodes: Pretend) -> list[cache.Row]:
    targets = [RemoteNode(name=f"k{n}", address="", gpus=1, shell=shell) for n, shell in enumerate(nodes)]
    return asyncio.run(cache.switch_on(targets, "/home/ubuntu/share", Console()))


def test_a_node_with_nfs_gets_it_with_a_diff_and_a_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    node = Pretend(NFS)
    (row,) = up(node)
    assert node.calls == ["inspect", "install", "write_fstab", "remount", "measure"]
    assert row.outcome == "done"
    assert row.text == "10.1.1.1:/vol-1 is cached now; 100 MB/s cold, 2000 MB/s from the cache on disk"
    assert [line for line in capsys.readouterr().err.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")] == [
        "-10.1.1.1:/vol-1  /home/ubuntu/share  nfs  rw,nconnect=16,_netdev  0  0",
        "+10.1.1.1:/vol-1  /home/ubuntu/share  nfs  rw,nconnect=16,_netdev,fsc  0  0",
    ]
    assert node.written["text"] == FSTAB.replace("_netdev  0", "_netdev,fsc  0")


def test_where_it_is_on_nothing_is_done() -> None:
    node = Pretend({**NFS, "fsc": True})
    assert up(node)[0].outcome == "on"
    assert node.calls == ["inspect"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "virtiofs", "fsc": None}, "virtiofs: the host has its own cache"),
        ({"kind": "ext4", "fsc": None}, "ext4: `fsc` is an option of NFS only"),
        ({"root": False}, "sudo asks for a password"),
        ({"fstab": "# nothing\n"}, "is not in /etc/fstab"),
    ],
)
def test_where_it_cannot_be_had_the_reason_is_told_and_nothing_is_touched(change: Json, reason: str) -> None:
    node = Pretend({**NFS, **change})
    (row,) = up(node)
    assert row.outcome == "skipped"
    assert reason in row.text
    assert node.calls == ["inspect"]


def test_an_option_that_the_kernel_ignores_is_not_called_done() -> None:
    (row,) = up(Pretend(NFS, fsc_after=False))
    assert row.outcome == "skipped"
    assert "does not cache" in row.text
    (row,) = up(Pretend(NFS, fsc_after=False, busy="umount: target is busy."))
    assert row.text == "umount: target is busy.; the cache is on after the next mount"


def test_one_nodes_trouble_is_its_own_and_a_lost_node_is_an_error() -> None:
    class Broken(Pretend):
        def install(self, _request: Json) -> Json:
            raise AssertionError

        async def stream(self, command: str, *, stdin: bytes, on_line: Any) -> Exit:
            if b'"cache.install"' in stdin:
                on_line('{"failed": {"kind": "node", "cause": "apt-get: no such package", "remedy": ""}}')
                return Exit(code=1, stderr="")
            return await super().stream(command, stdin=stdin, on_line=on_line)

    class Lost(Pretend):
        async def stream(self, *_words: object, **_more: object) -> Exit:
            raise SshError("k1: cannot be reached")

    assert [result.outcome for result in up(Pretend(NFS), Broken(NFS))] == ["done", "skipped"]
    assert up(Broken(NFS))[0].text == "apt-get: no such package"
    with pytest.raises(SshError):
        up(Pretend(NFS), Lost(NFS))


# the node's own part, on files of the test


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("deploy.remote.cache.FSTAB", tmp_path / "fstab")
    monkeypatch.setattr("deploy.remote.cache.root", list)
    (tmp_path / "fstab").write_text(FSTAB)
    (tmp_path / "fstab").chmod(0o644)
    return tmp_path


def test_fstab_is_replaced_whole_and_the_old_one_stays_beside_it(etc: Path) -> None:
    before = hashlib.sha256(FSTAB.encode()).hexdigest()
    done = write_fstab({"text": FSTAB + "# more\n", "before": before})
    assert (etc / "fstab").read_text() == FSTAB + "# more\n"
    assert Path(done["backup"]).read_text() == FSTAB
    assert oct((etc / "fstab").stat().st_mode & 0o777) == "0o644"
    assert sorted(path.name for path in etc.iterdir()) == ["fstab", Path(done["backup"]).name]


def test_an_fstab_that_changed_meanwhile_is_left_alone(etc: Path) -> None:
    with pytest.raises(WorkerError, match="changed while it was being edited"):
        write_fstab({"text": "lost", "before": "0" * 64})
    assert (etc / "fstab").read_text() == FSTAB
    assert [path.name for path in etc.iterdir()] == ["fstab"]


def test_killed_while_writing_the_old_fstab_or_the_new_one_is_there(etc: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from deploy.remote import cache
cache.FSTAB = Path({str(etc / "fstab")!r})
cache.root = lambda: []
real = cache.sudo
count = 0
def sudo(*command, check=True):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return real(*command, check=check)
cache.sudo = sudo
cache.write_fstab({{"text": "NEW" * 99, "before": cache.digest(cache.FSTAB.read_bytes())}})
"""
    for moment in range(1, 6):
        subprocess.run([sys.executable, "-c", code, str(moment)], check=False, cwd=Path.cwd())
        assert (etc / "fstab").read_text() in (FSTAB, "NEW" * 99)
    assert (etc / "fstab").read_text() == "NEW" * 99


def test_the_share_of_this_machine_is_looked_at_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.remote.cache.drop_caches", lambda: False)  # other tests are measured meanwhile
    found = inspect({"share": str(tmp_path)})
    assert found["fsc"] is None or isinstance(found["fsc"], bool)
    assert cache.why_not(found)
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "big").write_bytes(os.urandom(300_000))
    speed = measure({"share": str(tmp_path), "bytes": 1 << 20})
    assert speed["path"] == str(tmp_path / "big")
    assert speed["bytes"] == 300_000
    assert speed["cold"] is None
    assert cache.told(speed) == "; its speed is not measured: dropping the page cache requires root"
    (tmp_path / "empty").mkdir()
    none = measure({"share": str(tmp_path / "empty"), "bytes": 1})
    assert cache.told(none) == "; its speed is measured when the weights are downloaded"


def test_it_is_measured_once_when_the_weights_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is empty when the cache is switched on; on a share that is full, or cached since before, too."""

    class Empty(Pretend):
        full = False

        def measure(self, request: Json) -> Json:
            return super().measure(request) if self.full else {"path": None}

    new, before, never = Empty(NFS), Empty({**NFS, "fsc": True}), Empty({**NFS, "kind": "ext4", "fsc": None})
    nodes = [RemoteNode(name=f"k{n}", address="", gpus=1, shell=shell) for n, shell in enumerate((new, before, never))]
    monkeypatch.setattr(step, "remote_nodes", lambda *_: nodes)

    async def go(work: step.Work) -> None:
        await step.perform(CacheStep(), work, {})
        assert not await cache.measure_new(work)
        work.keeper.begin("weights", "w")
        work.keeper.end("weights", "done", "", {"folder": "/x"})
        assert not await cache.measure_new(work)  # nothing was found to read; it is tried again
        for shell in (new, before, never):
            shell.full = True
            shell.calls.clear()
        assert await cache.measure_new(work)
        assert not await cache.measure_new(work)
        assert [shell.calls for shell in (new, before, never)] == [["measure"], ["measure"], []]
        speed = {"path": "/x", "cold": 100e6, "warm": 2000e6}
        assert work.keeper.state.data("cache")["measured"] == {"k0": speed, "k1": speed}
        assert work.keeper.state.steps["cache"].digest == inputs

        again = work.keeper.state.steps["cache"]
        assert not await step.perform(CacheStep(), work, {"k0": {"share": {"fsc": True}}})
        assert work.keeper.state.steps["cache"] == again

    inputs = state.digest("cache", "/srv/share", [(target.name, target.address, target.gpus) for target in nodes])
    with_work(tmp_path, go, share="/srv/share")


@pytest.fixture
def commands(etc: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the node's part runs as root. Only commands for files are run; the share is NFS with a cache."""
    ran: list[list[str]] = []

    def sudo(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        ran.append(list(command))
        if command[0] in ("cp", "dd", "mv", "rm"):
            return subprocess.run(command, capture_output=True, text=True, check=check)
        return subprocess.CompletedProcess(command, 1 if "is-enabled" in command else 0, "", "")

    for name in ("DEFAULTS", "RECORD", "CACHED"):
        monkeypatch.setattr(f"deploy.remote.cache.{name}", etc / name)
    monkeypatch.setattr("deploy.remote.cache.sudo", sudo)
    monkeypatch.setattr("deploy.remote.cache.fsc", lambda target: target == NFS["target"])
    monkeypatch.setattr("deploy.remote.cache.running", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name, **_: None if name == "cachefilesd" else f"/usr/bin/{name}")
    return ran


def others(ran: list[list[str]]) -> list[list[str]]:
    """The commands that are not for files."""
    return [command for command in ran if command[0] not in ("cp", "dd", "mv", "rm")]


def set_up() -> None:
    """As `switch_on` does it, but twice, as after a first try that failed."""
    for _ in range(2):
        install({})
    write_fstab({"text": mounts.with_cache(FSTAB, NFS["target"]), "before": hashlib.sha256(FSTAB.encode()).hexdigest()})


def test_undo_removes_all_that_was_put_on_the_node(etc: Path, commands: list[list[str]]) -> None:
    set_up()
    (etc / "CACHED").mkdir()
    commands.clear()
    (backup,) = etc.glob("fstab.gracefarm-*")
    done = undo({})["undone"]
    assert done == [
        f"the option fsc in {etc / 'fstab'}",
        "the package cachefilesd",
        *(str(path) for path in (etc / "CACHED", backup, etc / "RECORD")),
    ]
    assert (etc / "fstab").read_text() == FSTAB
    assert [path.name for path in etc.iterdir()] == ["fstab"]
    share = NFS["target"]
    assert others(commands) == [["umount", share], ["mount", share], ["apt-get", "purge", "-y", "cachefilesd"]]
    assert undo({}) == {"undone": []}


def test_undo_switches_a_cachefilesd_off_that_was_there_and_was_off(
    etc: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/bin/{name}")
    (etc / "DEFAULTS").write_text("# see the manual\n#RUN=yes\n")
    set_up()
    assert (etc / "DEFAULTS").read_text() == "# see the manual\nRUN=yes\n"
    commands.clear()
    undo({})
    assert (etc / "DEFAULTS").read_text() == "# see the manual\n#RUN=yes\n"
    assert others(commands)[2:] == [["systemctl", "disable", "--now", "cachefilesd"]]
    assert sorted(path.name for path in etc.iterdir()) == ["DEFAULTS", "fstab"]


def test_undo_keeps_what_others_changed_in_fstab_since(etc: Path, commands: list[list[str]]) -> None:
    set_up()
    more = "tmpfs /scratch tmpfs rw 0 0\n"
    (etc / "fstab").write_text((etc / "fstab").read_text() + more)
    undo({})
    assert (etc / "fstab").read_text() == FSTAB + more
    set_up_text = mounts.with_cache(FSTAB, NFS["target"]).replace("_netdev,fsc", "_netdev,fsc,ro")
    (etc / "fstab").write_text(FSTAB)
    set_up()
    (etc / "fstab").write_text(set_up_text)
    commands.clear()
    undo({})
    assert (etc / "fstab").read_text() == set_up_text
    assert ["umount", NFS["target"]] not in commands


def test_undo_can_be_repeated_when_the_folder_was_in_use(
    etc: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up()
    free = deploy.remote.cache.sudo

    def busy(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        if command[0] == "umount":
            return subprocess.CompletedProcess(command, 32, "", "umount: target is busy.\n")
        return free(*command, check=check)

    monkeypatch.setattr("deploy.remote.cache.sudo", busy)
    with pytest.raises(WorkerError, match=r"still has its cache: umount: target is busy") as error:
        undo({})
    assert "without --cache" in error.value.remedy
    monkeypatch.setattr("deploy.remote.cache.sudo", free)
    assert "the package cachefilesd" in undo({})["undone"]
    assert ["mount", NFS["target"]] in commands
    assert [path.name for path in etc.iterdir()] == ["fstab"]
