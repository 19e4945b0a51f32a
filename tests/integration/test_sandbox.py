"""The sandbox, on the host's own files as the root; as the user of the tests, and as nobody too when that is root."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder import sandbox
from builder.meter import KINDS, MemoryBy, open_meter
from builder.sandbox import Mount, Outcome, Sandbox
from gracefarm.errors import DiskFullError, HostError

PROJECT = Path(sandbox.__file__).parents[1]
PYTHON = f"/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
MIB = 1 << 20

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from builder import sandbox
spec = json.loads(sys.argv[1])
mounts = tuple(sandbox.Mount(source=Path(s), target=t, writable=w) for s, t, w in spec["mounts"])
box = sandbox.Sandbox(root=Path("/"), mounts=mounts, environment=spec["environment"], workdir=spec["workdir"],
                      memory=spec["memory"], network=spec["network"])
{prologue}
outcome = sandbox.run(box, spec["argv"], log=Path(spec["log"]), **spec["options"])
print(json.dumps(dataclasses.asdict(outcome)))
"""


@dataclass(frozen=True, kw_only=True)
class User:
    """Somebody who uses the sandbox, with a folder of his own."""

    uid: int
    folder: Path
    python: str
    prefix: tuple[str, ...]
    "Command that becomes this user."

    @property
    def build(self) -> Path:
        return self.folder / "build"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def box(self, **changes: object) -> Sandbox:
        """A sandbox with a Python at PYTHON and a writable /build."""
        mounts = (
            Mount(source=Path(sys.base_prefix if not self.prefix else "/usr"), target="/python"),
            Mount(source=self.build, target="/build", writable=True),
        )
        plain = Sandbox(
            root=Path("/"),
            mounts=mounts,
            environment={"PATH": "/usr/bin:/bin", "HOME": sandbox.HOME, "LANG": "C.UTF-8"},
            workdir="/build",
            memory=1024 * MIB,
        )
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]

    def driver(self, box: Sandbox, argv: Sequence[str], *, prologue: str = "", **options: object) -> list[str]:
        """The command line of a builder of this user that runs one sandbox."""
        spec = {
            "mounts": [(str(mount.source), mount.target, mount.writable) for mount in box.mounts],
            "environment": dict(box.environment),
            "workdir": box.workdir,
            "memory": box.memory,
            "network": box.network,
            "argv": list(argv),
            "log": str(self.log),
            "options": options,
        }
        return [*self.prefix, self.python, "-c", DRIVER.replace("{prologue}", prologue), json.dumps(spec)]

    def run(self, *argv: str, box: Sandbox | None = None, **options: object) -> Outcome:
        box = box or self.box()
        if not self.prefix:
            return sandbox.run(box, argv, log=self.log, **options)  # type: ignore[arg-type]
        done = subprocess.run(self.driver(box, argv, **options), env=driver_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fields = json.loads(done.stdout)
        return Outcome(**{**fields, "reached": tuple(fields["reached"])})

    def python_run(self, script: str, *, box: Sandbox | None = None, **options: object) -> Outcome:
        return self.run(PYTHON, "-c", textwrap.dedent(script), box=box, **options)

    @property
    def text(self) -> str:
        return self.log.read_text()


def driver_environment() -> dict[str, str]:
    """What a builder in a process of its own needs to find the project; the secret is what must not get in."""
    packages = f"{PROJECT}:{sysconfig.get_path('purelib')}"
    return {"PATH": os.environ["PATH"], "PYTHONPATH": packages, "TWINE_PASSWORD": "hunter2"}


def nobody() -> tuple[str, tuple[str, ...]] | None:
    """An interpreter that nobody may use, with the command that becomes nobody; None when there is no such interpreter."""
    become = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    probe = "import subprocess, sys, builder.sandbox; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        tried = subprocess.run([*become, python, "-c", probe], env=driver_environment(), capture_output=True, cwd="/")
        if tried.returncode == 0:
            return python, become
    return None


@contextlib.contextmanager
def acting_as(name: str) -> Iterator[User]:
    """The user of the tests (`self`), or `nobody`."""
    uid, python, prefix = os.getuid(), sys.executable, ()
    if name == "nobody":
        found = nobody()
        if found is None:
            pytest.skip("no interpreter that nobody may use can read this checkout")
        uid, (python, prefix) = 65534, found
    folder = Path(tempfile.mkdtemp(prefix="gracefarm-test-"))
    someone = User(uid=uid, folder=folder, python=python, prefix=prefix)
    someone.build.mkdir()
    for path in (folder, someone.build):
        os.chown(path, uid, uid if prefix else -1)
    try:
        yield someone
    finally:
        shutil.rmtree(folder)


USERS = ["self", "nobody"] if os.getuid() == 0 else ["self"]


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    """Everybody who may build: root, where the tests are root's, and an ordinary user."""
    with acting_as(request.param) as someone:
        yield someone


@pytest.fixture
def me(tmp_path: Path) -> User:
    """The user of the tests."""
    (tmp_path / "build").mkdir()
    return User(uid=os.getuid(), folder=tmp_path, python=sys.executable, prefix=())


@pytest.fixture
def marker() -> Iterator[str]:
    """A word to find processes by; whatever carries it at the end is killed."""
    word = f"marker-{uuid.uuid4()}"
    yield word
    for pid in processes(word):
        os.kill(pid, signal.SIGKILL)


def processes(word: str) -> list[int]:
    """Processes with `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


# --- what is seen inside -----------------------------------------------------------------------------------------------------


def test_environment_is_exactly_what_was_given(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINE_PASSWORD", "hunter2")
    outcome = user.run("/bin/sh", "-c", "cat /proc/*/environ | tr '\\0' '\\n'", box=user.box(environment={"A": "b c"}))
    assert outcome.returncode == 0
    # Bubblewrap sets PWD, as a shell would; the shell's own copies of the same are among the processes read.
    assert set(user.text.split("\n")) <= {"A=b c", "PWD=/build", ""}
    assert "A=b c" in user.text


def test_identity_is_the_same_for_every_builder(user: User) -> None:
    user.python_run("""
        import os, pwd, socket
        print(os.getuid(), os.getgid(), pwd.getpwuid(os.getuid()).pw_name, socket.gethostname())
        print(os.path.expanduser("~"), os.getcwd())
    """)
    assert user.text == "1000 1000 build build\n/home/build /build\n"


def test_files_in_the_build_folder_belong_to_the_builder(user: User) -> None:
    user.run("/bin/sh", "-c", "mkdir a && echo hello >a/b")
    assert (user.build / "a" / "b").read_text() == "hello\n"
    assert (user.build / "a" / "b").stat().st_uid == user.uid


@pytest.mark.parametrize("place", ["/", "/usr", "/etc", "/usr/lib", "/python", "/run", "/proc/self/comm"])
def test_writing_elsewhere_is_refused(user: User, place: str) -> None:
    outcome = user.python_run(f"""
        import errno, os, pathlib
        path = pathlib.Path({place!r})
        try:
            (path / "gracefarm-was-here" if path.is_dir() else path).write_text("x")
        except OSError as error:
            print(errno.errorcode[error.errno])
    """)
    assert outcome.returncode == 0
    assert user.text.strip() in {"EROFS", "EACCES", "EPERM", "ENOTDIR"}


def test_the_kernels_settings_are_out_of_reach(user: User) -> None:
    """Where root builds, the files of /proc/sys belong to the build's user, and bubblewrap alone leaves them writable."""
    outcome = user.python_run("""
        import os
        for folder, folders, files in os.walk("/proc"):
            if folder == "/proc":
                folders[:] = [name for name in folders if not name.isdecimal() and name not in ("self", "thread-self")]
            for name in files:
                if os.access(f"{folder}/{name}", os.W_OK):
                    print(folder, name)
    """)
    assert outcome.returncode == 0
    assert user.text == ""


def test_the_root_cannot_be_made_writable_again(user: User) -> None:
    outcome = user.run("/bin/sh", "-c", "mount -o remount,rw /usr || umount /usr || touch /usr/gracefarm-was-here")
    assert outcome.returncode != 0


def test_temporary_folder_and_home_are_private_and_empty(user: User) -> None:
    name = f"gracefarm-{uuid.uuid4()}"
    outcome = user.run("/bin/sh", "-c", f"ls -A /tmp /home/build && touch /tmp/{name} /home/build/{name} && ls /tmp")
    assert outcome.returncode == 0
    assert user.text == f"/home/build:\n\n/tmp:\n{name}\n"
    assert not (Path("/tmp") / name).exists()


def test_processes_and_descriptors_of_the_host_are_not_seen(user: User) -> None:
    user.python_run("""
        import os
        print(sorted(name for name in os.listdir("/proc") if name.isdecimal()))
        for name in sorted(os.listdir("/proc/self/fd")):
            try: print(name, os.readlink(f"/proc/self/fd/{name}").split(":")[0])
            except FileNotFoundError: pass  # the one that lists
        print(sorted(os.listdir("/dev")))
    """)
    pids, *descriptors, devices = user.text.splitlines()
    assert pids == "['1', '2']"
    assert descriptors == ["0 /dev/null", "1 pipe", "2 pipe"]
    assert not {"kvm", "mem", "sda", "fuse", "net"} & set(devices.strip("[]").replace("'", "").split(", "))


def test_no_capability_is_left(user: User) -> None:
    user.run("/bin/sh", "-c", "grep ^Cap /proc/self/status")
    assert {line.split()[1] for line in user.text.splitlines()} == {"0" * 16}


def test_signals_have_their_defaults(user: User) -> None:
    assert user.run("/bin/bash", "-c", "yes | head -1; exit ${PIPESTATUS[0]}").returncode == 128 + signal.SIGPIPE


def test_mounts_are_what_was_asked(me: User) -> None:
    (me.folder / "env").mkdir()
    (me.folder / "env" / "file").write_text("content")
    mounts = (Mount(source=me.folder / "env", target="/env"), Mount(source=me.build, target="/build", writable=True))
    assert me.run("/bin/sh", "-c", "cat /env/file; echo x >/env/file", box=me.box(mounts=mounts)).returncode != 0
    assert me.text.startswith("content")
    assert (me.folder / "env" / "file").read_text() == "content"


def test_a_mount_hides_a_folder_of_the_root(me: User, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("usr", "bin", "lib", "lib64", "etc"):
        if Path("/", name).is_symlink():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).symlink_to(Path("/", name).readlink())
        else:
            (root / name).mkdir(parents=True, exist_ok=True)
    (root / "build").mkdir()
    (root / "build" / "old").touch()
    line = sandbox.command(me.box(root=root), ["true"])
    assert str(root / "build") not in line
    assert line[line.index("/build") - 2 : line.index("/build")] == ["--bind", str(me.build)]


def test_the_printed_command_line_is_what_runs_and_isolates_by_itself(me: User) -> None:
    script = "cat /proc/1/cmdline; cat /proc/net/dev"
    line = sandbox.command(me.box(), ["/bin/sh", "-c", script])
    by_hand = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "TWINE_PASSWORD": "hunter2"}, check=True)
    me.run("/bin/sh", "-c", script)
    inside = me.text.split("\0")
    assert [word for word in inside if not word.startswith("Inter")][5:][: len(line) - 1] == line[1:]
    interfaces = [row.split(":")[0].strip() for row in by_hand.stdout.splitlines() if ":" in row and "|" not in row]
    assert interfaces[-1:] == ["lo"]
    assert not any(row.strip().startswith(("eth", "en", "wl")) for row in by_hand.stdout.splitlines())


# --- return codes and log ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_the_return_code_is_the_commands(user: User, script: str, code: int) -> None:
    outcome = user.run("/bin/sh", "-c", script)
    assert outcome.returncode == code
    assert not outcome.killed_by_memory
    assert not outcome.timed_out


def test_output_is_appended_to_the_log_and_given_line_by_line(me: User) -> None:
    me.log.write_text("before\n")
    lines: list[str] = []
    me.run(
        "/bin/sh", "-c", "echo one; echo two >&2; printf 'f\\303\\274nf\\r\\nbad \\377 byte\\nno end'", on_line=lines.append
    )
    assert me.log.read_bytes() == b"before\none\ntwo\nf\xc3\xbcnf\r\nbad \xff byte\nno end"
    assert lines == ["one", "two", "fünf", "bad � byte", "no end"]


def test_a_build_cannot_truncate_its_log(me: User) -> None:
    me.run("/bin/bash", "-c", "echo first; echo second >/dev/stderr; echo third >/dev/stdout")
    assert me.text == "first\nsecond\nthird\n"


def test_much_output_arrives_whole(me: User) -> None:
    count = 0

    def line(text: str) -> None:
        nonlocal count
        count += 1

    me.run("/bin/sh", "-c", "seq 1 500000", on_line=line)
    assert count == 500_000
    assert me.text.endswith("\n499999\n500000\n")
    assert me.text.count("\n") == 500_000


def test_a_full_disk_under_the_log_is_said_and_ends_all(me: User, marker: str) -> None:
    with pytest.raises(DiskFullError, match="no space left"):
        sandbox.run(me.box(), ["/bin/sh", "-c", f"echo begun; sleep 1000; echo {marker}"], log=Path("/dev/full"))
    assert processes(marker) == []


def test_time_out_kills_and_keeps_the_log(user: User, marker: str) -> None:
    outcome = user.run("/bin/sh", "-c", f"echo begun; sleep 1000; echo {marker}", timeout_s=1)
    assert outcome.timed_out
    assert outcome.returncode == sandbox.KILLED
    assert user.text == "begun\n"
    assert processes(marker) == []


# --- nothing is left ---------------------------------------------------------------------------------------------------------

DAEMON = "setsid sh -c 'trap : TERM INT HUP; while true; do sleep 1; done' {marker} </dev/null >/dev/null 2>&1 & "


def test_a_daemon_ends_with_the_command(user: User, marker: str) -> None:
    outcome = user.run("/bin/sh", "-c", DAEMON.format(marker=marker) + "sleep 0.3; kill -0 $! && touch alive; exit 4")
    assert outcome.returncode == 4
    assert (user.build / "alive").exists()
    assert processes(marker) == []


def test_an_exception_in_the_callback_ends_all(me: User, marker: str) -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="begun"):
        me.run("/bin/sh", "-c", DAEMON.format(marker=marker) + f"echo begun; sleep 1000; echo {marker}", on_line=fail)
    assert processes(marker) == []


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_killed_builder(user: User, marker: str, kill: signal.Signals) -> None:
    script = DAEMON.format(marker=marker) + f"echo begun; sleep 1000; echo {marker}"
    line = user.driver(user.box(), ["/bin/sh", "-c", script])
    with subprocess.Popen(line, env=driver_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as builder:
        wait_for(lambda: user.log.is_file() and "begun" in user.text, "the build")
        # setpriv executes the builder, so this is the builder itself. It and the sandbox carry the marker.
        assert len(processes(marker)) > 3
        builder.send_signal(kill)
        builder.communicate(timeout=60)
    assert builder.returncode in (-kill, 130)
    wait_for(lambda: not processes(marker), "the end of all processes")
    assert user.text == "begun\n", "the log has all that was written"


def test_nothing_starts_when_the_builder_dies_before_the_command(user: User, marker: str) -> None:
    """The gap of --die-with-parent: bubblewrap is there, the command is not yet."""
    die = "import os; sandbox.meter.Watchdog.attach = lambda self, pid: os.kill(os.getpid(), 9)"
    line = user.driver(
        user.box(), ["/bin/sh", "-c", f"touch ran; sleep 1000; echo {marker}"], prologue=die, memory_by=["watchdog"]
    )
    assert subprocess.run(line, env=driver_environment(), capture_output=True).returncode == -signal.SIGKILL
    wait_for(lambda: not processes(marker), "the end of all processes")
    assert not (user.build / "ran").exists()


@pytest.mark.parametrize("victim", ["builder.supervisor", "bwrap"])
def test_nothing_outlives_a_killed_helper(me: User, marker: str, victim: str) -> None:
    killed: list[int] = []

    def kill(line: str) -> None:
        # The supervisor's command line holds bubblewrap's, so the outermost of each kind is the one with the least id.
        of_kind = [pid for pid in processes(marker) if victim.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if victim == "bwrap":
            of_kind = [pid for pid in of_kind if b"builder.supervisor" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        killed.append(min(of_kind))
        os.kill(killed[0], signal.SIGKILL)

    script = DAEMON.format(marker=marker) + f"echo begun; sleep 1000; echo {marker}"
    outcome = me.run("/bin/sh", "-c", script, on_line=kill)
    assert killed
    assert outcome.returncode == sandbox.KILLED
    wait_for(lambda: not processes(marker), "the end of all processes")


# --- memory and CPU time -----------------------------------------------------------------------------------------------------


def kinds() -> list[MemoryBy]:
    """The ways to bound memory that this machine has."""
    found: list[MemoryBy] = []
    for kind in KINDS:
        try:
            open_meter(64 * MIB, (kind,)).close()
        except HostError:
            continue
        found.append(kind)
    return found


@dataclass(frozen=True, kw_only=True)
class Metered:
    """A user with one way to bound memory."""

    user: User
    kind: MemoryBy


@pytest.fixture(params=[("self", kind) for kind in kinds()] + [(name, "watchdog") for name in USERS[1:]], ids="-".join)
def metered(request: pytest.FixtureRequest) -> Iterator[Metered]:
    """Each way that this machine has; nobody has the watchdog alone, cgroups here are root's."""
    name, kind = request.param
    with acting_as(name) as someone:
        yield Metered(user=someone, kind=kind)


ALLOCATE = """
    import time
    print("begun", flush=True)
    block = b"x" * ({mib} << 20)
    time.sleep(2)
    print("survived", flush=True)
"""


def test_more_memory_than_the_bound_is_killed(metered: Metered) -> None:
    outcome = metered.user.python_run(
        ALLOCATE.format(mib=600), box=metered.user.box(memory=200 * MIB), memory_by=[metered.kind]
    )
    assert outcome.killed_by_memory
    assert outcome.memory_by == metered.kind
    assert outcome.returncode == 137
    assert outcome.peak_memory >= outcome.memory_bound == 200 * MIB
    assert metered.user.text.startswith("begun\n")
    assert "survived" not in metered.user.text


def test_less_memory_than_the_bound_is_left_alone_and_measured(metered: Metered) -> None:
    outcome = metered.user.python_run(
        ALLOCATE.format(mib=120), box=metered.user.box(memory=200 * MIB), memory_by=[metered.kind]
    )
    assert not outcome.killed_by_memory
    assert outcome.returncode == 0
    assert 120 * MIB <= outcome.peak_memory < 160 * MIB


def test_the_bound_is_the_trees_not_the_process(metered: Metered) -> None:
    outcome = metered.user.python_run(
        """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                block = b"x" * (80 << 20)
                time.sleep(5)
                os._exit(0)
        for _ in range(4):
            print(os.wait()[1])
        time.sleep(5)
        """,
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.killed_by_memory
    assert outcome.returncode == 137


def test_a_kill_deep_inside_is_not_mistaken_for_a_compile_error(metered: Metered) -> None:
    """As ninja and make have it: the parent lives on and returns a code of its own."""
    script = textwrap.dedent(ALLOCATE.format(mib=600))
    outcome = metered.user.python_run(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}]); sys.exit(1)",
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.killed_by_memory
    assert outcome.returncode in (1, 137)


def test_memory_that_forks_share_counts_once(metered: Metered) -> None:
    outcome = metered.user.python_run(
        """
        import os, time
        block = b"x" * (100 << 20)
        for _ in range(5):
            if os.fork() == 0:
                time.sleep(1)
                os._exit(0)
        print([os.wait()[1] for _ in range(5)])
        """,
        box=metered.user.box(memory=250 * MIB),
        memory_by=[metered.kind],
    )
    assert not outcome.killed_by_memory
    assert outcome.peak_memory < 200 * MIB


def test_files_in_the_private_temporary_folder_count(metered: Metered) -> None:
    fill = "head -c {size}M /dev/zero >/tmp/big; sleep 2"
    box, kinds = metered.user.box(memory=200 * MIB), [metered.kind]
    assert metered.user.run("/bin/sh", "-c", fill.format(size=400), box=box, memory_by=kinds).killed_by_memory
    outcome = metered.user.run("/bin/sh", "-c", fill.format(size=100), box=box, memory_by=kinds)
    assert not outcome.killed_by_memory
    assert 100 * MIB <= outcome.peak_memory < 150 * MIB


def test_page_cache_does_not_count(metered: Metered) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", metered.user.build], capture_output=True, text=True, check=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("the build folder lies in memory here, so that its files do count")
    outcome = metered.user.run(
        *("/bin/sh", "-c", "head -c 300M /dev/zero >big; cat big >/dev/null; rm big; sleep 0.5"),
        box=metered.user.box(memory=200 * MIB),
        memory_by=[metered.kind],
    )
    assert outcome.returncode == 0
    assert outcome.peak_memory < 100 * MIB


BURN = """
    import os, sys, time
    def burn():
        while time.process_time() < 1:
            pass
        open("/build/burning", "w").write(str(time.process_time()))
        os.rename("/build/burning", "/build/burnt")
    {how}
"""


CHILD = """
    if os.fork() == 0:
        burn()
        os._exit(0)
    os.wait()
"""
# Its parent ends at once, so that nobody but the sandbox's first process waits for it.
DAEMON_CHILD = """
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            burn()
            os._exit(0)
        os._exit(0)
    os.wait()
    while not os.path.exists("/build/burnt"):
        time.sleep(0.05)
    time.sleep(0.2)
"""
# Nobody at all waits for this one: it is killed when the command ends.
DAEMON_LEFT = DAEMON_CHILD.replace("burn()", "burn(); time.sleep(1000)").replace("0.2", "1")


@pytest.mark.parametrize(
    "how",
    [
        "burn()",
        CHILD,
        DAEMON_CHILD,
        DAEMON_LEFT,
    ],
    ids=["command", "child", "daemon", "daemon-left"],
)
def test_cpu_time_is_the_trees(metered: Metered, how: str) -> None:
    outcome = metered.user.python_run(BURN.format(how=how), memory_by=[metered.kind])
    assert outcome.returncode == 0, metered.user.text
    burnt = float((metered.user.build / "burnt").read_text())
    assert 0.95 * burnt <= outcome.cpu_s < burnt + 1


def cgroups() -> set[Path]:
    return {path for path in Path("/sys/fs/cgroup").glob("**/gracefarm-*") if path.is_dir()}


@pytest.mark.skipif(kinds() == ["watchdog"], reason="no cgroups here")
def test_cgroups_are_removed_also_those_of_a_killed_builder(me: User, marker: str) -> None:
    before = cgroups()
    me.run("/bin/true")
    assert cgroups() <= before
    line = me.driver(me.box(), ["/bin/sh", "-c", f"echo begun; sleep 1000; echo {marker}"])
    with subprocess.Popen(line, env=driver_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as builder:
        wait_for(lambda: "begun" in me.text, "the build")
        builder.kill()
        builder.communicate(timeout=60)
    left = cgroups() - before
    assert left, "the killed builder cannot have removed them"
    wait_for(lambda: not processes(marker), "the end of all processes")

    def swept() -> bool:
        me.run("/bin/true")
        return not left & cgroups()

    wait_for(swept, "the next start sweeps")


# --- network -----------------------------------------------------------------------------------------------------------------

TRY = """
    import socket, urllib.request
    def attempt(what):
        try: print(what())
        except OSError as error: print(type(error).__name__, error)
"""


def attempts(user: User, script: str, **options: object) -> Outcome:
    return user.python_run(textwrap.dedent(TRY) + textwrap.dedent(script), **options)


def test_a_name_is_recorded(user: User) -> None:
    outcome = attempts(user, "attempt(lambda: urllib.request.urlopen('http://example.org'))")
    assert outcome.reached == ("example.org",)
    assert outcome.network_by == "recorder"
    assert "Name or service not known" in user.text


def test_addresses_are_recorded_and_refused(user: User) -> None:
    outcome = attempts(
        user,
        """
        attempt(lambda: socket.create_connection(("93.184.216.34", 443)))
        attempt(lambda: socket.create_connection(("2001:db8::7", 80)))
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagram.connect(("192.0.2.1", 123))
        datagram.send(b"hello")
        """,
    )
    assert outcome.reached == ("93.184.216.34:443", "[2001:db8::7]:80", "192.0.2.1:123")
    assert user.text.count("ConnectionRefusedError") == 2


def test_each_attempt_is_recorded_once_in_order(user: User) -> None:
    outcome = attempts(
        user,
        """
        for name in ("b.example", "a.example", "b.example"):
            attempt(lambda: socket.getaddrinfo(name, 443))
            attempt(lambda: socket.create_connection(("192.0.2.7", 443)))
        """,
    )
    assert outcome.reached == ("b.example", "192.0.2.7:443", "a.example")


def test_an_attempt_right_before_the_end_is_recorded(me: User) -> None:
    for _ in range(10):
        script = "import os, socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9)); os._exit(0)"
        assert me.run(PYTHON, "-c", script).reached == ("192.0.2.1:9",)


def test_a_question_to_another_name_server_is_recorded(user: User) -> None:
    outcome = attempts(
        user,
        """
        import struct
        question = struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\\7example\\3org\\0" + struct.pack("!HH", 1, 1)
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.connect(("8.8.8.8", 53))
        server.send(question)
        attempt(lambda: server.recv(100))
        """,
    )
    assert outcome.reached == ("8.8.8.8:53", "example.org")
    assert "ConnectionRefusedError" in user.text


def test_questions_by_tcp_are_answered_and_garbage_survived(user: User) -> None:
    outcome = attempts(
        user,
        """
        import struct
        for address in (("127.0.0.1", 53), ("::1", 53)):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            socket.socket(family, socket.SOCK_DGRAM).sendto(b"\\xff" * 40, address)
            socket.create_connection(address).close()
            socket.create_connection(address).send(b"\\0")
            name = f"v{family}".encode()
            question = struct.pack("!6H", 1, 256, 1, 0, 0, 0) + bytes([len(name)]) + name + b"\\0" + struct.pack("!HH", 1, 1)
            stream = socket.create_connection(address)
            stream.send(struct.pack("!H", len(question)) + question)
            print("answer", stream.recv(1000)[5] & 15)
        attempt(lambda: socket.getaddrinfo("after.example", 1))
        """,
    )
    assert outcome.reached == ("v2", "v10", "after.example")
    assert user.text.count("answer 3") == 2


def test_own_names_and_loopback_are_legal_and_not_recorded(user: User) -> None:
    outcome = attempts(
        user,
        """
        import threading
        print(socket.getfqdn(), socket.gethostbyaddr("127.0.0.1")[0], socket.gethostbyname(socket.gethostname()))
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.9.9.9"), (socket.AF_INET6, "::1")):
            with socket.create_server((address, 0), family=family) as server:
                client = socket.create_connection(server.getsockname()[:2])
                client.send(b"over loopback")
                print(server.accept()[0].recv(100))
            with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as two:
                one.bind((address, 0))
                two.sendto(b"datagram", one.getsockname())
                print(one.recv(100))
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.connect(("192.0.2.1", 80))  # the usual way to learn one's own address sends nothing
        print("own address", own.getsockname()[0])
        """,
    )
    assert outcome.returncode == 0, user.text
    assert outcome.reached == ()
    assert user.text.count("b'over loopback'") == 3
    assert user.text.count("b'datagram'") == 3
    assert "own address 127.0.0.1" in user.text


def test_a_root_without_configuration_knows_its_own_names(me: User, tmp_path: Path) -> None:
    """Nothing in /etc: the C library asks 127.0.0.1, which is the recorder."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    for link in (entry for entry in Path("/").iterdir() if entry.is_symlink() and str(entry.readlink()).startswith("usr/")):
        (root / link.name).symlink_to(link.readlink())
    box = me.box(root=root)
    box = dataclasses.replace(box, mounts=(*box.mounts, Mount(source=Path("/usr"), target="/usr")))
    outcome = attempts(
        me,
        """
        print(socket.gethostbyname("build"), socket.gethostbyname("localhost"), socket.getfqdn())
        attempt(lambda: socket.gethostbyname("other.example"))
        """,
        box=box,
    )
    assert me.text.startswith("127.0.0.1 127.0.0.1 "), me.text
    assert outcome.reached == ("other.example",)


def test_the_host_is_out_of_reach(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = attempts(user, f"attempt(lambda: socket.create_connection(('127.0.0.1', {port})))")
        assert "ConnectionRefusedError" in user.text
    assert outcome.reached == ()


def test_network_reaches_a_server_on_the_host_when_granted(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"socket.create_connection(('127.0.0.1', {port})).send(b'hello')"
        outcome = attempts(user, script, box=user.box(network=True))
        assert outcome.returncode == 0, user.text
        with server.accept()[0] as connection:
            assert connection.recv(10) == b"hello"
    assert outcome.network_by == "host"
    assert outcome.reached == ()


def test_without_a_recorder_the_output_tells(user: User) -> None:
    outcome = attempts(
        user,
        """
        attempt(lambda: urllib.request.urlopen("http://example.org"))
        attempt(lambda: socket.create_connection(("93.184.216.34", 443)))
        print("curl: (6) Could not resolve host: files.example")
        """,
        record=False,
    )
    assert outcome.network_by == "log"
    assert outcome.reached[-1] == "files.example"
    assert "Temporary failure in name resolution" in outcome.reached[0]
    assert "Network is unreachable" in outcome.reached[1]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fatal: unable to access 'https://git.example/x/': Could not resolve host: git.example", "git.example"),
        ("HTTPSConnectionPool(host='files.example', port=443): ... Temporary failure in name resolution", "files.example"),
        (
            "wget: unable to resolve host address \u2018wget.example\u2019: Temporary failure in name resolution",
            "wget.example",
        ),
        ("  OSError: [Errno 101] Network is unreachable\n", "OSError: [Errno 101] Network is unreachable"),
        ("compiling network.cpp", None),
    ],
)
def test_what_well_known_programs_say(line: str, wanted: str | None) -> None:
    assert sandbox.reached_in(line) == wanted


# --- machines that lack something --------------------------------------------------------------------------------------------


def test_this_machine_has_all_that_is_needed() -> None:
    assert sandbox.check() is None


def test_missing_bubblewrap_is_said(me: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert sandbox.check() == "bubblewrap (the program bwrap) is not installed"
    with pytest.raises(HostError, match="bubblewrap") as caught:
        me.run("/bin/true")
    assert "builder doctor" in caught.value.remedy


def test_forbidden_user_namespaces_are_said(me: User) -> None:
    """Forbidden for real, in a user namespace of our own: the limit is a namespace's."""
    prologue = "print(sandbox.check())"
    python = me.driver(me.box(), ["/bin/true"], prologue=prologue)
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", *python],
        env=driver_environment(),
        capture_output=True,
        text=True,
    )
    raised = done.stderr.splitlines()[-1]
    assert raised.startswith("gracefarm.errors.HostError: the sandbox could not be started")
    for text in (done.stdout, raised):
        assert "no user namespace can be made" in text
        assert "user.max_user_namespaces = 0" in text


def test_a_missing_mount_is_named(me: User) -> None:
    with pytest.raises(HostError, match="/no/such/folder"):
        me.run("/bin/true", box=me.box(mounts=(Mount(source=Path("/no/such/folder"), target="/build"),)))


@pytest.mark.skipif(os.getuid() != 0, reason="about root")
def test_a_folder_that_root_may_not_enter_is_said(me: User) -> None:
    """As /home/SOMEBODY with sudo: in a user namespace root has no rights over the files of others."""
    closed = me.folder / "home"
    (closed / "build").mkdir(parents=True)
    closed.chmod(0o700)
    os.chown(closed, 65534, 65534)
    with pytest.raises(HostError, match="build as their owner or set GRACEFARM_HOME"):
        me.run("/bin/true", box=me.box(mounts=(Mount(source=closed / "build", target="/build"),)))


def test_sandboxes_side_by_side_do_not_mix(me: User) -> None:
    def one(number: int) -> Outcome:
        script = f"echo {number}; getent hosts {number}.example; exit {number}"
        return sandbox.run(me.box(), ["/bin/sh", "-c", script], log=me.folder / f"log{number}")

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(one, range(8)))
    assert [outcome.returncode for outcome in outcomes] == list(range(8))
    assert [outcome.reached for outcome in outcomes] == [(f"{number}.example",) for number in range(8)]
    assert [(me.folder / f"log{number}").read_text() for number in range(8)] == [f"{number}\n" for number in range(8)]


def test_a_missing_command_is_named(me: User) -> None:
    with pytest.raises(HostError, match="no-such-program"):
        me.run("/no-such-program")


# --- shell -------------------------------------------------------------------------------------------------------------------


def test_shell_is_interactive_with_job_control(me: User) -> None:
    mounts = [(str(me.build), "/build", True)]
    script = f"""
import sys
from pathlib import Path
from builder.sandbox import Mount, Sandbox, shell
mounts = tuple(Mount(source=Path(s), target=t, writable=w) for s, t, w in {mounts!r})
environment = {{"PATH": "/usr/bin:/bin", "TERM": "dumb", "PS1": "ready> "}}
sys.exit(shell(Sandbox(root=Path("/"), mounts=mounts, environment=environment, workdir="/build", memory=1 << 30),
               ["/bin/bash", "--norc", "--noprofile"]))
"""
    controller, terminal = pty.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-c", script]
    with subprocess.Popen(command, env=driver_environment(), stdin=terminal, stdout=terminal, stderr=terminal) as builder:
        os.close(terminal)
        seen = b""

        def expect(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                chunk = os.read(controller, 4096)
                assert chunk
                seen += chunk
            seen = seen.partition(text)[2]

        def type_in(text: bytes) -> None:
            os.write(controller, text)

        try:
            expect(b"ready> ")
            type_in(b"tty; echo $((40 + 2)) >answer; hostname\n")
            expect(b"build\r\n")
            type_in(b"echo sleeping; sleep 1000\n")
            expect(b"sleeping\r\n")
            time.sleep(0.3)
            type_in(b"\x03")
            expect(b"ready> ")
            type_in(b"sleep 1000 & jobs\n")
            expect(b"Running")
            type_in(b"exit 5\n")
            assert builder.wait(60) == 5
        finally:
            builder.kill()
    os.close(controller)
    assert (me.build / "answer").read_text() == "42\n"
