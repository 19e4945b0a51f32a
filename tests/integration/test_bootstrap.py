"""./bootstrap on machines that this one is not: apt, dpkg, sudo and bwrap are stand-ins, as strict as Ubuntu's own.

The virtual environment is a real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
LISTS = ("system-packages.txt", "system-packages-rehearse.txt", "system-packages-test.txt")

STAND_INS = {
    "dpkg": "echo amd64",
    # dpkg-query -W -f FORMAT PACKAGE
    "dpkg-query": 'grep -qx "$4" "$STATE/installed" && printf installed',
    "apt-cache": """
[ -e "$STATE/updated" ] && grep -qx "$2" "$STATE/archive" && printf '%s:\\n  Installed: (none)\\n  Candidate: 1.0\\n' "$2"
true""",
    "apt-get": """
echo "apt-get $* DEBIAN_FRONTEND=${DEBIAN_FRONTEND-}" >>"$STATE/log"
if [ "$1" = update ]; then : >"$STATE/updated"; exit; fi
shift
for one; do case $one in -*) ;; *)
    grep -qx "$one" "$STATE/archive" || { echo "E: Package '$one' has no installation candidate" >&2; exit 100; }
    echo "$one" >>"$STATE/installed";; esac
done""",
    # With env_reset, as every distribution configures it: variables before the command are lost.
    "sudo": '[ "$1" = -n ] && shift\nexec env -i PATH="$PATH" STATE="$STATE" "$@"',
    "id": "echo 1000",
    "bwrap": '[ ! -e "$STATE/forbidden" ]',
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A checkout on a machine made of stand-ins."""

    folder: Path
    state: Path

    def bootstrap(self) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "STATE": str(self.state)}
        environment.pop("DEBIAN_FRONTEND", None)
        return subprocess.run(
            [self.folder / "bootstrap", "test"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def log(self) -> list[str]:
        return (self.state / "log").read_text().splitlines()

    def set_up(self) -> None:
        """A finished virtual environment, whose Python only writes down what it is asked to run."""
        program = self.folder / ".venv" / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\necho "python $*" >>"$STATE/log"\n[ -e "$STATE/mendable" ] && rm "$STATE/forbidden"\n')
        program.chmod(0o755)
        (self.folder / ".venv" / ".gracefarm").touch()


def packages(*names: str) -> set[str]:
    texts = [(REPOSITORY / "builder" / "data" / name).read_text() for name in names]
    return {word for text in texts for line in text.splitlines() if (word := line.partition("#")[0].strip())}


@pytest.fixture
def ubuntu(tmp_path: Path) -> Machine:
    """Nothing installed; an archive with everything but chromium, which is a snap there. sudo asks for no password."""
    folder, state = tmp_path / "checkout", tmp_path / "state"
    (folder / "builder" / "data").mkdir(parents=True)
    for name in LISTS:
        shutil.copy(REPOSITORY / "builder" / "data" / name, folder / "builder" / "data")
    shutil.copy(REPOSITORY / "bootstrap", folder)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "1"\noptional-dependencies = { dev = [] }\n[tool.setuptools]\npy-modules = []\n'
    )
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "python3").symlink_to(sys.executable)
    state.mkdir()
    (state / "installed").touch()
    (state / "log").touch()
    (state / "archive").write_text("".join(f"{name}\n" for name in sorted(packages(*LISTS) - {"chromium"})))
    return Machine(folder=folder, state=state)


def test_what_ubuntus_archive_lacks_is_left_out_and_no_dialog_is_shown(ubuntu: Machine) -> None:
    ubuntu.set_up()
    done = ubuntu.bootstrap()
    assert done.returncode == 0, done.stderr
    update, install = ubuntu.log()
    assert update.startswith("apt-get update")
    assert packages(*LISTS) - {"chromium"} <= set(install.split())
    assert "chromium" not in install
    assert install.endswith("DEBIAN_FRONTEND=noninteractive")
    assert ubuntu.bootstrap().returncode == 0
    assert len(ubuntu.log()) == 2, "the second time nothing is missing"


def test_where_the_archive_has_the_optional_package_it_is_installed(ubuntu: Machine) -> None:
    ubuntu.set_up()
    with (ubuntu.state / "archive").open("a") as archive:
        archive.write("chromium\n")
    assert ubuntu.bootstrap().returncode == 0
    assert "chromium" in ubuntu.log()[-1]


def test_without_root_and_sudo_it_stops_with_the_list(ubuntu: Machine) -> None:
    ubuntu.set_up()
    (ubuntu.folder / "bin" / "sudo").write_text("#!/bin/sh\nexit 1\n")
    done = ubuntu.bootstrap()
    assert done.returncode == 4
    assert "bubblewrap" in done.stderr
    assert ubuntu.log() == []


@pytest.mark.parametrize("mendable", [True, False])
def test_forbidden_user_namespaces_are_allowed_before_anything_is_downloaded(ubuntu: Machine, mendable: bool) -> None:
    """bubblewrap fails as under Ubuntu 24.04's AppArmor; what doctor does then has its own tests."""
    ubuntu.set_up()
    (ubuntu.state / "forbidden").touch()
    if mendable:
        (ubuntu.state / "mendable").touch()
    done = ubuntu.bootstrap()
    assert ubuntu.log()[-1] == "python -m builder doctor --fix"
    assert done.returncode == (0 if mendable else 4)


def test_a_virtual_environment_of_a_killed_run_is_made_anew(ubuntu: Machine) -> None:
    """venv copies Python first and installs pip last."""
    (ubuntu.state / "installed").write_text("".join(f"{name}\n" for name in packages(*LISTS)))
    python = ubuntu.folder / ".venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ubuntu.folder / ".venv"], check=True)
    done = ubuntu.bootstrap()
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([python, "-m", "pip", "--version"], check=False, capture_output=True).returncode == 0
    assert (ubuntu.folder / ".venv" / ".gracefarm").is_file()
