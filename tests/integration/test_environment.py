"""Environments from a local index of tiny wheels: real uv, real root, real Python of the target."""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import http.server
import importlib.metadata
import json
import os
import stat
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder.box.sandbox import BindMount, Sandbox
from builder.ground import environment, resolve, root, wheels
from builder.ground.interpreters import catalogue
from builder.planning import pins, stack
from builder.planning.settings import Settings, load
from builder.planning.stack import Arch, LoadedStack
from gracefarm.errors import ConfigError, DigestError, FetchError, InstallError, RootError
from gracefarm.files import remove_tree

STACKS = Path(__file__).parent.parent.parent / "stacks"
CU130 = stack.load(STACKS, "cu130")
HOST = stack.host_arch()
TARGET = Arch.AARCH64


def make_wheel(
    folder: Path, name: str, version: str, files: dict[str, str], tag: str = "py3-none-any", scripts: str = ""
) -> Path:
    """A wheel with those files, its RECORD right."""
    info = f"{name}-{version}.dist-info"
    everything = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if scripts:
        everything[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    rows = []
    for path, text in everything.items():
        secure = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={secure},{len(text)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(place, "w") as archive:
        for path, text in everything.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return place


class Index:
    """A simple index of static files, served on loopback."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def add(self, wheel: Path) -> None:
        """Put a wheel and its digest on its project's page."""
        project = self.folder / wheel.name.split("-")[0].replace("_", "-")
        project.mkdir(parents=True, exist_ok=True)
        wheel.rename(project / wheel.name)
        links = [
            f'<a href="{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">{file.name}</a>'
            for file in sorted(project.glob("*.whl"))
        ]
        (project / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    folder = tmp_path / "simple"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Index(folder, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


@pytest.fixture
def own(shared_home: Path, index: Index) -> Iterator[Settings]:
    """A separate home that fetches wheels from the local index."""
    home = shared_home / "tests" / uuid.uuid4().hex[:12]
    home.mkdir(parents=True)
    yield load().model_copy(update={"home": home, "python_index": index.url})
    remove_tree(home)


@pytest.fixture(scope="session")
def base(shared_home: Path) -> Path:
    """The real root."""
    return root.ensure(CU130, HOST, TARGET, load().model_copy(update={"home": shared_home}))


def tiny_stack(folder: Path, *requirements: str, torch: bool = False, toolchain: tuple[str, ...] = ()) -> LoadedStack:
    """cu130 with other requirements; torch: with the gate on torch's build."""
    data = CU130.data.model_copy(
        update={
            "environment": CU130.data.environment.model_copy(update={"requirements": requirements, "resolved_before": None}),
            "toolchain": CU130.data.toolchain.model_copy(update={"requirements": toolchain}),
            "torch": CU130.data.torch if torch else None,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    return LoadedStack(folder=folder, data=data)


def locked(folder: Path, settings: Settings, *requirements: str, torch: bool = False) -> LoadedStack:
    """Such a stack, resolved from the local index."""
    loaded = tiny_stack(folder, *requirements, torch=torch)
    loaded.requirements_lock.write_text(resolve.requirements_lock(loaded, settings))
    return loaded


def torch_wheel(folder: Path, cuda: str | None) -> Path:
    """As torch's own version.py says it; the version number is the same for both."""
    text = f"from typing import Optional\n__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    return make_wheel(folder, "torch", "2.11.0", {"torch/__init__.py": "", "torch/version.py": text})


def made_folders(settings: Settings) -> list[Path]:
    return [path for path in (settings.home / "environments").glob("*") if path.is_dir() and path.name != "bytecode"]


# --- the lock ----------------------------------------------------------------------------------------------------------------


def test_the_lock_takes_the_best_wheel_that_the_glibc_floor_allows(own: Settings, index: Index, tmp_path: Path) -> None:
    for tag in (
        "cp311-cp311-manylinux_2_17_aarch64",
        "cp311-cp311-manylinux_2_28_aarch64",
        "cp311-cp311-manylinux_2_35_aarch64",
        "cp312-cp312-manylinux_2_28_aarch64",
        "cp311-cp311-manylinux_2_28_x86_64",
    ):
        index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": f"# {tag}\n"}, tag=tag))
    index.add(make_wheel(tmp_path, "pure", "1.0", {"pure.py": ""}))
    loaded = locked(tmp_path / "stack", own, "tiny", "pure")
    text = loaded.requirements_lock.read_text()
    assert "# tiny-1.0-cp311-cp311-manylinux_2_28_aarch64.whl\n" in text
    assert 'tiny==1.0 ; platform_machine == "aarch64" --hash=sha256:' in text
    assert "2_17" not in text
    assert "2_35" not in text
    assert "pure==1.0 --hash=sha256:" in text
    assert "127.0.0.1" not in text
    assert [wheel.name for wheel in pins.wheels(loaded, TARGET)] == ["pure", "tiny"]


def test_a_distribution_without_a_fitting_wheel_is_named(own: Settings, index: Index, tmp_path: Path) -> None:
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": ""}, tag="cp311-cp311-manylinux_2_28_x86_64"))
    with pytest.raises(ConfigError, match="tiny") as caught:
        locked(tmp_path / "stack", own, "tiny")
    assert "aarch64" in str(caught.value)


def free_threaded(loaded: LoadedStack) -> LoadedStack:
    """The stack for Python 3.13t, whose lock contains all requirements."""
    return replace(loaded, interpreter=catalogue.load(STACKS.parent / "interpreters", "3.13t"))


def test_the_lock_of_a_free_threaded_python_has_its_wheels(own: Settings, index: Index, tmp_path: Path) -> None:
    """The newest version has no such wheel, so an older version is locked; uv lists neither wheel of `tiny` 1.0."""
    for arch in Arch:
        for version, abis in (("0.9", ("cp313", "cp313t")), ("1.0", ("cp313", "cp313t")), ("2.0", ("cp313",))):
            for abi in abis:
                index.add(make_wheel(tmp_path, "tiny", version, {"tiny.py": abi}, tag=f"cp313-{abi}-manylinux_2_28_{arch}"))
    index.add(make_wheel(tmp_path, "pure", "1.0", {"pure.py": ""}))
    loaded = free_threaded(tiny_stack(tmp_path / "stack", "tiny", "pure"))
    text = resolve.requirements_lock(loaded, own)
    names = [line.removeprefix("# ") for line in text.splitlines() if line.endswith(".whl")]
    assert names == ["pure-1.0-py3-none-any.whl", *(f"tiny-1.0-cp313-cp313t-manylinux_2_28_{arch}.whl" for arch in Arch)]

    loaded.requirements_lock.write_text(text)
    wheels.install(pins.wheels(loaded, TARGET), environment.place_of(loaded, TARGET, tmp_path / "site"), "tiny", own)
    assert (tmp_path / "site" / "tiny.py").read_text() == "cp313t"

    built = make_wheel(tmp_path, "built", "1.0", {"built.py": ""}, tag=f"cp313-cp313t-manylinux_2_28_{TARGET}")
    wheels.install_file(built, environment.place_of(loaded, TARGET, tmp_path / "site"), InstallError)
    assert (tmp_path / "site" / "built.py").is_file()


def test_a_distribution_without_a_wheel_for_a_free_threaded_python_is_named(
    own: Settings, index: Index, tmp_path: Path
) -> None:
    for arch in Arch:
        index.add(make_wheel(tmp_path, "other", "1.0", {}, tag=f"cp313-cp313t-manylinux_2_28_{arch}"))
        for name in ("other", "tiny"):
            index.add(make_wheel(tmp_path, name, "2.0", {}, tag=f"cp313-cp313-manylinux_2_28_{arch}"))
            index.add(make_wheel(tmp_path, name, "1.0", {}, tag=f"cp313-cp313-manylinux_2_28_{arch}"))
    loaded = free_threaded(tiny_stack(tmp_path / "stack", "other", "tiny==2.0"))
    with pytest.raises(ConfigError, match=r"^tiny 2\.0 has no wheel for Python 3\.13t on aarch64, and no version"):
        resolve.requirements_lock(loaded, own)


def test_what_pip_and_uv_are_told_does_not_leak_in(
    own: Settings, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer version in a user's find-links or extra index is not seen."""
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": ""}))
    make_wheel(tmp_path / "links", "tiny", "2.0", {"tiny.py": ""})
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(tmp_path / "links"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{tmp_path / 'links'}")
    (tmp_path / "uv.toml").write_text(f'find-links = ["{tmp_path / "links"}"]\n')
    monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "uv.toml"))
    monkeypatch.chdir(tmp_path)
    assert "tiny==1.0 " in locked(tmp_path / "stack", own, "tiny").requirements_lock.read_text()


def test_pip_reads_the_committed_lock(tmp_path: Path) -> None:
    """pip itself, on lines of the lock with and without a marker; --require-hashes refuses a line without one."""
    lines = [
        line
        for line in CU130.requirements_lock.read_text().splitlines()
        if line.startswith(("packaging==", "markupsafe==", "pyproject-hooks=="))
    ]
    assert len(lines) == 4
    listing = tmp_path / "requirements.txt"
    listing.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--ignore-installed", f"--report={tmp_path / 'report.json'}", f"--requirement={listing}", "--quiet"]
    command += ["--python-version=3.11", f"--platform=manylinux_2_28_{HOST}", f"--target={tmp_path / 'target'}"]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    assert sorted(distribution["metadata"]["name"].lower().replace("_", "-") for distribution in found) == [
        "markupsafe",
        "packaging",
        "pyproject-hooks",
    ]


# --- assembling --------------------------------------------------------------------------------------------------------------


def test_torch_for_cpu_of_the_same_version_is_refused(own: Settings, index: Index, base: Path, tmp_path: Path) -> None:
    index.add(torch_wheel(tmp_path, None))
    loaded = locked(tmp_path / "stack", own, "torch==2.11.0", torch=True)
    with pytest.raises(
        RootError, match=r"torch 2\.11\.0 is built without CUDA, but the stack requires a torch for CUDA 13\.0"
    ):
        environment.ensure(loaded, TARGET, base, own)
    assert made_folders(own) == []


def test_torch_for_the_stacks_cuda_is_taken(own: Settings, index: Index, base: Path, tmp_path: Path) -> None:
    index.add(torch_wheel(tmp_path, "13.0"))
    loaded = locked(tmp_path / "stack", own, "torch==2.11.0", torch=True)
    made = environment.ensure(loaded, TARGET, base, own)
    assert made.name == pins.environment_digest(loaded, TARGET)
    assert environment.ensure(loaded, TARGET, base, own) == made


def test_a_wheel_with_other_bytes_is_refused(own: Settings, index: Index, base: Path, tmp_path: Path) -> None:
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": "ONE = 1\n"}))
    loaded = locked(tmp_path / "stack", own, "tiny")
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": "ONE = 2\n"}))
    remove_tree(own.home / "uv")
    with pytest.raises(DigestError, match="tiny"):
        environment.ensure(loaded, TARGET, base, own)
    assert made_folders(own) == []


def test_a_wheel_that_is_gone_is_named(own: Settings, index: Index, base: Path, tmp_path: Path) -> None:
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": ""}))
    loaded = locked(tmp_path / "stack", own, "tiny")
    remove_tree(index.folder / "tiny")
    remove_tree(own.home / "uv")
    with pytest.raises(FetchError, match="tiny") as caught:
        environment.ensure(loaded, TARGET, base, own)
    assert "GRACEFARM_PYTHON_INDEX" in caught.value.remedy


def test_no_password_of_the_index_is_said(own: Settings, tmp_path: Path) -> None:
    settings = own.model_copy(update={"python_index": "http://user:hunter2@127.0.0.1:9/simple"})
    with pytest.raises(FetchError) as caught:
        locked(tmp_path / "stack", settings, "tiny")
    assert "hunter2" not in caught.value.cause
    assert "127.0.0.1" in caught.value.cause


SOURCE = "import sys\n\n\ndef main() -> None:\n    print(sys.prefix, sys.executable, __file__, __cached__)\n"


@pytest.fixture
def made(own: Settings, index: Index, base: Path, tmp_path: Path) -> Path:
    """An environment with one distribution `tiny`, with a command."""
    files = {"tiny/__init__.py": SOURCE, "tiny/template.py": "this is { no } python\n"}
    index.add(make_wheel(tmp_path, "tiny", "1.0", files, scripts="tiny = tiny:main"))
    return environment.ensure(locked(tmp_path / "stack", own, "tiny"), TARGET, base, own)


def inside(base: Path, env: Path, *command: str) -> str:
    box = Sandbox(
        root=base,
        mounts=(BindMount(source=env, target="/env"),),
        environment={"PATH": "/env/bin:/usr/bin"},
        workdir="/",
        memory=0,
    )
    done = subprocess.run(box.command(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_a_virtual_environment_at_its_place_in_the_sandbox(made: Path, base: Path) -> None:
    site = "/env/lib/python3.11/site-packages/tiny"
    wanted = f"/env /env/bin/python3 {site}/__init__.py {site}/__pycache__/__init__.cpython-311.pyc"
    assert inside(base, made, "tiny") == wanted
    assert inside(base, made, "python3", "-c", "import tiny; tiny.main()") == wanted
    assert (made / "bin/tiny").read_text().startswith("#!/env/bin/python3\n")
    assert not (made / "lib/python3.11/site-packages/bin").exists()


def test_each_module_is_compiled_for_its_place(made: Path) -> None:
    folder = made / "lib/python3.11/site-packages/tiny/__pycache__"
    assert [path.name for path in folder.iterdir()] == ["__init__.cpython-311.pyc"]
    data = (folder / "__init__.cpython-311.pyc").read_bytes()
    # PEP 552: 1 is "by hash, unchecked".
    assert data[4:8] == b"\x01\x00\x00\x00"
    assert b"/env/lib/python3.11/site-packages/tiny/__init__.py" in data


def test_the_text_of_headers_does_not_depend_on_when_they_were_unpacked(
    own: Settings, index: Index, base: Path, tmp_path: Path
) -> None:
    """gcc reads only one of two equal headers with #pragma once, if their dates are in the same second."""
    names = [f"tiny/include/{number}/same.h" for number in range(4)]
    index.add(make_wheel(tmp_path, "tiny", "1.0", dict.fromkeys(names, "#pragma once\nextern int same;\n")))
    loaded = locked(tmp_path / "stack", own, "tiny")
    made = environment.ensure(loaded, TARGET, base, own)
    lines = "".join(f'#include \\"{name}\\"\\n' for name in names)
    script = f'printf "{lines}" | /opt/gracefarm/bin/{TARGET.triplet}-gcc -E -P -I /env/lib/python3.11/site-packages -x c -'
    assert inside(base, made, "sh", "-c", script).count("extern int same;") == len(names)
    other = environment.ensure(loaded, TARGET, base, own.model_copy(update={"home": own.home / "other"}))
    dates = [
        [(folder / "lib/python3.11/site-packages" / name).stat().st_mtime_ns for name in names] for folder in (made, other)
    ]
    assert dates[0] == dates[1]


def test_record_names_every_file_with_its_digest(made: Path) -> None:
    """pip uninstalls by it, and importlib.metadata reads it."""
    site = made / "lib/python3.11/site-packages"
    (record,) = site.glob("tiny-*.dist-info/RECORD")
    for path, digest, size in csv.reader(record.read_text().splitlines()):
        data = (site / path).read_bytes()
        if digest:
            secure = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (f"sha256={secure}", str(len(data))) == (digest, size), path
    files = importlib.metadata.Distribution.at(record.parent).files
    assert files is not None
    assert "../../../bin/tiny" in {str(path) for path in files}


def test_byte_code_is_made_once_per_wheel(own: Settings, made: Path, index: Index, base: Path, tmp_path: Path) -> None:
    """An environment with a wheel more shares the byte code of the wheels that it has in common."""
    index.add(make_wheel(tmp_path, "more", "1.0", {"more.py": "", "tiny/more.py": ""}))
    other = environment.ensure(locked(tmp_path / "other", own, "tiny", "more"), TARGET, base, own)
    name = "lib/python3.11/site-packages/tiny/__pycache__/__init__.cpython-311.pyc"
    assert other != made
    assert (other / name).samefile(made / name)
    assert (other / "lib/python3.11/site-packages/__pycache__/more.cpython-311.pyc").is_file()
    assert (other / "lib/python3.11/site-packages/tiny/__pycache__/more.cpython-311.pyc").is_file()


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file with its mode and digest."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_the_shared_environment_is_read_only(made: Path) -> None:
    assert not [name for name, (mode, _) in state(made).items() if mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)]


def test_a_fresh_environment_leaves_the_shared_one_untouched(own: Settings, made: Path, base: Path, tmp_path: Path) -> None:
    """Even by a wheel that replaces what is there: another version of tiny, with the same file names."""
    before = state(made)
    wheel = make_wheel(
        tmp_path,
        "tiny",
        "2.0",
        {"tiny/__init__.py": SOURCE + "\n\nmain2 = main\n"},
        scripts="tiny = tiny:main2\ntiny2 = tiny:main2",
    )
    into = environment.fresh(made, own.home / "fresh")
    environment.add(into, wheel, "2_34")
    site = "/env/lib/python3.11/site-packages/tiny"
    assert inside(base, into, "tiny2").startswith(f"/env /env/bin/python3 {site}/__init__.py")
    assert inside(base, into, "tiny") == inside(base, into, "tiny2")
    assert [path.name for path in (into / "lib/python3.11/site-packages").glob("*.dist-info")] == ["tiny-2.0.dist-info"]
    assert not (into / "lib/python3.11/site-packages/tiny/template.py").exists()
    assert state(made) == before
    assert "main2" not in inside(base, made, "python3", "-c", "import tiny; print(dir(tiny))")


def test_a_fresh_environment_without_a_wheel_is_the_same(own: Settings, made: Path) -> None:
    assert state(environment.fresh(made, own.home / "fresh")) == state(made)


@pytest.mark.parametrize(
    "tag", ["cp312-cp312-linux_aarch64", "cp311-cp311-linux_x86_64", "cp311-cp311-manylinux_2_99_aarch64"]
)
def test_a_wheel_for_another_python_or_machine_is_refused(own: Settings, made: Path, tmp_path: Path, tag: str) -> None:
    wheel = make_wheel(tmp_path, "other", "1.0", {"other.py": ""}, tag=tag)
    with pytest.raises(InstallError, match=r"other-1\.0.* is not for Python 3\.11 on aarch64"):
        environment.add(environment.fresh(made, own.home / "fresh"), wheel, "2_34")


def test_the_level_that_a_stack_allows_is_asked_of_the_wheel(own: Settings, made: Path, tmp_path: Path) -> None:
    """Stacks that differ only in it share an environment."""
    wheel = make_wheel(tmp_path, "other", "1.0", {"other.py": ""}, tag="cp311-cp311-manylinux_2_35_aarch64")
    into = environment.fresh(made, own.home / "fresh")
    with pytest.raises(InstallError, match=r"with glibc 2\.34"):
        environment.add(into, wheel, "2_34")
    environment.add(into, wheel, "2_35")
    assert (into / "lib/python3.11/site-packages/other.py").is_file()


ENSURE = """
import sys
from pathlib import Path
from builder.ground import environment
from builder.planning import settings, stack
from builder.planning.stack import Arch, LoadedStack
cu130 = stack.load(Path(sys.argv[1]), "cu130").data
data = cu130.model_copy(update={"torch": None, "toolchain": cu130.toolchain.model_copy(update={"requirements": ()}),
    "environment": cu130.environment.model_copy(update={"requirements": ("tiny",)})})
texts = []
environment.ensure(LoadedStack(folder=Path(sys.argv[2]), data=data), Arch("aarch64"), Path(sys.argv[3]), settings.load(),
                   lambda done, total, text: texts.append(text))
print(any("wheels" in text for text in texts))
"""


def test_of_two_that_ask_at_once_one_assembles(own: Settings, index: Index, base: Path, tmp_path: Path) -> None:
    index.add(make_wheel(tmp_path, "tiny", "1.0", {"tiny.py": ""}))
    loaded = locked(tmp_path / "stack", own, "tiny")
    variables = {**os.environ, "GRACEFARM_HOME": str(own.home), "GRACEFARM_PYTHON_INDEX": index.url}
    command = [sys.executable, "-c", ENSURE, STACKS, loaded.folder, base]
    both = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=120)[0].strip() for process in both) == ["False", "True"]
    assert [process.returncode for process in both] == [0, 0]
    assert len(made_folders(own)) == 1


@pytest.mark.slow
def test_the_stacks_toolchain_is_the_hosts_compiler(shared_home: Path) -> None:
    settings = load().model_copy(update={"home": shared_home})
    made = environment.ensure_toolchain(CU130, HOST, settings)
    said = subprocess.run([made / "nvidia/cu13/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert "release 13.0, V13.0.88" in said


def test_a_toolchain_without_a_compiler_is_refused(own: Settings, index: Index, tmp_path: Path) -> None:
    index.add(make_wheel(tmp_path, "nvidia_cuda_nvcc", "13.0", {"nvidia/cu13/bin/ptxas": ""}))
    loaded = tiny_stack(tmp_path / "stack", toolchain=("nvidia-cuda-nvcc",))
    loaded.requirements_lock.write_text(resolve.requirements_lock(loaded, own))
    with pytest.raises(RootError, match="contain no nvcc"):
        environment.ensure_toolchain(loaded, HOST, own)
    with pytest.raises(ConfigError, match="has no CUDA compiler"):
        environment.ensure_toolchain(tiny_stack(tmp_path / "stack"), HOST, own)
