"""Sets: built in order, tested together, locked, staged at a real index, installed only from it by pip and uv."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uv
import yaml
from packaging.pylock import Pylock
from packaging.utils import parse_wheel_filename

from builder.flow import run
from builder.planning.stack import host_arch
from builder.proof import publish
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.test_environment import make_wheel

NATIVE = host_arch().value
GLIBC = "2_34"


def write_set(farm: Farm, name: str, recipes: list[str], imports: list[str], **more: object) -> None:
    folder = farm.settings.project / "sets" / name
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, object] = {"name": name, "stack": "bare", "target": NATIVE, "recipes": recipes, **more}
    values.setdefault("together", {"imports": imports})
    lines = [f"{key} = {projects.toml(value)}\n" for key, value in values.items()]
    (folder / "set.toml").write_text("".join(lines))


def tiny_c(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})


def carried(farm: Farm, home: Path) -> None:
    """Another home, with the files that the workflow of the pinned builds hands from job to job."""
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/pinned.yml").read_text())["jobs"]
    uploads = [
        step["with"]["path"] for name in ("build", "set") for step in jobs[name]["steps"] if "upload" in step.get("uses", "")
    ]
    globs = [path.removeprefix(".farm/") for text in uploads for path in text.split() if path.startswith(".farm/")]
    for glob in globs:
        for place in farm.settings.home.glob(f"{glob}**/*" if glob.endswith("/") else glob):
            if place.is_file():
                into = home / place.relative_to(farm.settings.home)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(place, into)


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Iterator[str]:
    """The simple API of another index: third_lib 3.0 and its dependency, in two versions."""
    from builder.planning import settings

    folder = tmp_path_factory.mktemp("third-party")
    with run.local_index(settings.load().model_copy(update={"home": folder / "home"})) as (url, token):
        body = {"third_lib/__init__.py": "import third_dep\nanswer = 42\n"}
        wheels = [make_wheel(folder, "third_lib", "3.0", body)]
        wheels += [
            make_wheel(folder, "third_dep", version, {"third_dep.py": f"v = {version}\n"}) for version in ("1.5", "1.6")
        ]
        for wheel in wheels:
            publish.upload(wheel, f"{url}/legacy/", ("__token__", token))
        yield f"{url}/simple/"


def closed_set(farm: Farm, third_party: str, **more: object) -> None:
    """tiny_c and third_lib, locked from that index."""
    tiny_c(farm)
    write_set(
        farm,
        "tiny",
        ["tiny_c"],
        ["tiny_c._core", "third_lib"],
        requirements=["third_lib", "third_dep<1.6"],
        resolved_before="2099-01-01",
        **more,
    )
    done = farm.run("lock", "sets/tiny", GRACEFARM_PYTHON_INDEX=third_party)
    assert done.code == 0, done.said


def installed(view: str, lock_file: Path, filename: str, folder: Path) -> list[Path]:
    """Folders into which pip and uv installed the set: from its view with its lock, and from pylock.toml beside the lock.

    `filename`: the builder's wheel, whose tag names the platforms.
    """
    pylock = lock_file.with_name("pylock.toml")
    by_pip, by_uv, by_pylock, by_pip_pylock = (folder / name for name in ("pip", "uv", "pylock", "pip-pylock"))
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--require-hashes", "--no-deps", "--only-binary=:all:"]
    # One for each level that a wheel may name: pip takes no "this one and below".
    pip += [f"--platform={tag.platform}" for tag in parse_wheel_filename(filename)[3]]
    pip += ["--python-version=3.11"]
    subprocess.run([*pip, "--index-url", view, "--target", str(by_pip), "-r", str(lock_file)], check=True)
    places = [by_pip]
    if sys.version_info[:2] == (3, 11):  # pip reads pylock.toml only for the Python that it runs in
        own = [sys.executable, "-m", "pip", "--isolated", "install", "--no-index", "--no-cache-dir"]
        subprocess.run([*own, "--target", by_pip_pylock, "-r", pylock], check=True)
        places.append(by_pip_pylock)
    platform = ["--python-version=3.11", f"--python-platform={NATIVE}-manylinux_{GLIBC}", "--no-config", "--no-cache"]
    base = [uv.find_uv_bin(), "pip", "install", "--python", sys.executable, *platform]
    subprocess.run(
        [*base, "--require-hashes", "--no-deps", "--default-index", view, "--target", by_uv, "-r", lock_file], check=True
    )
    subprocess.run([*base, "--preview-features=pylock", "--target", by_pylock, "-r", pylock], check=True)
    return [*places, by_uv, by_pylock]


def test_a_set_from_recipes_to_what_pip_and_uv_install(farm: Farm, third_party: str, tmp_path: Path) -> None:
    closed_set(farm, third_party)
    lock = (farm.settings.project / "sets" / "tiny" / "requirements.lock").read_text()
    assert re.findall(r"^(\S+==\S+) --hash=sha256:[0-9a-f]{64}$", lock, flags=re.M) == ["third-dep==1.5", "third-lib==3.0"]
    assert "://" not in lock
    assert farm.run("build", "tiny_c", "--target", NATIVE).code == 0  # with the index of this machine, for the stack's wheels

    with run.local_index(farm.settings) as (url, token):
        credentials = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token, "GRACEFARM_PYTHON_INDEX": third_party}
        staged = farm.run("set", "build", "tiny", "--stage", f"{url}/simple/", **credentials)
        assert staged.code == 40, staged.said
        assert "already built" in staged.said
        assert "is staged at" in staged.said
        assert "it lacks 2 wheels (third-dep==1.5, third-lib==3.0)" in staged.said
        assert httpx.get(f"{url}/tiny/simple/").status_code == 404, "nothing of it is seen before all of it is there"
        assert httpx.get(f"{url}/simple/tiny-c/").status_code == 404

        command = re.search(r"index mirror (\S+requirements\.lock) --set tiny", staged.said)
        assert command
        lock_file = Path(command[1])
        subprocess.run(
            [sys.executable, "-m", "index", "mirror", lock_file, "--set", "tiny", "--root", farm.settings.home / "index"],
            env=projects.environment(credentials),
            check=True,
            capture_output=True,
        )
        # From what pinned.yml's last job has, and nothing else: the artifacts of the jobs before it.
        carried(farm, tmp_path / "runner")
        runner = credentials | {"GRACEFARM_HOME": str(tmp_path / "runner")}
        shown = farm.run("set", "build", "tiny", "--stage", url, **runner)
        assert shown.code == 0, shown.said
        assert "already built" in shown.said
        assert "already tested" in shown.said
        assert "3 files are visible at" in shown.said
        again = farm.run("set", "build", "tiny", "--stage", url, **credentials)
        assert again.code == 0, again.said

        # Built of another source, with the same version: the matrix would not tell.
        source = projects.tree("tiny_c") | {"README": "changed"}
        farm.recipe("tiny_c", source, name="tiny-c", smoke={"imports": ["tiny_c"]})
        changed = farm.run("set", "build", "tiny", "--stage", url, **credentials)
        assert changed.code == 40, changed.said
        assert "has files that were not tested: tiny_c-1.0" in changed.said

        pylock = lock_file.with_name("pylock.toml")
        document = tomllib.loads(pylock.read_text())
        Pylock.from_dict(document)
        assert httpx.get(f"{url}/tiny/pylock.toml").text == pylock.read_text()
        assert [package["name"] for package in document["packages"]] == ["third-dep", "third-lib", "tiny-c"]
        assert {wheel["url"].rsplit("/files/")[0] for package in document["packages"] for wheel in package["wheels"]} == {url}

        tiny = next(package["wheels"][0]["name"] for package in document["packages"] if package["name"] == "tiny-c")
        places = installed(f"{url}/tiny/simple/", lock_file, tiny, tmp_path)
    for place in places:
        assert list(place.glob("tiny_c/_core*.so"))
        assert (place / "third_dep.py").read_text() == "v = 1.5\n"
        assert (place / "third_lib" / "__init__.py").is_file()


def test_the_whole_way_for_aarch64_by_one_command(farm: Farm, third_party: str) -> None:
    """What `builder set run gh200-cu130` does with gigabytes, with a wheel of the builder and a tiny one from elsewhere."""
    closed_set(farm, third_party)
    text = (farm.settings.project / "sets" / "tiny" / "set.toml").read_text()
    (farm.settings.project / "sets" / "tiny" / "set.toml").write_text(
        text.replace(f'target = "{NATIVE}"', 'target = "aarch64"')
    )
    assert farm.run("lock", "sets/tiny", GRACEFARM_PYTHON_INDEX=third_party).code == 0
    (farm.settings.project / "sets" / "tiny" / "smoke.py").write_text("import tiny_c\nprint(tiny_c.add(2, 3))\n")
    assert farm.run("build", "tiny_c", "--target", "aarch64").code == 0
    done = farm.run("set", "run", "tiny", "--json", GRACEFARM_PYTHON_INDEX=third_party)
    assert done.code == 0, done.said
    value = json.loads(done.out.splitlines()[-1])
    assert value["files"] == 3
    assert value["tested"]["smoke"]["script"] == "5\n"
    assert not list(farm.settings.home.glob("sets/*/run"))


def test_a_failing_wheel_hides_no_other_and_no_set_comes_of_it(farm: Farm) -> None:
    for name in ("first", "last"):
        farm.recipe(name, projects.backend("raise RuntimeError('on purpose')"))
    farm.recipe("middle", projects.backend("return wheel(wheel_directory, name='middle')"))
    write_set(farm, "tiny", ["first", "middle", "last"], ["middle"])
    done = farm.run("set", "build", "tiny")
    assert done.code == 50, done.said
    assert "2 of 3 wheels of set tiny could not be built" in done.said
    assert farm.run("set", "plan", "tiny").said.count(": built") == 1
    assert not list((farm.settings.home / "sets").glob("*/set.json"))


def test_wheels_that_do_not_work_together_make_no_set(farm: Farm) -> None:
    """Each imports by itself; together one replaces a module that the other needs."""
    for name, body in (("one", "value = 1"), ("two", "import sys; sys.modules['one'] = None")):
        content = f"return wheel(wheel_directory, name={name!r}, files={{'{name}/__init__.py': {body.encode()!r} + b'\\n'}})"
        farm.recipe(name, projects.backend(content))
    write_set(farm, "tiny", ["one", "two"], ["two", "one"])
    done = farm.run("set", "build", "tiny")
    assert done.code == 31, done.said
    assert "the wheels of set tiny do not work together" in done.said
    assert not list((farm.settings.home / "sets").glob("*/set.json"))


def test_a_requirement_that_the_set_lacks_is_named_before_anything_is_tried(farm: Farm) -> None:
    metadata = b"Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\nRequires-Dist: pip>=99\\nRequires-Dist: absent\\n"
    content = f"return wheel(wheel_directory, files={{'tiny-1.0.dist-info/METADATA': b'''{metadata.decode()}'''}})"
    farm.recipe("tiny", projects.backend(content))
    write_set(farm, "tiny", ["tiny"], ["tiny"])
    done = farm.run("set", "build", "tiny")
    assert done.code == 31, done.said
    assert re.search(r"tiny requires pip>=99, but the set has \d", done.said)
    assert "tiny requires absent" in done.said


def test_what_another_wheel_requires_is_asked_before_anything_is_built(farm: Farm) -> None:
    """As torch 2.11.0, which requires triton 3.6.0, beside our triton 3.2: here `build` of the lock and packaging of ours."""
    farm.recipe("packaging", projects.backend("raise RuntimeError('compiled')"), name="packaging", version="1.0")
    place = farm.settings.project / "stacks/bare"
    (place / "stack.toml").write_text((place / "stack.toml").read_text().replace('"packaging", ', "", 1))
    lock = (place / "requirements.lock").read_text()
    (place / "requirements.lock").write_text(re.sub(r"^packaging==.*\n", "", lock, flags=re.MULTILINE))
    write_set(farm, "tiny", ["packaging"], ["packaging"])
    done = farm.run("set", "build", "tiny")
    assert done.code == 31, done.said
    assert re.search(r"build requires packaging>=\S+, but the set has 1\.0", done.said), done.said
    assert "compiled" not in done.said


def test_a_program_that_fails_stops_the_set(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    write_set(farm, "tiny", ["tiny"], ["tiny"], together={"imports": ["tiny"], "commands": [["pip", "no-such-command"]]})
    done = farm.run("set", "build", "tiny")
    assert done.code == 31, done.said
    assert "`pip no-such-command` failed" in done.said
    write_set(farm, "tiny", ["tiny"], ["tiny"], together={"imports": ["tiny"], "commands": [["pip", "--version"]]})
    done = farm.run("set", "build", "tiny", "--json")
    assert done.code == 0, done.said
    assert "pip " in json.loads(done.out.splitlines()[-1])["tested"]["commands"][0]["output"]


def test_no_set_of_a_stack_that_has_headers_alone(farm: Farm) -> None:
    tiny_c(farm)
    write_set(farm, "tiny", ["tiny_c"], ["tiny_c"], stack="cu124-headers", target="aarch64")
    for command in ("plan", "build"):
        done = farm.run("set", command, "tiny")
        assert done.code == 40, done.said
        assert "cannot be part of a set" in done.said


def test_an_index_without_stages_says_so(farm: Farm, third_party: str) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    write_set(farm, "tiny", ["tiny"], ["tiny"])
    done = farm.run("set", "build", "tiny", "--stage", f"{third_party.removesuffix('/simple/')}/no-index-here")
    assert done.code == 40, done.said
    assert "give the URL of a gracefarm index" in done.said
    done = farm.run("set", "build", "tiny", "--stage", "http://user:secret@localhost:1/")
    assert done.code == 2
    assert "secret" not in done.said
