"""The sandbox, on the host's own files as the root; as the user of the tests, and as an ordinary one if that is root."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.box import sandbox
from builder.box.sandbox import BindMount, Outcome
from gracefarm.errors import DiskFullError, HostError
from tests.integration.sandbox.kit import User, driver_environment, processes, wait_for

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


@pytest.mark.parametrize("devices", [(), ("/dev/null",)], ids=["without a GPU", "with a GPU"])
def test_the_kernels_settings_are_out_of_reach(user: User, devices: tuple[str, ...]) -> None:
    """Where root builds, the files of /proc/sys belong to the build's user, and bubblewrap by itself leaves them writable."""
    script = """
        import os
        for folder, folders, files in os.walk("/proc"):
            if folder == "/proc":
                folders[:] = [name for name in folders if not name.isdecimal() and name not in ("self", "thread-self")]
            for name in files:
                if os.access(f"{folder}/{name}", os.W_OK):
                    print(folder, name)
    """
    outcome = user.python_run(script, box=user.box(devices=devices))
    assert outcome.returncode == 0
    assert user.text == ""


def test_with_a_gpu_a_process_may_write_its_own_files_in_proc(user: User) -> None:
    """cuInit of NVIDIA's driver does so, and fails where it cannot; /dev/null plays the GPU."""
    outcome = user.run("/bin/sh", "-c", "echo named >/proc/self/comm", box=user.box(devices=("/dev/null",)))
    assert (outcome.returncode, user.text) == (0, "")


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
    mounts = (BindMount(source=me.folder / "env", target="/env"), BindMount(source=me.build, target="/build", writable=True))
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
    line = me.box(root=root).command(["true"])
    assert str(root / "build") not in line
    assert line[line.index("/build") - 2 : line.index("/build")] == ["--bind", str(me.build)]


def test_the_printed_command_line_is_what_runs_and_isolates_by_itself(me: User) -> None:
    script = "cat /proc/1/cmdline; cat /proc/net/dev"
    line = me.box().command(["/bin/sh", "-c", script])
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


@pytest.mark.parametrize("victim", ["builder.box.supervisor", "bwrap"])
def test_nothing_outlives_a_killed_helper(me: User, marker: str, victim: str) -> None:
    killed: list[int] = []

    def kill(line: str) -> None:
        # The supervisor's command line holds bubblewrap's, so the outermost of each kind is the one with the least id.
        of_kind = [pid for pid in processes(marker) if victim.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if victim == "bwrap":
            of_kind = [pid for pid in of_kind if b"builder.box.supervisor" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        killed.append(min(of_kind))
        os.kill(killed[0], signal.SIGKILL)

    script = DAEMON.format(marker=marker) + f"echo begun; sleep 1000; echo {marker}"
    outcome = me.run("/bin/sh", "-c", script, on_line=kill)
    assert killed
    assert outcome.returncode == sandbox.KILLED
    wait_for(lambda: not processes(marker), "the end of all processes")


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
    """Really forbidden, in a new user namespace: the limit belongs to a namespace."""
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
        assert "user namespaces cannot be created" in text
        assert "user.max_user_namespaces = 0" in text


def test_a_missing_mount_is_named(me: User) -> None:
    with pytest.raises(HostError, match="/no/such/folder"):
        me.run("/bin/true", box=me.box(mounts=(BindMount(source=Path("/no/such/folder"), target="/build"),)))


@pytest.mark.skipif(os.getuid() != 0, reason="about root")
def test_a_folder_that_root_may_not_enter_is_said(me: User) -> None:
    """As /home/SOMEBODY with sudo: in a user namespace root has no rights over the files of others."""
    closed = me.folder / "home"
    (closed / "build").mkdir(parents=True)
    closed.chmod(0o700)
    os.chown(closed, 65534, 65534)
    with pytest.raises(HostError, match="build as the owner of the folder, or set GRACEFARM_HOME"):
        me.run("/bin/true", box=me.box(mounts=(BindMount(source=closed / "build", target="/build"),)))


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
from builder.box.sandbox import BindMount, Sandbox, shell
mounts = tuple(BindMount(source=Path(s), target=t, writable=w) for s, t, w in {mounts!r})
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
