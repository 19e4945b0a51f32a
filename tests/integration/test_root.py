"""The real root: what a build sees in it, and what happens when its assembly goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.box.sandbox import BindMount, Sandbox
from builder.ground import bytecode, resolve, root
from builder.planning import packages, stack
from builder.planning.packages import Deb
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch, LoadedStack
from gracefarm import tables
from gracefarm.errors import DigestError, FetchError, RootError
from gracefarm.files import remove_tree, sha256_file

STACKS = Path(__file__).parent.parent.parent / "stacks"
CU130 = stack.load(STACKS, "cu130")
HOST = stack.host_arch()
TARGETS = CU130.root.hosts[HOST]
PATH = "/opt/gracefarm/bin:/usr/bin:/bin"


@pytest.fixture(scope="session", params=TARGETS)
def made(request: pytest.FixtureRequest, shared_home: Path) -> tuple[Arch, Path]:
    """The target and its root, in the caches of this machine."""
    target: Arch = request.param
    settings = load().model_copy(update={"home": shared_home})
    return target, root.ensure(CU130, HOST, target, settings)


@pytest.fixture
def own(shared_home: Path) -> Iterator[Settings]:
    """A home without roots, on the file system of the shared store."""
    home = shared_home / "tests" / uuid.uuid4().hex[:12]
    home.mkdir(parents=True)
    (home / "store").symlink_to(shared_home / "store")
    yield load().model_copy(update={"home": home})
    remove_tree(home)


def inside(folder: Path, *command: str, mounts: tuple[BindMount, ...] = ()) -> str:
    """What a command prints in a sandbox over that root."""
    box = Sandbox(root=folder, mounts=mounts, environment={"PATH": PATH, "LC_ALL": "C.UTF-8"}, workdir="/", memory=0)
    done = subprocess.run(box.command(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- what a build sees -------------------------------------------------------------------------------------------------------


def test_python_is_the_targets_own_without_binfmt(made: tuple[Arch, Path], tmp_path: Path) -> None:
    """Machine, tags, paths: of the target; in a virtual environment, in a child and by a script's first line."""
    target, folder = made
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to("/usr/bin/python3.11")
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11\n")
    facts = (
        "import json, platform, sys, sysconfig; json.dump([platform.machine(), sys.executable, sys.prefix, sys.base_prefix, "
        "sysconfig.get_config_var('EXT_SUFFIX'), sysconfig.get_platform(), sys.argv[1:]], sys.stdout)"
    )
    script = tmp_path / "bin" / "script"
    script.write_text(f"#!/env/bin/python3\n{facts}\n")
    script.chmod(0o755)
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {facts!r}, *sys.argv[1:]], check=True)"
    venv = (BindMount(source=tmp_path, target="/env"),)
    wanted = ["/env/bin/python3", "/env", "/usr", f".cpython-311-{target.triplet}.so", f"linux-{target}"]
    for command in (["/env/bin/python3", "-c", facts], ["/env/bin/python3", "-c", child], ["/env/bin/script"]):
        found = json.loads(inside(folder, *command, "a b", "", "-c", mounts=venv))
        assert found == [target.value, *wanted, ["a b", "", "-c"]], command
    assert json.loads(inside(folder, "python3", "-c", facts))[1] == "/usr/bin/python3"


def test_uname_and_arch_agree_with_python(made: tuple[Arch, Path]) -> None:
    target, folder = made
    assert inside(folder, "uname", "-m") == inside(folder, "arch") == inside(folder, "/usr/bin/uname", "-m") == target
    every = inside(folder, "uname", "-a")
    assert target in every
    assert target is HOST or HOST.value not in every
    assert inside(folder, "uname", "-s") == "Linux"
    box = Sandbox(root=folder, mounts=(), environment={"PATH": PATH}, workdir="/", memory=0)
    assert subprocess.run(box.command(["uname", "--nonsense"]), capture_output=True, check=False).returncode == 1


def test_plain_compilers_compile_for_the_target(made: tuple[Arch, Path], tmp_path: Path) -> None:
    """cc, g++ and ld by their plain names and with the target's prefix; what they make finds its libraries and runs."""
    target, folder = made
    (tmp_path / "a.c").write_text("#include <Python.h>\n#include <zlib.h>\nint main(void) { return zlibVersion() == 0; }\n")
    (tmp_path / "b.cpp").write_text("#include <iostream>\nint main() {\n#pragma omp parallel\nstd::cout << 'x'; return 0; }\n")
    work = (BindMount(source=tmp_path, target="/build", writable=True),)
    for compiler in ("cc", "gcc", f"{target.triplet}-gcc"):
        inside(folder, compiler, "-I/usr/include/python3.11", "/build/a.c", "-lz", "-o", "/build/a", mounts=work)
    for compiler in ("c++", "g++", f"{target.triplet}-g++"):
        inside(folder, compiler, "-fopenmp", "/build/b.cpp", "-o", "/build/b", mounts=work)
    machine = {Arch.AARCH64: "ARM aarch64", Arch.X86_64: "x86-64"}[target]
    for name in ("a", "b"):
        assert machine in inside(folder, "file", f"/build/{name}", mounts=work)
        emulator = [] if target is HOST else [f"/usr/bin/qemu-{target}-static"]
        inside(folder, *emulator, f"/build/{name}", mounts=work)
    for tool in ("ld", "ar", "strip", "nm", "objcopy"):
        assert inside(folder, "which", tool).startswith("/opt/gracefarm/bin/")
    inside(folder, "strip", "/build/a", mounts=work)


def test_tools_of_a_build_are_native(made: tuple[Arch, Path]) -> None:
    """What runs for hours is the host's own program."""
    target, folder = made
    machine = {Arch.AARCH64: "ARM aarch64", Arch.X86_64: "x86-64"}[HOST]
    for tool in ("bash", "cmake", "git", "gcc", "ld", "make", "ninja", "perl", "sed", "tar"):
        assert machine in inside(folder, "file", "-L", inside(folder, "which", tool)), tool
    assert machine in inside(folder, "file", "-L", bytecode.NATIVE_PYTHON)
    native = inside(folder, bytecode.NATIVE_PYTHON, "-c", "import platform, sys; print(platform.machine(), sys.prefix)")
    assert native == f"{HOST} /usr"
    assert inside(folder, "awk", "BEGIN { print 6 * 7 }") == "42"
    libraries = inside(folder, "pkg-config", "--variable=libdir", "zlib")
    assert target.triplet in libraries


def test_the_standard_library_is_whole_and_compiled(made: tuple[Arch, Path]) -> None:
    _, folder = made
    inside(folder, "python3", "-W", "ignore", "-c", "import ctypes, distutils.core, lib2to3, lzma, sqlite3, ssl, zlib")
    library = folder / "usr/lib/python3.11"
    compiled = library / "json/__pycache__/decoder.cpython-311.pyc"
    # PEP 552: 1 is "by hash, unchecked"; a date would go stale with each copy.
    assert compiled.read_bytes()[4:8] == b"\x01\x00\x00\x00"
    assert b"/usr/lib/python3.11/json/decoder.py" in compiled.read_bytes()
    assert len(list(library.glob("*.py"))) == len(list((library / "__pycache__").glob("*.pyc")))


def test_nothing_in_the_root_gives_rights(made: tuple[Arch, Path]) -> None:
    _, folder = made
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(Path(parent, name)).st_mode
            assert mode & 0o170000 in (0o100000, 0o040000, 0o120000), (parent, name)
            assert mode & 0o170000 == 0o040000 or not mode & 0o6000, (parent, name)


def test_no_maintainer_script_ran(made: tuple[Arch, Path]) -> None:
    """Each package's postinst would have left one of these."""
    _, folder = made
    for name in ("etc/ld.so.cache", "var/lib/dpkg/status", "etc/alternatives/awk", "var/cache/ldconfig/aux-cache"):
        assert not (folder / name).exists(), name


# --- when it goes wrong ------------------------------------------------------------------------------------------------------


def tiny_stack(folder: Path, archive: Path, settings: Settings) -> tuple[LoadedStack, Settings, Deb]:
    """cu130 with a root of one small package that we make, in a mirror that is a folder."""
    content = folder / "deb"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@host.example>\nDescription: nothing\n"
    )
    (content / "DEBIAN/postinst").write_text("#!/bin/sh\ntouch /ran\n")
    (content / "DEBIAN/postinst").chmod(0o755)
    (content / "usr/share").mkdir(parents=True)
    # Other bytes for each test: the store is shared.
    (content / "usr/share/tiny").write_text(str(folder))
    place = archive / "pool/tiny_1.0_all.deb"
    place.parent.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", content, place], check=True, capture_output=True)
    one = Deb(
        name="tiny",
        arch="all",
        version="1.0",
        sha256=sha256_file(place),
        size=place.stat().st_size,
        path="pool/tiny_1.0_all.deb",
    )
    target = folder / "stacks" / "tiny"
    target.mkdir(parents=True)
    data = CU130.data.model_copy(
        update={
            "root": CU130.root.model_copy(
                update={"host": (), "target": (), "native": (), "cross": (), "alone": ("tiny",), "hosts": {HOST: (HOST,)}}
            )
        }
    )
    fields = ", ".join(f"{name} = {json.dumps(value)}" for name, value in one.model_dump().items())
    (target / "root.lock").write_text(f'suite = "tiny"\n[roots.{HOST}-{HOST}]\npackages = [{{ {fields} }}]\n')
    tables.read(target / "root.lock", packages.RootLock)
    return LoadedStack(folder=target, data=data), settings.model_copy(update={"debian_mirror": f"file://{archive}"}), one


def test_a_package_with_other_bytes_is_refused(own: Settings, tmp_path: Path) -> None:
    loaded, settings, one = tiny_stack(tmp_path, tmp_path / "archive", own)
    place = tmp_path / "archive" / one.path
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    with pytest.raises(DigestError, match=one.sha256):
        root.ensure(loaded, HOST, HOST, settings)
    assert not [path for path in (own.home / "roots").glob("*") if path.is_dir()]


def test_a_package_that_left_the_mirror_names_the_ways_out(own: Settings, tmp_path: Path) -> None:
    loaded, settings, one = tiny_stack(tmp_path, tmp_path / "archive", own)
    (tmp_path / "archive" / one.path).unlink()
    with pytest.raises(FetchError, match=r"tiny:all 1\.0") as caught:
        root.ensure(loaded, HOST, HOST, settings)
    assert "snapshot" in caught.value.remedy
    assert "builder lock cu130" in caught.value.remedy
    assert "GRACEFARM_DEBIAN_MIRROR" in caught.value.remedy


def test_a_package_that_is_none_is_named(own: Settings, tmp_path: Path) -> None:
    loaded, settings, one = tiny_stack(tmp_path, tmp_path / "archive", own)
    place = tmp_path / "archive" / one.path
    place.write_bytes(f"no package: {tmp_path}".encode())
    lock = loaded.root_lock
    lock.write_text(lock.read_text().replace(one.sha256, sha256_file(place)))
    with pytest.raises(RootError, match=r"tiny:all 1\.0 cannot be unpacked"):
        root.ensure(loaded, HOST, HOST, settings)
    assert not [path for path in (own.home / "roots").glob("*") if path.is_dir()]


def test_a_root_without_the_stacks_compiler_is_refused_and_leaves_nothing(own: Settings, tmp_path: Path) -> None:
    loaded, settings, _ = tiny_stack(tmp_path, tmp_path / "archive", own)
    with pytest.raises(RootError, match=f"no /usr/bin/{HOST.triplet}-gcc-12"):
        root.ensure(loaded, HOST, HOST, settings)
    assert not [path for path in (own.home / "roots").glob("*") if path.is_dir()]


ASSEMBLE = """
import sys
from pathlib import Path
from builder.ground import root
from builder.planning import settings, stack
from builder.planning.stack import Arch
texts = []
made = root.ensure(stack.load(Path(sys.argv[1]), "cu130"), Arch(sys.argv[2]), Arch(sys.argv[3]), settings.load(),
                   lambda done, total, text: texts.append(text))
print(made, "packages unpacked" in texts)
"""


def test_killed_and_concurrent_assemblies_leave_one_whole_root(own: Settings, shared_home: Path) -> None:
    """Three ask at once; the one that assembles is killed half-way; another goes on, the third takes what that one made."""
    target = TARGETS[0]
    whole = root.ensure(CU130, HOST, target, load().model_copy(update={"home": shared_home}))
    command = [sys.executable, "-c", ASSEMBLE, str(STACKS), HOST, target]
    environment = {**os.environ, "GRACEFARM_HOME": str(own.home)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = own.home / "roots" / f".{whole.name}.partial"
    try:
        while not (partial / "usr/bin").is_dir() or len(list((partial / "usr/bin").iterdir())) < 50:
            assert first.poll() is None
            time.sleep(0.02)
        others = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        time.sleep(0.5)
        assert not (own.home / "roots" / whole.name).exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    said = [process.communicate(timeout=300)[0].split() for process in others]
    assert [process.returncode for process in others] == [0, 0]
    assert {place for place, _ in said} == {str(own.home / "roots" / whole.name)}
    assert sorted(assembled for _, assembled in said) == ["False", "True"]
    assert not partial.exists()
    assert listing(own.home / "roots" / whole.name) == listing(whole)


ORPHAN = """
import subprocess, sys, time
from gracefarm.process import die_with_us
one = subprocess.Popen(die_with_us(["sleep", "300"]))
print(one.pid, flush=True)
time.sleep(300)
"""


def test_what_we_start_dies_with_us() -> None:
    """A killed builder leaves no tar that still writes where the next one has started again."""
    builder = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    pid = int(builder.stdout.readline())
    while Path(f"/proc/{pid}/comm").read_text().strip() != "sleep":
        time.sleep(0.02)
    builder.kill()
    builder.wait()
    builder.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    survived = alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    assert not survived


def alive(pid: int) -> bool:
    """It runs: neither gone nor waiting to be reaped by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listing(folder: Path) -> dict[str, tuple[int, int | str]]:
    """Every path with its mode, and its size or where it leads."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            str(path.readlink()) if path.is_symlink() else path.stat().st_size if path.is_file() else 0,
        )
        for path in folder.rglob("*")
    }


@pytest.mark.slow
def test_a_new_lock_is_whole(own: Settings, tmp_path: Path) -> None:
    """apt's answer of today, with the suite's own signature checked, makes a lock that fits stack.toml."""
    target = tmp_path / "cu130"
    target.mkdir()
    loaded = LoadedStack(folder=target, data=CU130.data)
    loaded.root_lock.write_text(resolve.root_lock(loaded, own))
    for host, targets in CU130.root.hosts.items():
        for arch in targets:
            names = {deb.name for deb in packages.of_root(loaded, host, arch)}
            # Not named anywhere: apt found it.
            assert {"libc6", "libpython3.11-stdlib", "binutils-common"} <= names
