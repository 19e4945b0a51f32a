"""Sets that contain all requirements of their wheels, and mirrors for one kind of machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_kit import UV, Server, run_index, run_json, sdist, serving, wheel
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags

from gracefarm.errors import UsageError
from gracefarm.variants import SCHEMA
from index.names import wheel_tags
from index.sets.closure import SetFile, unmet
from index.sets.machines import InstallTarget, select

AARCH64 = "manylinux_2_34_aarch64"
GH200 = f"cp311-cp311-{AARCH64}"


def stage(server: Server, name: str, *wheels: tuple[str, bytes], expect: tuple[str, ...] = ()) -> str:
    """Publish a set of these wheels; return the error, or "" for success."""
    run_index(server.root, "stage", "create", name, *(part for line in expect for part in ("--expect", line)))
    for item in wheels:
        assert server.upload(*item, path=f"/stage/{name}/legacy/").status_code == 200
    process = run_index(server.root, "stage", "publish", name, check=False)
    assert process.returncode in (0, 2)
    return process.stderr


def test_a_set_without_torch_is_refused(shared: Server) -> None:
    """pip would install torch from another index, or fail."""
    attn = wheel("attn_pkg", "2.8.3", GH200, requires=("torch==2.9.1", "einops"))
    refused = stage(shared, "no-torch", attn, wheel("einops", "0.8"))
    assert "lacks projects that its wheels require: torch==2.9.1 (required by attn-pkg 2.8.3)" in refused
    assert shared.page("attn-pkg", prefix="/no-torch").status_code == 404
    answer = shared.client.post("/stage/no-torch/publish", auth=("__token__", shared.token))
    assert answer.status_code == 400
    assert "torch==2.9.1" in answer.text
    assert shared.upload(*wheel("torch", "2.10.0"), path="/stage/no-torch/legacy/").status_code == 200
    refused = run_index(shared.root, "stage", "publish", "no-torch", check=False)
    assert "torch==2.9.1 (required by attn-pkg 2.8.3; the set has 2.10.0)" in refused.stderr
    assert shared.upload(*wheel("torch", "2.9.1+cu130", GH200), path="/stage/no-torch/legacy/").status_code == 200
    run_index(shared.root, "stage", "publish", "no-torch")


def test_markers_are_of_the_sets_own_machines(shared: Server) -> None:
    requires = (
        "winlib; sys_platform == 'win32'",
        "oldlib; python_version < '3.11'",
        "x86lib; platform_machine == 'x86_64'",
        "pypylib; implementation_name == 'pypy'",
        "testlib; extra == 'test'",
    )
    assert stage(shared, "marked", wheel("marked_pkg", "1.0", GH200, requires=requires)) == ""
    refused = stage(shared, "needed", wheel("needed_pkg", "1.0", GH200, requires=("armlib; platform_machine == 'aarch64'",)))
    assert "armlib (required by needed-pkg 1.0)" in refused


def test_an_extra_that_is_asked_for_is_required(shared: Server) -> None:
    server = wheel("serve_pkg", "1.0", requires=("web_pkg[fast]>=1",))
    web = wheel("web_pkg", "1.5", requires=("loop_pkg; extra == 'fast'", "docs_pkg; extra == 'docs'"))
    assert "loop-pkg (required by web-pkg 1.5)" in stage(shared, "extra", server, web).replace("loop_pkg", "loop-pkg")
    assert stage(shared, "extra-2", server, web, wheel("loop_pkg", "1.0")) == ""


def test_every_python_of_the_matrix_finds_what_it_needs(shared: Server) -> None:
    both = [wheel("two_pkg", "1.0", f"cp{python}-cp{python}-{AARCH64}", requires=("one_dep",)) for python in (311, 312)]
    refused = stage(shared, "pythons", *both, wheel("one_dep", "1.0", GH200), expect=("two_pkg==1.0 cp311,cp312 aarch64",))
    assert (
        "one_dep (required by two-pkg 1.0; the set has this project only for other machines), for Python 3.12 on aarch64"
        in refused
    )
    more = wheel("one_dep", "1.0", f"cp312-abi3-{AARCH64}")
    assert shared.upload(*more, path="/stage/pythons/legacy/").status_code == 200
    run_index(shared.root, "stage", "publish", "pythons")


def test_a_set_may_say_what_it_does_without(shared: Server) -> None:
    """Like stack cu124, which omits pyairports: an engine requires and never imports it."""
    auth = ("__token__", shared.token)
    body = {"expect": ["engine_pkg==1.0"], "without": ["Air_Ports"]}
    for _ in range(2):
        opened = shared.client.put("/stage/less", json=body, auth=auth)
        assert (opened.status_code, opened.json()["without"]) == (200, ["air-ports"])
    assert shared.client.put("/stage/less", json={"expect": body["expect"]}, auth=auth).status_code == 400
    assert shared.client.put("/stage/odd", json={**body, "without": "x"}, auth=auth).status_code == 400
    engine = wheel("engine_pkg", "1.0", requires=("air.ports>=2", "sea_ports"))
    assert shared.upload(*engine, path="/stage/less/legacy/").status_code == 200
    refused = shared.client.post("/stage/less/publish", auth=auth)
    assert "lacks projects that its wheels require: sea_ports (required by engine-pkg 1.0)" in refused.text
    assert shared.upload(*wheel("sea_ports", "1.0"), path="/stage/less/legacy/").status_code == 200
    assert shared.client.post("/stage/less/publish", auth=auth).status_code == 200
    run_index(shared.root, "stage", "create", "less-2", "--without", "lake_ports")
    assert stage_publish(shared, "less-2", wheel("lake_engine", "1.0", requires=("lake-ports",))) == ""


def set_file(filename: str, *requires: str, own: bool = True, requires_python: str | None = None) -> SetFile:
    project, version = filename.split("-")[:2]
    return SetFile(
        filename=filename,
        project=project.replace("_", "-"),
        version=version,
        own=own,
        requires_python=requires_python,
        requires=tuple(Requirement(line) for line in requires),
    )


def test_a_set_of_pure_wheels_is_for_the_python_that_can_install_it() -> None:
    files = [set_file("a-1.0-py3-none-any.whl", "b; python_version < '3.12'", requires_python=">=3.11")]
    assert unmet(files, [], []) == [], "nothing is missing on 3.12"
    assert unmet(files, ["3.11"], []) == ["b (required by a 1.0)"]
    always = [set_file("a-1.0-py3-none-any.whl", "b", requires_python=">=3.11")]
    assert unmet(always, [], []) == ["b (required by a 1.0)"], "a Python without installable wheels is ignored"
    assert unmet([set_file("a-1.0.tar.gz")], [], []) == []
    several = [set_file(f"a-1.0-cp311-cp311-{AARCH64}.whl", "b>=1,<2"), set_file("b-2.0-py3-none-any.whl")]
    assert unmet([*several, set_file("b-1.5-py3-none-any.whl")], [], []) == []
    assert unmet(several, [], []) == ["b<2,>=1 (required by a 1.0; the set has 2.0)"]


INTERPRETERS = ("cp311-cp311", "cp311-none", "cp312-cp312", "cp311-abi3", "cp38-abi3", "cp312-abi3", "cp313-cp313t")
PLATFORMS = ("any", "manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_39_aarch64", "manylinux_2_17_x86_64")
OTHERS = ("linux_aarch64", "musllinux_1_2_aarch64", "win_amd64", "macosx_11_0_arm64")


@pytest.mark.parametrize(
    "interpreter", [*INTERPRETERS, "py3-none", "py311-none", "py312-none", "py2.py3-none", "pp311-pypy311_pp73"]
)
def test_machines_take_what_packaging_says(interpreter: str) -> None:
    """Against `packaging.tags`, for CPython 3.11 with glibc 2.34."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(34, 16, -1)] + ["manylinux2014_aarch64", "linux_aarch64"]
    known = {
        *cpython_tags((3, 11), platforms=platforms),
        *compatible_tags((3, 11), interpreter="cp311", platforms=platforms),
    }
    (machine,) = select([AARCH64], ["3.11"]).machines
    for platform in (*PLATFORMS, *OTHERS):
        filename = f"a-1.0-{interpreter}-{platform}.whl"
        if interpreter.startswith("cp") and platform == "any" and "none" not in interpreter:
            continue  # no tool makes them
        assert machine.takes(filename) == bool(known & wheel_tags(filename)), filename


@pytest.mark.parametrize(
    "names", [("windows", "3.11"), ("aarch64", "2.7"), ("aarch64", "three"), ("manylinux_2_aarch64", "3.11")]
)
def test_names_of_machines_are_checked(names: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as error:
        select(names[:1], names[1:])
    assert error.value.remedy.startswith("write ")


def test_a_free_threaded_python_takes_its_own_wheels() -> None:
    machine = InstallTarget(python="3.13t", arch="aarch64")
    assert machine.takes(f"a-1.0-cp313-cp313t-{AARCH64}.whl")
    assert not machine.takes(f"a-1.0-cp313-cp313-{AARCH64}.whl")
    assert not machine.takes(f"a-1.0-cp39-abi3-{AARCH64}.whl")
    assert machine.takes("a-1.0-py3-none-any.whl")


# --- mirrors of one kind of machine -----------------------------------------------------------------------------------------

SAFE = [
    wheel("safe_lib", "3.0", tags)
    for tags in (
        f"cp311-cp311-{AARCH64}",
        f"cp312-cp312-{AARCH64}",
        "cp311-cp311-manylinux_2_17_x86_64",
        "cp311-cp311-manylinux_2_39_aarch64",
        "cp311-cp311-musllinux_1_2_aarch64",
        "cp311-cp311-win_amd64",
        "cp311-cp311-macosx_11_0_arm64",
    )
]
SOURCE = sdist("safe_lib", "3.0")
PURE = wheel("pure_lib", "1.0")
WINDOWS = wheel("windows_lib", "1.0")
NULL = {
    "$schema": SCHEMA,
    "default-priorities": {"namespace": ["nvidia"]},
    "providers": {
        "nvidia": {"plugin-api": "nvidia_variant_provider.plugin:NvidiaVariantPlugin", "requires": ["nvidia-variant-provider"]}
    },
    "variants": {"null": {}},
}
_PLAIN_NAME, _CONTENT = wheel("pure_lib", "1.0", files={"pure_lib-1.0.dist-info/variant.json": json.dumps(NULL).encode()})
VARIANT = (_PLAIN_NAME.replace(".whl", "-null.whl"), _CONTENT)
DEPENDENT = wheel("chain_lib", "1.0", requires=("pure_lib>=2",))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("closed-upstream") / "root", "--allow-new", "--variants") as server:
        for item in (*SAFE, SOURCE, PURE, WINDOWS, DEPENDENT, VARIANT):
            assert server.upload(*item).status_code == 200
        yield server


def pin(line: str, *files: tuple[str, bytes]) -> str:
    return " ".join([line, *(f"--hash=sha256:{hashlib.sha256(content).hexdigest()}" for _, content in files)]) + "\n"


def mirror(server: Server, upstream: Server, lock: Path, name: str, *options: str) -> list[str]:
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    rows = run_json(server.root, "mirror", str(lock), "--set", name, *options, env=env)
    assert isinstance(rows, list)
    return [row["filename"] for row in rows]


def in_set(server: Server, name: str) -> list[str]:
    sets = run_json(server.root, "stage", "list")
    assert isinstance(sets, list)
    return next(item["files"] for item in sets if item["name"] == name)


def test_a_mirror_takes_the_files_of_one_kind_of_machine(shared: Server, upstream: Server, tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        pin("safe-lib==3.0", *SAFE, SOURCE)
        + pin("pure-lib==1.0", PURE, VARIANT)
        + pin("windows-lib==1.0 ; sys_platform == 'win32'", WINDOWS)
    )
    assert len(mirror(shared, upstream, lock, "kind")) == 10, "variant wheels are not mirrored"
    only = ("--platform", AARCH64, "--python", "3.11")
    assert mirror(shared, upstream, lock, "kind", *only) == [SAFE[0][0], PURE[0]]
    assert in_set(shared, "kind") == sorted([SAFE[0][0], PURE[0]]), "the files of the wider mirror are removed"
    assert mirror(shared, upstream, lock, "kind", *only) == [SAFE[0][0], PURE[0]]
    assert mirror(shared, upstream, lock, "kind", "--platform", "aarch64", "--python", "cp311") == [
        SAFE[0][0],
        SAFE[3][0],
        PURE[0],
    ], "any glibc"
    both = mirror(shared, upstream, lock, "kind", "--platform", AARCH64, "--python", "3.11", "--python", "3.13")
    assert both == [SAFE[0][0], SOURCE[0], PURE[0]], "Python 3.13 builds it"
    run_index(shared.root, "stage", "publish", "kind")
    target = tmp_path / "here"
    subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "download", "--no-cache-dir", "--no-deps", "--dest", str(target),
         "--only-binary", ":all:", "--platform", AARCH64, "--python-version", "3.11", "--disable-pip-version-check",
         "--require-hashes", "--index-url", f"{shared.url}/kind/simple/", "-r", f"{shared.url}/kind/requirements.lock"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert sorted(path.name for path in target.iterdir()) == sorted([SAFE[0][0], PURE[0]])


def test_a_lock_for_other_machines_is_told(shared: Server, upstream: Server, tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(pin("safe-lib==3.0", *SAFE))
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    wrong = ("--platform", "riscv64", "--python", "3.11")
    process = run_index(shared.root, "mirror", str(lock), "--set", "riscv", *wrong, check=False, env=env)
    assert process.returncode != 0
    assert "none of the 7 locked files of safe-lib 3.0 matches riscv64 3.11" in process.stderr
    assert "lacks 1 of 1" in run_index(shared.root, "stage", "publish", "riscv", check=False).stderr


@pytest.mark.parametrize("how", [(), ("--link",)])
def test_what_mirrored_wheels_require_counts_too(
    shared: Server, upstream: Server, tmp_path: Path, how: tuple[str, ...]
) -> None:
    name = f"chain-{len(how)}"
    lock = tmp_path / "requirements.lock"
    lock.write_text(pin("chain-lib==1.0", DEPENDENT) + pin("pure-lib==1.0", PURE))
    mirror(shared, upstream, lock, name, *how)
    run_index(shared.root, "gc")
    assert " 0 damaged, 0 unreferenced" in run_index(shared.root, "fsck").stdout
    refused = run_index(shared.root, "stage", "publish", name, check=False)
    assert "pure_lib>=2 (required by chain-lib 1.0; the set has 1.0)" in refused.stderr


# --- pylock.toml ------------------------------------------------------------------------------------------------------------


def pylock(server: Server, *wheels: tuple[str, bytes]) -> str:
    """Like the builder's file: each wheel by its address on this index and its sha256."""
    lines = ['lock-version = "1.0"', 'created-by = "a test"']
    for filename, content in wheels:
        name, version = filename.split("-")[:2]
        digest = hashlib.sha256(content).hexdigest()
        lines += [
            "[[packages]]",
            f'name = "{name.replace("_", "-")}"',
            f'version = "{version}"',
            "[[packages.wheels]]",
            f'name = "{filename}"',
            f'url = "{server.url}/files/{digest}/{filename}"',
            f"size = {len(content)}",
            f'hashes = {{ sha256 = "{digest}" }}',
        ]
    return "\n".join(lines) + "\n"


def test_a_sets_pylock_is_served_beside_its_lock(server: Server, tmp_path: Path) -> None:
    wheels = (wheel("lock_one", "1.0", requires=("lock_two",)), wheel("lock_two", "2.0"))
    created = run_json(server.root, "stage", "create", "locked")
    assert isinstance(created, dict)
    preview = created["preview_path"].removesuffix("/simple/")
    auth = ("__token__", server.token)
    text = pylock(server, *wheels)
    assert server.client.put("/stage/locked/pylock.toml", content=text).status_code == 401
    assert server.client.put("/stage/unknown/pylock.toml", content=text, auth=auth).status_code == 404
    assert server.client.put("/stage/locked/pylock.toml", content=text, auth=auth).status_code == 200
    assert server.upload(*wheels[1], path="/stage/locked/legacy/").status_code == 200
    refused = server.client.post("/stage/locked/publish", auth=auth)
    assert refused.status_code == 400
    assert "lacks packages of its pylock.toml: lock-one==1.0" in refused.text
    assert server.upload(*wheels[0], path="/stage/locked/legacy/").status_code == 200
    assert server.client.get(f"{preview}/pylock.toml").text == text
    assert server.client.get("/locked/pylock.toml").status_code == 404
    assert server.client.post("/stage/locked/publish", auth=auth).json()["pylock"] is True

    answer = server.client.get("/locked/pylock.toml")
    assert (answer.text, answer.headers["content-type"]) == (text, "application/toml")
    again = server.client.get("/locked/pylock.toml", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.headers["etag"]) == (304, answer.headers["etag"])
    assert server.client.get(f"{preview}/pylock.toml").status_code == 404
    late = server.client.put("/stage/locked/pylock.toml", content=text, auth=auth)
    assert "the set locked is published" in late.text
    assert "/locked/pylock.toml" in server.client.get("/sets/").text

    run_index(server.root, "export", str(tmp_path / "tree"))
    assert (tmp_path / "tree" / "locked" / "pylock.toml").read_text() == text
    venv.create(tmp_path / "v")
    (tmp_path / "pylock.toml").write_text(answer.text)
    process = subprocess.run(
        [*UV, "pip", "sync", "--no-cache", "--python", str(tmp_path / "v/bin/python"), str(tmp_path / "pylock.toml")],
        capture_output=True, text=True, check=False, env={**os.environ, "UV_NO_CONFIG": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / "v").rglob("lock_*.dist-info"))) == 2


def test_a_set_is_given_its_pylock_by_hand(server: Server, tmp_path: Path) -> None:
    run_index(server.root, "stage", "create", "by-hand")
    (tmp_path / "pylock.toml").write_text(pylock(server, PURE))
    run_index(server.root, "stage", "pylock", "by-hand", str(tmp_path / "pylock.toml"))
    assert "lacks packages of its pylock.toml" in stage_publish(server, "by-hand", DEPENDENT, wheel("pure_lib", "2.0"))
    run_index(server.root, "stage", "drop", "by-hand")
    assert server.client.get("/by-hand/pylock.toml").status_code == 404
    assert server.client.get("/simple/pylock.toml").status_code in (301, 404)


def stage_publish(server: Server, name: str, *wheels: tuple[str, bytes]) -> str:
    for item in wheels:
        assert server.upload(*item, path=f"/stage/{name}/legacy/").status_code == 200
    return run_index(server.root, "stage", "publish", name, check=False).stderr


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"\xff", "is not TOML"),
        (b"a = ", "is not TOML"),
        (b'a = 1\n', "does not conform to PEP 751"),
        (b'lock-version = "9.0"\ncreated-by = "x"\npackages = []\n', "does not conform to PEP 751"),
        (b'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "a"\ndirectory = { path = "x" }\n', "the sha256 of"),
        (b"#" * (5 << 20), "at most"),
    ],
)  # fmt: skip
def test_what_is_no_pylock_is_refused(shared: Server, raw: bytes, sentence: str) -> None:
    if shared.client.get("/stage/no-pylock", auth=("__token__", shared.token)).status_code == 404:
        run_index(shared.root, "stage", "create", "no-pylock")
    answer = shared.client.put("/stage/no-pylock/pylock.toml", content=raw, auth=("__token__", shared.token))
    assert answer.status_code in (400, 413)
    assert sentence in answer.text
