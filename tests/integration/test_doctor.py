"""doctor: what it finds on this machine and on broken ones, and what --fix really does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.box import binfmt
from builder.ground import root
from builder.planning import stack
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch
from builder.upkeep import doctor
from builder.upkeep.doctor import HostCheck
from gracefarm.errors import HostError
from tests.conftest import Farm

REPOSITORY = Path(__file__).parent.parent.parent
HOST = stack.host_arch()
needs_cross = pytest.mark.skipif(HOST is not Arch.X86_64, reason="an aarch64 host emulates nothing")


def check(settings: Settings, name: str) -> HostCheck:
    (found,) = [check for check in doctor.checks(settings) if check.name == name]
    return found


def test_a_machine_set_up_by_bootstrap_lacks_nothing() -> None:
    """Except the size of its disk, and what recipes/triton requires of the kernel: that is for `doctor --fix`."""
    bad = [check for check in doctor.checks(load()) if not check.ok]
    assert [check for check in bad if check.name != "disk" and not check.name.startswith("binfmt")] == []
    assert all("required by" in check.found for check in bad if check.name.startswith("binfmt"))


def test_the_package_list_is_debians(tmp_path: Path) -> None:
    """bootstrap reads the same file with sed; every name is a package of the suite that this machine knows."""
    names = doctor.system_packages()
    assert {"bubblewrap", "git", "dpkg"} <= set(names)
    place = REPOSITORY / "builder" / "data" / "system-packages.txt"
    by_shell = subprocess.run(["sed", "s/#.*//", place], capture_output=True, text=True, check=True).stdout.split()
    assert by_shell == list(names)


def test_missing_programs_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("dpkg-query", "git"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in doctor.checks(load())}
    assert found["git"].ok
    assert found["bubblewrap"].packages == ("bubblewrap",)
    assert found["bubblewrap"].found == "not installed"
    assert not found["sandbox"].ok
    assert "not installed" in found["sandbox"].found


def test_a_release_candidate_of_python_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ubuntu 22.04's python3.11 calls itself 3.11.0rc1."""
    monkeypatch.setattr("platform.python_version", lambda: "3.11.0rc1")
    monkeypatch.setattr("sys.version_info", (3, 11, 0, "candidate", 1))
    assert doctor.python().ok
    monkeypatch.setattr("sys.version_info", (3, 10, 12, "final", 0))
    assert not doctor.python().ok


def test_an_old_version_is_not_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\necho git version 2.17.1\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = check(load(), "git")
    assert (found.ok, found.found) == (False, "2.17.1")


def test_an_index_and_a_mirror_that_do_not_answer_are_named() -> None:
    settings = load().model_copy(
        update={"python_index": "http://user:hunter2@127.0.0.1:9/simple", "debian_mirror": "http://127.0.0.1:9/debian"}
    )
    found = check(settings, "python index")
    assert not found.ok
    assert found.found.startswith("http://127.0.0.1:9/simple: ")
    assert "hunter2" not in found.found
    assert "GRACEFARM_PYTHON_INDEX" in found.remedy
    found = check(settings, "debian mirror")
    assert not found.ok
    assert "GRACEFARM_DEBIAN_MIRROR" in found.remedy


def test_a_damaged_lock_is_found(farm: Farm) -> None:
    lock = farm.settings.project / "stacks" / "cu130" / "requirements.lock"
    lock.write_text(lock.read_text() + "six==1.0\n")
    found = check(farm.settings, "stack cu130")
    assert not found.ok
    assert "requirements.lock" in found.found
    assert check(farm.settings, "stack bare").ok


def test_a_small_disk_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DISK", 1 << 60)
    found = check(load().model_copy(update={"home": tmp_path / "not" / "there"}), "disk")
    assert not found.ok
    assert str(tmp_path) in found.found


def binfmt_recipe(farm: Farm) -> None:
    folder = farm.settings.project / "recipes" / "foreign"
    folder.mkdir()
    (folder / "recipe.toml").write_text(
        'name = "foreign"\nversion = "1.0"\nlicense = "MIT"\nstack = "bare"\n'
        f'[source]\nkind = "sdist"\nname = "foreign"\nversion = "1.0"\nsha256 = "{"0" * 64}"\n'
        '[build]\nbinfmt = true\n[smoke]\nimports = ["foreign"]\n'
    )


@needs_cross
def test_binfmt_matters_only_to_recipes_that_need_it(farm: Farm) -> None:
    before = check(farm.settings, "binfmt aarch64")
    assert before.ok
    assert "not required by any recipe" in before.found
    binfmt_recipe(farm)
    after = check(farm.settings, "binfmt aarch64")
    assert "required by foreign" in after.found
    assert after.ok == (binfmt.registration(Arch.AARCH64) is None)


IN_NAMESPACE = """
import subprocess, sys
from builder.box import sandbox
from builder.ground import root
from builder.planning import settings, stack
from builder.planning.stack import Arch
from builder.upkeep import doctor
loaded = settings.load()
one = stack.load(loaded.project / "stacks", "bare")
place = root.ensure(one, stack.host_arch(), Arch.AARCH64, loaded)
box = sandbox.Sandbox(root=place, mounts=(), environment={}, workdir="/", memory=0)
machine = "import platform; print(platform.machine())"
foreign = box.command(["/usr/libexec/gracefarm/python3.11-aarch64", "-c", machine])
before = subprocess.run(foreign, capture_output=True)
found = doctor.checks(loaded)
assert not {one.name: one.ok for one in found}["binfmt aarch64"]
doctor.fix([one for one in found if one.name.startswith("binfmt")], loaded)
assert {one.name: one.ok for one in doctor.checks(loaded)}["binfmt aarch64"]
after = subprocess.run(foreign, capture_output=True)
print(before.returncode != 0, after.stdout.decode().strip(), after.returncode)
"""


@needs_cross
def test_fix_registers_the_roots_qemu_for_programs_inside_the_sandbox(farm: Farm) -> None:
    """In a user namespace, which has its own binfmt_misc (Linux 6.7), so that this machine's stays as it is."""
    binfmt_recipe(farm)
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t binfmt_misc binfmt_misc {binfmt.FOLDER}"
    if subprocess.run([*alone, mount], capture_output=True, check=False).returncode:
        pytest.skip("this kernel has one binfmt_misc for all")
    command = [*alone, f'{mount} && exec "$@"', "sh", sys.executable, "-c", IN_NAMESPACE]
    done = subprocess.run(
        command, env={**os.environ, **farm.environment}, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "aarch64", "0"]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("enabled\ninterpreter /usr/bin/qemu-aarch64\nflags: F\noffset 0\n", None),
        ("enabled\ninterpreter /usr/bin/qemu-aarch64\nflags: OC\noffset 0\n", "without flag F"),
        ("disabled\ninterpreter /usr/bin/qemu-aarch64\nflags: F\noffset 0\n", "disabled"),
        ("", "not registered"),
    ],
)
def test_only_a_registration_that_works_in_a_sandbox_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, says: str | None
) -> None:
    monkeypatch.setattr(binfmt, "FOLDER", tmp_path)
    assert binfmt.registration(Arch.AARCH64) == "binfmt_misc is not mounted"
    (tmp_path / "register").touch()
    if state:
        (tmp_path / "qemu-aarch64").write_text(state)
    found = binfmt.registration(Arch.AARCH64)
    assert found is None if says is None else says in (found or "")


@needs_cross
def test_the_registration_is_debians_with_our_interpreter(shared_home: Path) -> None:
    one = stack.load(REPOSITORY / "stacks", "cu130")
    place = root.ensure(one, HOST, Arch.AARCH64, load())
    line = doctor.registration_line(place, Arch.AARCH64)
    assert line.startswith(r":qemu-aarch64:M::\x7f\x45\x4c\x46\x02\x01\x01")
    assert line.endswith(f":{place}/usr/bin/qemu-aarch64-static:F")
    assert len(line.split(":")) == 8


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An apt-get and a sudo that only write down what they were asked: a real one would change this machine."""
    log = tmp_path / "log"
    for name in ("apt-get", "sudo"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n[ ! -e {tmp_path}/fails ]\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return log


MISSING = HostCheck(name="system packages", ok=False, found="", packages=("bubblewrap", "git"))


def test_fix_installs_what_is_missing_as_root(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    doctor.fix([MISSING], load())
    assert recorded.read_text().splitlines() == [
        "apt-get update --quiet",
        "apt-get install --yes --no-install-recommends bubblewrap git",
    ]


def test_fix_uses_sudo_for_everybody_else(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    doctor.fix([MISSING], load())
    assert [line.split()[:3] for line in recorded.read_text().splitlines()] == [
        ["sudo", "apt-get", "update"],
        ["sudo", "env", "DEBIAN_FRONTEND=noninteractive"],
    ]


def test_fix_that_fails_says_the_command(recorded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "fails").touch()
    with pytest.raises(HostError, match="apt-get update --quiet failed with exit code 1") as caught:
        doctor.fix([MISSING], load())
    assert "as root: apt-get update" in caught.value.remedy


def test_fix_changes_nothing_where_nothing_is_missing(recorded: Path) -> None:
    doctor.fix([HostCheck(name="git", ok=True, found="2.39", packages=("git",))], load())
    assert not recorded.exists()


def test_the_command_ends_with_the_hosts_exit_code(monkeypatch: pytest.MonkeyPatch, farm: Farm) -> None:
    assert farm.run("doctor").code == 0
    lock = farm.settings.project / "stacks" / "cu130" / "requirements.lock"
    lock.write_text("six==1.0\n")
    done = farm.run("doctor", "--json")
    assert done.code == 4
    assert '"stack cu130"' in done.out
