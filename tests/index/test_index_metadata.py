"""METADATA that breaks installers: refusals of uploads, imports and mirrors, and the behaviour of real clients."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from careless_kit import careless_index, install
from index_kit import Server, run_index, run_json, sdist, serving, wheel
from markupsafe import escape
from test_index_clients import clean

HEAD = b"Metadata-Version: %s\nName: %s\nVersion: 1.1\nSummary: x\n"

# End of the METADATA of release 1.1, after the first four fields, and words of the refusal.
FATAL = {
    "latin-1": ("2.1", b"Author: Zo\xeb\n\n", "not UTF-8: byte 0xeb in line 5"),
    "latin-1-description": ("2.1", b"\nZo\xeb\n", "not UTF-8"),
    "surrogate": ("2.1", b"Author: \xed\xa0\x80\n\n", "not UTF-8"),
    "address": ("2.1", b"Requires-Dist: libdep @ https://example.invalid/libdep-1.0-py3-none-any.whl\n\n", "contains a URL"),
    "lock-marker": ("2.1", b"Requires-Dist: libdep; 'a' in extras\n\n", "cannot evaluate"),
    "compared-text": ("2.1", b"Requires-Dist: libdep; os_name ~= 'posix'\n\n", "cannot evaluate"),
    "digits": ("2.1", b"Requires-Dist: libdep>=" + b"9" * 5000 + b"\n\n", "is longer than 4000 characters"),
    "python-digits": ("2.1", b"Requires-Python: >=" + b"9" * 5000 + b"\n\n", "is longer than 4000 characters"),
    "nested": ("2.1", b"Requires-Dist: libdep; " + b"(" * 500 + b"os_name=='x'" + b")" * 500 + b"\n\n", "parentheses"),
}
HARMLESS = {
    "not-a-requirement": ("2.1", b"Requires-Dist: foo bar baz\n\n", "'foo bar baz' is invalid for 'requires-dist'"),
    "star": ("2.1", b"Requires-Dist: libdep (>=1.0.*)\n\n", "requires-dist"),
    "marker": ("2.1", b"Requires-Dist: libdep; pythonversion < '3'\n\n", "requires-dist"),
    "version-9.9": ("9.9", b"\n", "'9.9' is not a valid metadata version"),
    "version-3.0": ("3.0", b"\n", "'3.0' is not a valid metadata version"),
    "extra": ("2.1", b"Provides-Extra: b@d!\n\n", "'b@d!' is invalid for 'provides-extra'"),
    "two-licences": ("2.4", b"License: MIT\nLicense-Expression: MIT\n\n", "mutually exclusive"),
    "spdx": ("2.4", b"License-Expression: Nonsense-1.0\n\n", "license-expression"),
    "too-new-field": ("2.1", b"License-Expression: MIT\n\n", "introduced in metadata version 2.4"),
    "licence-file": ("2.4", b"License-Expression: MIT\nLicense-File: LICENSE.txt\n\n", "license-file 'LICENSE.txt' is not in"),
    "python": ("2.1", b"Requires-Python: >=3.x\n\n", "'>=3.x' is invalid for 'requires-python'"),
    "twice": ("2.1", b"Requires-Python: >=3\nRequires-Python: <3\n\n", "requires-python is given twice"),
    "field": ("2.1", b"Colour: red\n\n", "colour is not a field"),
    "address": ("2.1", b"Home-page: javascript:alert(1)\n\n", "not an http(s) address"),
    "dynamic": ("2.2", b"Dynamic: Name\n\n", "dynamic"),
    "summary": ("2.1", b"Description-Content-Type: text/html\n\n", "description-content-type"),
}


def release(kind: str, name: str, case: tuple[str, bytes, str]) -> tuple[str, bytes]:
    """File name and bytes of a wheel or sdist 1.1 with that METADATA."""
    meta = HEAD % (case[0].encode(), name.encode()) + case[1]
    return wheel(name, "1.1", meta=meta) if kind == "wheel" else sdist(name, "1.1", meta=meta)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
@pytest.mark.parametrize("case", [*HARMLESS.items(), *FATAL.items()], ids=lambda item: item[0])
def test_an_upload_that_breaks_installers_is_refused(
    shared: Server, case: tuple[str, tuple[str, bytes, str]], kind: str
) -> None:
    name = f"{kind}_{case[0]}".replace("-", "_").replace(".", "_")
    answer = shared.upload(*release(kind, name, case[1]))
    assert answer.status_code == 400, answer.text
    assert case[1][2] in answer.text
    assert shared.page(name.replace("_", "-")).status_code == 404


def test_accepted_oddities_are_harmless_to_the_project(shared: Server, tmp_path: Path) -> None:
    """`===` with any text is valid (PEP 440), and PyPI escapes NUL (pypi/warehouse#3545), so both are accepted.

    pip and uv pass over a release whose `===` no version matches, and read METADATA with NUL as any other.
    """
    odd = {
        "odd_arbitrary": (b"Requires-Dist: libodd === bar\n\n", "1.0"),
        "odd_missing": (b"Requires-Dist: libodd-missing === bar\n\n", "1.0"),
        "odd_nul": (b"Author: a\0b\nRequires-Dist: libodd\n\na\0b\n", "1.1"),
    }
    assert shared.upload(*wheel("libodd")).status_code == 200
    for name, (lines, _) in odd.items():
        assert shared.upload(*wheel(name)).status_code == 200
        head = (HEAD % (b"2.1", name.encode())).replace(b"Summary: x", b"Summary: x\0y")
        assert shared.upload(*wheel(name, "1.1", meta=head + lines)).status_code == 200
        project = name.replace("_", "-")
        for path in (f"/simple/{project}/", f"/project/{project}/", f"/wheel/{name}-1.1-py3-none-any.whl/"):
            assert shared.client.get(path).status_code == 200
    for tool in ("pip", "uv"):
        process = install(tool, shared.url + "/simple/", tmp_path / "t", *odd, "--dry-run")
        assert process.returncode == 0, process.stderr
        found = re.sub("==|_", "-", process.stdout + process.stderr)
        for name, (_, version) in odd.items():
            assert re.search(rf"(Would install .*| \+ ){name.replace('_', '-')}-{version}\b", found), (
                process.stdout + process.stderr
            )


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_import_takes_what_only_that_file_suffers_from_and_marks_it(shared: Server, tmp_path: Path, kind: str) -> None:
    for key, case in HARMLESS.items():
        filename, content = release(kind, f"imported_{kind}_{key.replace('-', '_').replace('.', '_')}", case)
        (tmp_path / filename).write_bytes(content)
    assert run_json(shared.root, "import", str(tmp_path)) == {"created": len(HARMLESS), "same": 0, "refused": []}
    for key, case in HARMLESS.items():
        project = f"imported-{kind}-{key.replace('.', '-')}"
        [item] = shared.page(project).json()["files"]
        assert case[2] in item["_defects"][0]
        page = shared.client.get(f"/wheel/{item['filename']}/").text
        assert escape(case[2]) in page
        assert "may not install" in shared.client.get(f"/project/{project}/").text


def test_an_import_refuses_what_breaks_a_project_by_the_name_of_the_file(shared: Server, tmp_path: Path) -> None:
    names = {key: release("wheel", f"fatal_{key.replace('-', '_')}", case) for key, case in FATAL.items()}
    for filename, content in names.values():
        (tmp_path / filename).write_bytes(content)
    good, content = wheel("fatal_good")
    (tmp_path / good).write_bytes(content)
    process = run_index(shared.root, "import", str(tmp_path), check=False)
    assert process.returncode != 0
    for key, case in FATAL.items():
        assert any(names[key][0] in line and case[2] in line for line in process.stdout.splitlines()), process.stdout
        assert shared.page(f"fatal-{key}").status_code == 404
    assert shared.filenames("fatal-good") == [good]


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_a_mirror_refuses_what_breaks_a_project_and_marks_the_rest(shared: Server, tmp_path: Path, how: str) -> None:
    """From an index without checks: a folder with files and their metadata."""
    name = f"mirrored_{how}"
    files = [release("wheel", name, HARMLESS["version-9.9"]), release("wheel", f"{name}_bad", FATAL["latin-1"])]
    links = ["--link"] if how == "linked" else []
    with careless_index(tmp_path / "upstream", files) as url:
        env = {"GRACEFARM_PYTHON_INDEX": url}
        for number, (filename, content) in enumerate(files):
            lock = tmp_path / f"{number}.lock"
            project = filename.split("-")[0].replace("_", "-")
            lock.write_text(f"{project}==1.1 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
            process = run_index(shared.root, "mirror", str(lock), "--set", f"set-{how}-{number}", *links, env=env, check=False)
            assert (process.returncode == 0) == (number == 0), process.stderr
        assert files[1][0] in process.stderr
        assert "not UTF-8" in process.stderr
    run_index(shared.root, "stage", "publish", f"set-{how}-0")
    [item] = shared.page(name.replace("_", "-"), prefix=f"/set-{how}-0").json()["files"]
    assert "'9.9' is not a valid metadata version" in item["_defects"][0]
    page = shared.client.get("/sets/").text
    assert f'{files[0][0]}</code> <span class="tag warn">may not install</span> <span' in page
    assert escape("'9.9' is not a valid metadata version") in page, "mirrored files have no other page"


@pytest.mark.parametrize(
    ("key", "filename", "content", "sentence"),
    [
        ("latin", *release("wheel", "bare_latin", FATAL["latin-1"]), "bare_latin-1.1-py3-none-any.whl: its METADATA is not"),
        ("closed", *wheel("bare_closed", "1.1", requires=("bare-missing",)), "bare-missing (required by bare-closed 1.1"),
        ("marked", *release("wheel", "bare_marked", HARMLESS["version-9.9"]), ""),
        ("source", *release("sdist", "bare_source", HARMLESS["version-9.9"]), ""),
    ],
)
def test_links_to_an_index_without_metadata_are_checked_at_the_file(
    shared: Server, tmp_path: Path, key: str, filename: str, content: bytes, sentence: str
) -> None:
    (tmp_path / "lock").write_text(f"bare-{key}==1.1 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    with careless_index(tmp_path / "upstream", [(filename, content)], serves_metadata=False) as url:
        mirror = ("mirror", str(tmp_path / "lock"), "--set", f"bare-{key}", "--link")
        errors = run_index(shared.root, *mirror, check=False, env={"GRACEFARM_PYTHON_INDEX": url}).stderr
        published = run_index(shared.root, "stage", "publish", f"bare-{key}", check=False)
        assert sentence in errors + published.stderr
        assert (published.returncode == 0) == (sentence == ""), published.stderr
        assert not list((shared.root / "staging").iterdir()), "a link is not a copy"
        run_index(shared.root, "gc")
        if not sentence:
            [item] = shared.page(f"bare-{key}", prefix=f"/bare-{key}").json()["files"]
            assert item["url"].startswith(url)
            assert item["size"] == len(content)
            assert item["core-metadata"] is False, "upstream serves none, so pip would get a 404"
            assert "'9.9' is not a valid metadata version" in item["_defects"][0]


# --- real clients -----------------------------------------------------------------------------------------------------------


FATAL_FOR = dict.fromkeys(FATAL, ("pip",)) | {"address": ("pip", "uv")}


QUICK = ("latin-1", "address")


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in FATAL])
def test_what_is_refused_kills_a_project_and_ours_stays_alive(shared: Server, tmp_path: Path, key: str) -> None:
    """Release 1.0 is valid. On an index that accepts 1.1, clients cannot install 1.0; on ours they can."""
    name = f"alive_{key.replace('-', '_')}"
    project, good, bad = name.replace("_", "-"), wheel(name), release("wheel", name, FATAL[key])
    assert shared.upload(*good).status_code == 200
    assert shared.upload(*bad).status_code == 400
    with careless_index(tmp_path / "careless", [good, bad]) as careless:
        for tool in FATAL_FOR[key]:
            assert install(tool, careless, tmp_path / "t", project, "--dry-run").returncode != 0, (
                f"{tool} no longer fails on {key}"
            )
    for tool in ("pip", "uv"):
        process = install(tool, shared.url + "/simple/", tmp_path / "t", project, "--dry-run")
        assert process.returncode == 0, process.stderr
        assert "1.0" in (process.stdout if tool == "pip" else process.stderr)


def test_what_an_import_takes_leaves_its_project_alive(tmp_path: Path) -> None:
    with serving(tmp_path / "root", "--allow-new") as server:
        folder = tmp_path / "packages"
        folder.mkdir()
        for key, case in HARMLESS.items():
            name = f"live_{key.replace('-', '_').replace('.', '_')}"
            for filename, content in (wheel(name), release("wheel", name, case), wheel("libdep")):
                (folder / filename).write_bytes(content)
        run_index(server.root, "import", str(folder))
        projects = [f"live-{key.replace('.', '-')}" for key in HARMLESS]
        for tool in ("pip", "uv"):
            process = install(tool, server.url + "/simple/", tmp_path / "t", *projects, "--dry-run")
            assert process.returncode == 0, process.stderr
            assert "Traceback" not in process.stderr


# --- other files of .dist-info ----------------------------------------------------------------------------------------------


def test_licence_files_are_where_pep_639_puts_them(shared: Server) -> None:
    head = b"Metadata-Version: 2.4\nName: %s\nVersion: 1.0\nLicense-Expression: MIT\n"
    head += b"License-File: LICENSE\nLicense-File: sub/COPYING\n\n"
    folder = "licence_pkg-1.0.dist-info"
    right = {f"{folder}/licenses/LICENSE": b"MIT", f"{folder}/licenses/sub/COPYING": b"MIT"}
    wrong = {f"{folder}/LICENSE": b"MIT", f"{folder}/licenses/sub/COPYING": b"MIT"}
    meta = head % b"licence_pkg"
    answer = shared.upload(*wheel("licence_pkg", meta=meta, files=wrong))
    assert "license-file 'LICENSE' is not in the archive" in answer.text
    assert shared.upload(*wheel("licence_pkg", meta=meta, files=right)).status_code == 200
    extra = {"licence_src-1.0/LICENSE": b"MIT"}
    meta = head % b"licence_src"
    answer = shared.upload(*sdist("licence_src", meta=meta, extra=extra))
    assert "license-file 'sub/COPYING' is not in the archive" in answer.text
    extra["licence_src-1.0/sub/COPYING"] = b"MIT"
    assert shared.upload(*sdist("licence_src", meta=meta, extra=extra)).status_code == 200
    old = head.replace(b"2.4", b"2.1").replace(b"License-Expression: MIT\n", b"") % b"licence_old"
    assert shared.upload(*wheel("licence_old", meta=old)).status_code == 200, "setuptools wrote it long before PEP 639"


def test_all_that_is_wrong_is_in_the_first_line_and_uv_shows_it(shared: Server, tmp_path: Path) -> None:
    meta = b"Metadata-Version: 2.1\nName: many_pkg\nVersion: 1.0\nProvides-Extra: b@d!\nColour: red\nHome-page: ftp://x\n\n"
    filename, content = wheel("many_pkg", meta=meta)
    (tmp_path / filename).write_bytes(content)
    process = subprocess.run(
        [sys.executable, "-m", "uv", "publish", "--publish-url", shared.url + "/legacy/", str(tmp_path / filename)],
        env=clean(UV_PUBLISH_TOKEN=shared.token), capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = " ".join(process.stderr.split())
    for words in ("'b@d!' is invalid for 'provides-extra'", "colour is not a field", "'ftp://x' is not an http(s) address"):
        assert words in said, process.stderr
