"""Wheels and sdists on which pip or uv fail after the choice of a release: refused everywhere; tested by real installs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from careless_kit import careless_index, install, installed
from index_kit import Server, run_index, run_json, wheel

BOTH = ("pip", "uv")
LINES = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """How release 1.1 differs from a valid wheel. INFO and DATA in paths are the folders of the wheel."""

    words: str
    "Of the refusal or the defect."
    fails: tuple[str, ...] = BOTH
    "The clients that fail."
    files: dict[str, bytes] = field(default_factory=dict)
    wheel_file: bytes | None = None
    without: str = ""
    record: str | None = None

    def release(self, name: str) -> tuple[str, bytes]:
        """File name and bytes."""
        folder = f"{name}-1.1.dist-info"
        data = folder.replace(".dist-info", ".data")
        files = {f"{name}.py": b"x = 1\n"}
        files |= {path.replace("INFO", folder).replace("DATA", data): content for path, content in self.files.items()}
        return wheel(name, "1.1", files=files, wheel_file=self.wheel_file, without=self.without, record=self.record)


def points(text: bytes, words: str, *fails: str) -> Case:
    """A wheel with this entry_points.txt."""
    return Case(files={"INFO/entry_points.txt": text}, words=f"entry_points.txt: {words}", fails=fails or BOTH)


FATAL = {
    "wheel-missing": Case(without="WHEEL", words="lacks"),
    "wheel-empty": Case(wheel_file=b"", words="lacks Wheel-Version"),
    "wheel-latin-1": Case(wheel_file=LINES.replace(b"test", b"Zo\xeb"), words="WHEEL file is not UTF-8: byte 0xeb"),
    "wheel-mark": Case(wheel_file=b"\xef\xbb\xbf" + LINES, words="lacks Wheel-Version"),
    "wheel-body": Case(wheel_file=b"\n" + LINES, words="lacks Wheel-Version"),
    "wheel-lower": Case(wheel_file=LINES.replace(b"Wheel-V", b"wheel-v"), words="lacks Wheel-Version", fails=("uv",)),
    "version-word": Case(wheel_file=LINES.replace(b"1.0", b"one"), words="invalid Wheel-Version 'one'"),
    "version-part": Case(wheel_file=LINES.replace(b"1.0", b"1.a.0"), words="invalid Wheel-Version", fails=("pip",)),
    "version-1": Case(wheel_file=LINES.replace(b"1.0", b"1"), words="invalid Wheel-Version '1'", fails=("uv",)),
    "version-2": Case(wheel_file=LINES.replace(b"1.0", b"2.0"), words="Wheel-Version 2.0"),
    "version-9": Case(wheel_file=LINES.replace(b"1.0", b"9.0"), words="Wheel-Version 9.0"),
    "version-digits": Case(wheel_file=LINES.replace(b"1.0", b"1" * 5000 + b".0"), words="invalid Wheel-Version '111"),
    "scheme": Case(files={"DATA/weird/x": b"x"}, words=".data/weird/x', which belongs to no install scheme"),
    "scheme-case": Case(files={"DATA/Scripts/x": b"x"}, words="no install scheme"),
    "scheme-lacks": Case(files={"DATA/x": b"x"}, words="no install scheme"),
    "scheme-file": Case(files={"DATA/purelib": b"x"}, words="no install scheme"),
    "scheme-other": Case(files={"other-1.0.data/weird/x": b"x"}, words="no install scheme", fails=("pip",)),
    "scheme-top": Case(files={"top.data": b"x"}, words="no install scheme", fails=("pip",)),
    "scripts-folder": Case(files={"DATA/scripts/sub/x": b"x"}, words="a folder among the scripts", fails=("uv",)),
    "record-missing": Case(without="RECORD", words="lacks"),
    "record-latin-1": Case(record="\udceb,,\n", words="RECORD is not readable"),
    "record-blank": Case(record="\n", words="RECORD has an invalid line ''", fails=("pip",)),
    "record-short": Case(record="a,,\na\n", words="RECORD has an invalid line 'a'", fails=("uv",)),
    "record-size": Case(record="a,,x\n", words="RECORD has an invalid line 'a,,x'", fails=("uv",)),
    "points-object": points(b"[console_scripts]\nrun = pkg.main\n", "run = pkg.main does not name an object"),
    "points-group": points(b"run = pkg:main\n", "File contains no section headers", "uv"),
    "points-equals": points(b"[console_scripts]\nrun pkg:main\n", ""),
    "points-equals-plugin": points(b"[plugins]\nrun\n", ""),
    "points-value": points(b"[console_scripts]\nrun =\n", "run =  does not name an object"),
    "points-way-out": points(b"[console_scripts]\n../../run = pkg:main\n", "'../../run' is not a valid name"),
    "points-folder": points(b"[gui_scripts]\nbin/run = pkg:main\n", "'bin/run' is not a valid name", "uv"),
    "points-nul": points(b"[console_scripts]\na\0b = pkg:main\n", "'a\\x00b' is not a valid name"),
    "points-dots": points(b"[console_scripts]\n.. = pkg:main\n", "'..' is not a valid name"),
    "points-spaces": points(b"[console_scripts]\nrun = pkg main\n", "run = pkg main does not name an object"),
    "points-extra": points(b"[console_scripts]\nrun = pkg:main [x\n", "run = pkg:main [x does not name"),
    "points-twice": points(b"[console_scripts]\nrun = pkg:main\nrun = pkg:other\n", "While reading", "uv"),
    "points-group-twice": points(b"[a]\nx = pkg:a\n[a]\ny = pkg:a\n", "While reading", "uv"),
    "points-latin-1": points(b"[console_scripts]\nr\xebn = pkg:main\n", "it is not UTF-8"),
    "points-unclosed": points(b"[console_scripts\nrun = pkg:main\n", "File contains no section headers", "uv"),
    "points-comment": points(b"[console_scripts]\n; a comment\nrun = pkg:main\n", "a line is neither", "pip"),
    "metadata-second": Case(
        files={"other-2.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: other\nVersion: 2.0\n\n"},
        words="contains 2 .dist-info folders",
    ),
    "path": Case(files={"../../evil.py": b"x"}, words="not a plain relative path", fails=("pip",)),
}
MARKED = {
    "no-tags": Case(wheel_file=LINES.replace(b"Tag: py3-none-any\n", b""), words="its WHEEL file lists no tags"),
    "tag": Case(wheel_file=LINES.replace(b"py3-none-any", b"py3"), words="its WHEEL file has the invalid tag 'py3'"),
    "other-tag": Case(
        wheel_file=LINES.replace(b"py3-", b"py2-"), words="its WHEEL file has other tags than the file name: py2-none-any"
    ),
    "plugin": points(b"[plugins]\nrun = pkg main\n", "run = pkg main does not name an object"),
    "program": points(b"[console_scripts]\na\\b = pkg:main\n", "'a\\\\b' is not a valid name for a program"),
}
GOOD = {
    "purelib": Case(wheel_file=LINES.replace(b"Root-Is-Purelib: true\n", b""), words=""),
    "root": Case(wheel_file=LINES.replace(b"true", b"maybe"), words=""),
    "version": Case(wheel_file=LINES.replace(b"1.0", b"1.9"), words=""),
    "lines": Case(wheel_file=LINES.replace(b"\n", b"\r\n").replace(b"Wheel-Version: ", b"Wheel-Version:"), words=""),
    "schemes": Case(
        files={f"DATA/{scheme}/x_{scheme}": b"x" for scheme in ("purelib", "platlib", "headers", "scripts", "data")}, words=""
    ),
    "deep": Case(files={"pkg/x.data/weird/x": b"x"}, words=""),
    "points": points(
        b"# a comment\n[console_scripts]\nrun = pkg.main:app.run\nrun-3.11 = pkg:main [extra]\n\n"
        b"[pytest11]\nplug.in:one = pkg.plugin\nPlug = pkg.plugin\nplug = pkg.plugin\n",
        "",
    ),
}


def named(prefix: str, key: str) -> str:
    return f"{prefix}_{key.replace('-', '_')}"


def mirror(server: Server, folder: Path, set_name: str, url: str, *files: tuple[str, bytes], link: bool = False) -> str:
    """Mirror the files; return the error, or an empty text."""
    lock = folder / f"{set_name}.lock"
    lines = []
    for filename, content in files:
        name, version = filename.split("-")[:2]
        version = version.removesuffix(".tar.gz").removesuffix(".zip")
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    lock.write_text("".join(lines))
    arguments = ("mirror", str(lock), "--set", set_name, *(["--link"] if link else []))
    process = run_index(server.root, *arguments, check=False, env={"GRACEFARM_PYTHON_INDEX": url})
    return process.stderr if process.returncode else ""


@pytest.mark.parametrize("key", FATAL)
def test_what_installers_cannot_install_is_refused_everywhere(shared: Server, tmp_path: Path, key: str) -> None:
    name = named("fails", key)
    filename, content = FATAL[key].release(name)
    answer = shared.upload(filename, content)
    assert answer.status_code == 400
    assert FATAL[key].words in answer.text
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / filename).write_bytes(content)
    process = run_index(shared.root, "import", str(folder), check=False)
    assert process.returncode != 0
    assert FATAL[key].words in process.stdout
    with careless_index(tmp_path / "upstream", [(filename, content)]) as url:
        for link in (False, True):
            set_name = named("set", key).replace("_", "-") + ("-link" if link else "")
            assert FATAL[key].words in mirror(shared, tmp_path, set_name, url, (filename, content), link=link)
            assert "lacks 1 of 1" in run_index(shared.root, "stage", "publish", set_name, check=False).stderr
    assert shared.page(name.replace("_", "-")).status_code == 404
    assert not list((shared.root / "staging").iterdir())


@pytest.mark.parametrize("key", MARKED)
def test_what_installers_can_install_is_marked(shared: Server, tmp_path: Path, key: str) -> None:
    filename, content = MARKED[key].release(named("marked", key))
    project = named("marked", key).replace("_", "-")
    answer = shared.upload(filename, content)
    assert answer.status_code == 400
    assert MARKED[key].words in answer.text
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / filename).write_bytes(content)
    assert run_json(shared.root, "import", str(folder)) == {"created": 1, "same": 0, "refused": []}
    assert MARKED[key].words in shared.page(project).json()["files"][0]["_defects"][0]
    filename, content = MARKED[key].release(named("mirrored", key))
    with careless_index(tmp_path / "upstream", [(filename, content)]) as url:
        for link in (False, True):
            set_name = named("marked", key).replace("_", "-") + ("-link" if link else "")
            assert mirror(shared, tmp_path, set_name, url, (filename, content), link=link) == ""
            run_index(shared.root, "stage", "publish", set_name)
            item = shared.page(named("mirrored", key).replace("_", "-"), prefix=f"/{set_name}").json()["files"][0]
            assert MARKED[key].words in item["_defects"][0]
            assert item["url"].startswith(url) == link


@pytest.mark.parametrize("key", GOOD)
def test_what_is_valid_is_taken(shared: Server, key: str) -> None:
    answer = shared.upload(*GOOD[key].release(named("valid", key)))
    assert answer.status_code == 200, answer.text


# --- real installers --------------------------------------------------------------------------------------------------------

QUICK = ("version-9", "scheme", "record-blank", "points-equals", "points-twice")


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index without checks, with release 1.0 (valid) and 1.1 of every case."""
    files = []
    for prefix, cases in (("real", FATAL), ("odd", {**MARKED, **GOOD})):
        for key, case in cases.items():
            files += [wheel(named(prefix, key)), case.release(named(prefix, key))]
    with careless_index(tmp_path_factory.mktemp("careless"), files) as url:
        yield url


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in FATAL])
def test_the_installers_fail_on_it_although_an_older_release_is_valid(careless: str, tmp_path: Path, key: str) -> None:
    for tool in FATAL[key].fails:
        process = install(tool, careless, tmp_path / tool, named("real", key).replace("_", "-"))
        assert process.returncode != 0, f"{tool} no longer fails on {key}"


@pytest.mark.slow
@pytest.mark.parametrize("tool", BOTH)
def test_the_installers_install_what_is_marked_or_valid(careless: str, tmp_path: Path, tool: str) -> None:
    names = [named("odd", key) for key in (*MARKED, *GOOD)]
    process = install(tool, careless, tmp_path / "t", *names)
    assert process.returncode == 0, process.stderr
    assert installed(tmp_path / "t") == sorted(f"{name}-1.1.dist-info" for name in names)
