"""`index import`: files published elsewhere are accepted as they are and keep their names."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from index_kit import Server, run_index, run_json, sdist, wheel
from test_index_clients import UV, call

import index.intake.sdist
from index.errors import RefusedError
from index.intake.defects import Defects
from index.names import parse_filename

# File names on PyPI from before normalisation, or by backends that do not normalise.
NAMES = ("PyYAML", "MarkupSafe", "Jinja2", "SQLAlchemy", "Flask", "jaraco.text", "zope.interface", "backports_abc")


def renamed(name: str) -> tuple[str, bytes]:
    """A wheel with this spelling in its file name and .dist-info."""
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: 6.0\n\n".encode()
    return wheel(name, "6.0", meta=meta, files={f"{name.lower().replace('.', '_')}.py": b"x = 1\n"})


def test_names_that_are_not_canonical_are_imported_and_installed(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    files = dict(renamed(name) for name in NAMES)
    for filename, content in files.items():
        (folder / filename).write_bytes(content)
    assert run_json(server.root, "import", str(folder)) == {"created": len(NAMES), "same": 0, "refused": []}
    assert run_json(server.root, "import", str(folder)) == {"created": 0, "same": len(NAMES), "refused": []}
    projects = [name.lower().replace(".", "-").replace("_", "-") for name in NAMES]
    assert [server.filenames(project) for project in projects] == [[filename] for filename in files]
    index = server.url + "/simple/"
    call([*UV, "pip", "install", "--no-cache", "--python", sys.executable, "--target", tmp_path / "uv",
          "--default-index", index, *projects])  # fmt: skip
    call(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-cache-dir",
            "--target",
            tmp_path / "pip",
            "--index-url",
            index,
            *projects,
        ]
    )
    assert (tmp_path / "uv" / "jaraco_text.py").is_file()
    assert (tmp_path / "pip" / "jaraco_text.py").is_file()


def test_one_file_has_one_spelling_whoever_brings_the_second(server: Server, tmp_path: Path) -> None:
    """Else an installer could select either of two files for evil-pkg 1.0."""
    (tmp_path / "first").mkdir()
    filename, content = wheel("Evil.Pkg")
    (tmp_path / "first" / filename).write_bytes(content)
    run_index(server.root, "import", str(tmp_path / "first"))
    answer = server.upload(*wheel("evil_pkg"))
    assert answer.status_code == 400
    assert "File already exists: evil_pkg-1.0-py3-none-any.whl is stored as Evil.Pkg-1.0-py3-none-any.whl" in answer.text
    (tmp_path / "second").mkdir()
    filename, content = wheel("evil.pkg")
    (tmp_path / "second" / filename).write_bytes(content)
    process = run_index(server.root, "import", str(tmp_path / "second"), check=False)
    assert "evil.pkg-1.0-py3-none-any.whl" in process.stdout
    assert "is stored as Evil.Pkg" in process.stdout
    assert server.filenames("evil-pkg") == ["Evil.Pkg-1.0-py3-none-any.whl"]
    assert server.upload(*wheel("evil_pkg", "1.1")).status_code == 200, "a new release requires a canonical name"


def test_an_sdist_keeps_its_name_and_the_spelling_of_its_folder(shared: Server, tmp_path: Path) -> None:
    for filename, (_, content) in {"Old.Pkg-1.0.tar.gz": sdist("old_pkg"), "older_pkg-1.0.tar.gz": sdist("Older.Pkg")}.items():
        (tmp_path / filename).write_bytes(content)
    assert run_json(shared.root, "import", str(tmp_path)) == {"created": 2, "same": 0, "refused": []}
    (tmp_path / "strange_pkg-1.0.tar.gz").write_bytes(sdist("other_pkg")[1])
    process = run_index(shared.root, "import", str(tmp_path), check=False)
    assert "strange_pkg-1.0.tar.gz" in process.stdout
    assert "outside its folder" in process.stdout


@pytest.mark.slow
def test_a_pypiserver_folder_of_43_ordinary_wheels(server: Server, tmp_path: Path) -> None:
    """Real wheels from the configured Python index, with twelve that were once refused for their names."""
    folder = tmp_path / "packages"
    call(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            *ORDINARY,
        ]
    )
    assert len(list(folder.iterdir())) == len(ORDINARY) == 43
    assert run_json(server.root, "import", str(folder)) == {"created": 43, "same": 0, "refused": []}
    call([*UV, "pip", "install", "--no-cache", "--python", sys.executable, "--target", tmp_path / "uv",
          "--default-index", server.url + "/simple/", "Flask", "PyYAML", "SQLAlchemy"])  # fmt: skip
    assert (tmp_path / "uv" / "flask" / "__init__.py").is_file()


ORDINARY = (
    *("PyYAML==6.0.2", "MarkupSafe==2.1.5", "Jinja2==3.1.3", "SQLAlchemy==2.0.30", "Flask==2.0.3", "jaraco.text==3.12.1"),
    *("Werkzeug==2.0.3", "Pygments==2.17.2", "Babel==2.14.0", "Mako==1.2.4", "Send2Trash==1.8.2", "PyJWT==2.8.0"),
    *("typing_extensions==4.11.0", "itsdangerous==2.2.0", "click==8.1.7", "greenlet==3.0.3", "jaraco.functools==4.0.1"),
    *("jaraco.context==5.3.0", "autocommand==2.2.2", "inflect==7.2.1", "typeguard==4.2.1", "more-itertools==10.2.0"),
    *("requests==2.31.0", "urllib3==2.2.1", "idna==3.7", "certifi==2024.2.2", "charset-normalizer==3.3.2", "six==1.16.0"),
    *("python-dateutil==2.9.0", "pytz==2024.1", "attrs==23.2.0", "packaging==24.0", "pluggy==1.5.0", "iniconfig==2.0.0"),
    *("pytest==8.2.0", "tomli==2.0.1", "wheel==0.43.0", "setuptools==69.5.1", "pip==24.0", "colorama==0.4.6"),
    *("tqdm==4.66.2", "rich==13.7.1", "numpy==1.26.4"),
)


# --- sparse files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gnu", "pax-0.0", "pax-0.1", "pax-1.0"])
def test_sparse_files_in_sdists_are_refused(shared: Server, tmp_path: Path, layout: str) -> None:
    """Created by GNU tar: some tools unpack the holes, others the map."""
    filename = f"sparse_{layout.replace('-', '_').replace('.', '_')}-1.0.tar.gz"
    folder = tmp_path / filename.removesuffix(".tar.gz")
    folder.mkdir()
    name = filename.partition("-")[0]
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n")
    with (folder / "hole.bin").open("wb") as stream:
        stream.write(b"head")
        stream.seek(8 << 20)
        stream.write(b"tail")
    form = ["--format=gnu"] if layout == "gnu" else ["--format=pax", f"--sparse-version={layout[4:]}"]
    subprocess.run(["tar", "-C", tmp_path, "--sparse", *form, "-czf", tmp_path / filename, folder.name], check=True)
    answer = shared.upload(filename, (tmp_path / filename).read_bytes())
    assert answer.status_code == 400
    assert "sparse file" in answer.text
    (tmp_path / "packages").mkdir()
    os.link(tmp_path / filename, tmp_path / "packages" / filename)
    process = run_index(shared.root, "import", str(tmp_path / "packages"), check=False)
    assert f"{filename} contains a sparse file" in process.stdout


@pytest.mark.parametrize("keys", [{"GNU.sparse.name": "x"}, {"GNU.sparse.major": "2", "GNU.sparse.minor": "0"}])
def test_any_word_of_sparse_files_is_refused(tmp_path: Path, keys: dict[str, str]) -> None:
    """tarfile ignores unknown versions, so it would unpack another file than GNU tar."""
    path = tmp_path / "sparse_pkg-1.0.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("sparse_pkg-1.0/file")
        member.pax_headers = dict(keys)
        archive.addfile(member)
    with pytest.raises(RefusedError, match="sparse file"):
        index.intake.sdist.inspect(path, Defects(distribution=parse_filename(path.name)))


def test_the_digest_of_an_imported_file_is_that_of_the_folder(shared: Server, tmp_path: Path) -> None:
    filename, content = renamed("Digest.Pkg")
    (tmp_path / filename).write_bytes(content)
    run_index(shared.root, "import", str(tmp_path))
    [item] = shared.page("digest-pkg").json()["files"]
    assert item["hashes"]["sha256"] == hashlib.sha256(content).hexdigest()
