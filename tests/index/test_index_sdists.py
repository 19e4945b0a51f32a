"""Sdists that break a project, or only seem to; with real builds by pip and uv, from imports and mirrors."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from careless_kit import careless_index, install, installed
from index_kit import Server, run_index, run_json, sdist, serving, wheel
from test_index_installers import mirror

PYPROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(pathlib.Path(folder) / "NAME-1.1-py3-none-any.whl", "w") as archive:
        archive.writestr("NAME-1.1.dist-info/METADATA", METADATA)
        archive.writestr("NAME-1.1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("NAME-1.1.dist-info/RECORD", "")
    return "NAME-1.1-py3-none-any.whl"
"""
HEAD = "Metadata-Version: {version}\nName: {name}\nVersion: 1.1\n"


def source(
    name: str, lines: bytes = b"\n", *, version: str = "2.1", copies: bool = False, extra: dict[str, bytes] | None = None
) -> tuple[str, bytes]:
    """An sdist 1.1 that builds without the network. Its backend writes valid metadata, or copies PKG-INFO."""
    head = HEAD.format(version=version, name=name)
    text = 'pathlib.Path("PKG-INFO").read_bytes()' if copies else repr(HEAD.format(version="2.1", name=name) + "\n")
    members = {
        f"{name}-1.1/pyproject.toml": PYPROJECT,
        f"{name}-1.1/backend.py": BACKEND.replace("NAME", name).replace("METADATA)", f"{text})").encode(),
        **(extra or {}),
    }
    return sdist(name, "1.1", meta=head.encode() + lines, extra=members)


def as_zip(name: str, members: dict[str, bytes]) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in members.items():
            archive.writestr(path, content)
    return f"{name}-1.1.zip", buffer.getvalue()


ADDRESS = b"Requires-Dist: libdep @ https://example.invalid/libdep-1.0-py3-none-any.whl\n\n"
FATAL = {
    "path": (source("src_path", extra={"../evil.py": b"x"}), "outside its folder"),
    "address": (source("src_address", ADDRESS, copies=True), "contains a URL"),
    "digits": (source("src_digits", b"Requires-Python: >=" + b"9" * 5000 + b"\n\n", version="2.2"), "longer than 4000"),
    "project": (sdist("src_project", "1.1", without="pyproject.toml"), "neither pyproject.toml nor setup.py"),
}
FAILS = {"digits": ("uv",)}
MARKED = {
    "latin": (source("src_latin", b"Author: Zo\xeb\n\n"), "PKG-INFO is not UTF-8"),
    "newer": (source("src_newer", version="9.9"), "'9.9' is not a valid metadata version"),
}


QUICK = ("path", "address")


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in FATAL])
@pytest.mark.parametrize("how", ["import", "mirror"])
def test_an_sdist_that_breaks_its_project_is_refused_and_clients_install_the_older_release(
    tmp_path: Path, key: str, how: str
) -> None:
    bad, words = FATAL[key]
    name = f"src_{key}"
    good = wheel(name)
    with (
        careless_index(tmp_path / "careless", [good, bad]) as careless,
        serving(tmp_path / "root", "--allow-new") as server,
    ):
        address = f"{server.url}/simple/"
        if how == "import":
            for tool in FAILS.get(key, ("pip", "uv")):
                process = install(tool, careless, tmp_path / "careless-target", name)
                assert process.returncode != 0, f"{tool} no longer fails on {key}"
            packages = tmp_path / "packages"
            packages.mkdir()
            for filename, content in (good, bad):
                (packages / filename).write_bytes(content)
            process = run_index(server.root, "import", str(packages), check=False)
            assert words in process.stdout
            assert f"{bad[0]}: " in process.stdout
        else:
            assert words in mirror(server, tmp_path, "spring", careless, bad)
            assert mirror(server, tmp_path, "spring", careless, good) == ""
            run_index(server.root, "stage", "publish", "spring")
            address = f"{server.url}/spring/simple/"
        for tool in ("pip", "uv"):
            process = install(tool, address, tmp_path / tool, name)
            assert process.returncode == 0, process.stderr
            assert installed(tmp_path / tool) == [f"{name}-1.0.dist-info"]


def test_clients_build_the_sdists_that_an_import_or_a_mirror_marks(shared: Server, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for (filename, content), _ in MARKED.values():
        (packages / filename).write_bytes(content)
    files = [file for file, _ in MARKED.values()]
    with careless_index(tmp_path / "careless", files) as careless:
        assert mirror(shared, tmp_path, "marked-sources", careless, *files) == ""
    run_index(shared.root, "stage", "publish", "marked-sources")
    assert run_json(shared.root, "import", str(packages)) == {"created": 2, "same": 0, "refused": []}
    for prefix in ("", "/marked-sources"):
        for key, (_, words) in MARKED.items():
            assert words in shared.page(f"src-{key}", prefix=prefix).json()["files"][0]["_defects"][0]
        for tool in ("pip", "uv"):
            target = tmp_path / f"{tool}{len(prefix)}"
            process = install(tool, f"{shared.url}{prefix}/simple/", target, *(f"src-{key}" for key in MARKED))
            assert process.returncode == 0, process.stderr
            assert installed(target) == [f"src_{key}-1.1.dist-info" for key in MARKED]


PKG = {"zipped-1.1/PKG-INFO": HEAD.format(version="1.0", name="zipped").encode() + b"\n", "zipped-1.1/setup.py": b""}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (PKG | {"zipped-1.1/../../evil.py": b"x"}, "not a plain relative path"),
        (PKG | {"other/x.py": b"x"}, "outside its folder zipped-1.1/"),
        ({"zipped-1.1/setup.py": b""}, "lacks zipped-1.1/PKG-INFO"),
        ({"zipped-1.1/PKG-INFO": PKG["zipped-1.1/PKG-INFO"]}, "neither pyproject.toml nor setup.py"),
        (PKG | {"zipped-1.1/PKG-INFO": PKG["zipped-1.1/PKG-INFO"][:-1] + ADDRESS}, "contains a URL"),
        (PKG, ""),
    ],
)
def test_a_mirrored_zip_is_checked_like_any_sdist(
    shared: Server, tmp_path: Path, members: dict[str, bytes], words: str
) -> None:
    file = as_zip("zipped", members)
    with careless_index(tmp_path / "careless", [file]) as careless:
        for link in (False, True):
            said = mirror(shared, tmp_path, f"zip-{len(words)}{'-link' if link else ''}", careless, file, link=link)
            assert words in said
            assert bool(said) == bool(words)
