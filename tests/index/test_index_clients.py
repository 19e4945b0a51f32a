"""Third-party clients as black boxes: their requests in the server's access log, and their results."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from index_kit import JSON, UV, LogLine, Server, run_index, sdist, serving, tool, wheel
from pypi_simple import ACCEPT_HTML_ONLY, ACCEPT_JSON_ONLY, PyPISimple


def clean(**more: str) -> dict[str, str]:
    """The environment without configuration of installers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "TWINE_", "POETRY_"))}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "UV_NO_CONFIG": "1",
        "NO_COLOR": "1",
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def call(
    arguments: list[object], *, check: bool = True, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [str(item) for item in arguments], env=clean(**env), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def read_by(server: Server, agent: str) -> list[LogLine]:
    return [line for line in server.requests() if line.agent.startswith(agent)]


def kinds(lines: list[LogLine]) -> list[str]:
    """The requests for pages, metadata and wheels."""
    names = []
    for line in lines:
        end = "metadata" if line.target.endswith(".metadata") else "wheel" if line.target.endswith(".whl") else "page"
        names.append(end if line.method == "GET" else f"{line.method} {end}")
    return names


@pytest.fixture(scope="module")
def filled(shared: Server) -> Server:
    """A project that depends on another; ten variants of one release; a yanked and a too new version."""
    for version, dep in (("1.0", "variant_pkg==2.8.3"), ("2.0", "variant_pkg==2.8.3")):
        assert shared.upload(*wheel("app_pkg", version, requires=(dep, "libdep"))).status_code == 200
    assert shared.upload(*wheel("app_pkg", "3.0", requires_python=">=3.99")).status_code == 200
    assert shared.upload(*wheel("app_pkg", "4.0")).status_code == 200
    run_index(shared.root, "yank", "app-pkg", "4.0", "--reason", "does not load")
    assert shared.upload(*wheel("libdep", "1.0+cu130")).status_code == 200
    big = {"variant_pkg/blob": os.urandom(2 << 20)}
    for minor in range(10):
        item = wheel("variant_pkg", f"2.8.3+torch2.{minor}", requires=(f"torch==2.{minor}.*",), files=big)
        assert shared.upload(*item).status_code == 200
        assert shared.upload(*wheel("torch", f"2.{minor}.0")).status_code == 200
    return shared


@pytest.mark.parametrize("pip", ["pip", "pip==23.0"])
def test_pip_reads_page_metadata_and_wheel(filled: Server, tmp_path: Path, pip: str) -> None:
    filled.forget()
    python = tool(pip) / "python"
    call([python, "-m", "pip", "install", "--no-cache-dir", "--no-input", "--target", tmp_path / "t",
          "--index-url", filled.url + "/simple/", "app_pkg", "torch==2.3.*"])  # fmt: skip
    installed = sorted(path.name for path in (tmp_path / "t").glob("*.dist-info"))
    assert installed == [
        "app_pkg-2.0.dist-info",
        "libdep-1.0+cu130.dist-info",
        "torch-2.3.0.dist-info",
        "variant_pkg-2.8.3+torch2.3.dist-info",
    ]
    lines = read_by(filled, "pip/")
    assert {line.status for line in lines} == {200}
    if pip == "pip==23.0":
        return  # older than PEP 714's new key, and unable to read the old key with a digest: it downloads every wheel
    assert kinds(lines).count("wheel") == 4, "only the installed wheels"
    assert sum(line.size for line in lines if not line.target.endswith(".whl")) < 50_000


def test_uv_installs_and_asks_again_politely(filled: Server, tmp_path: Path) -> None:
    venv.create(tmp_path / "v")
    arguments = [*UV, "pip", "install", "--python", tmp_path / "v/bin/python", "--cache-dir", tmp_path / "cache",
                 "--default-index", filled.url + "/simple/"]  # fmt: skip
    filled.forget()
    call([*arguments, "app_pkg", "torch==2.3.*"])
    first = read_by(filled, "uv/")
    assert kinds(first).count("wheel") == 4
    assert not [line for line in first if line.method == "HEAD" or line.span != "-"], "metadata is fetched by PEP 658"
    filled.forget()
    call([*arguments, "--refresh", "--reinstall", "app_pkg", "torch==2.3.*"])
    again = read_by(filled, "uv/")
    assert again
    assert {line.status for line in again if line.target.startswith("/simple/")} == {304}
    assert sum(line.size for line in again) == 0, "all cached pages were valid"


def test_what_was_just_published_is_installed_at_once(filled: Server, dist: Path, tmp_path: Path) -> None:
    """Build, publish and install in one job, with uv's cache from an earlier job."""
    name = next(dist.glob("*.whl")).name.split("-")[0]
    install = [*UV, "pip", "install", "--python", sys.executable, "--cache-dir", tmp_path / "cache",
               "--default-index", filled.url + "/simple/", name, "--target"]  # fmt: skip
    twine(filled, dist)
    call([*install, tmp_path / "first"])
    filename, content = wheel(name, "1.1")
    (dist / filename).write_bytes(content)
    call([*UV, "publish", "--publish-url", filled.url + "/legacy/", dist / filename], UV_PUBLISH_TOKEN=filled.token)
    call([*install, tmp_path / "second"])
    assert (tmp_path / "second" / f"{name}-1.1.dist-info").is_dir(), "uv used the cached page"


def test_uv_takes_the_wheel_of_its_cuda_from_that_view(filled: Server, tmp_path: Path) -> None:
    """The command of the quick start: the view first, missing projects from the default index (here our own)."""
    for cuda in ("cu124", "cu130"):
        assert filled.upload(*wheel("conv_pkg", f"1.7.0+{cuda}", requires=("libdep",))).status_code == 200
    venv.create(tmp_path / "v")
    for cuda in ("cu130", "cu124"):
        filled.forget()
        call([*UV, "pip", "install", "--python", tmp_path / "v/bin/python", "--no-cache", "--reinstall",
              "--default-index", filled.url + "/simple/", "--index", f"{filled.url}/{cuda}/simple/", "conv_pkg"])  # fmt: skip
        folders = sorted(path.name for path in (tmp_path / "v").rglob("conv_pkg*.dist-info"))
        assert folders == [f"conv_pkg-1.7.0+{cuda}.dist-info"]
        assert f"/{cuda}/simple/conv-pkg/" in [line.target for line in read_by(filled, "uv/")]


@pytest.mark.parametrize("client", ["pip", "uv"])
def test_resolving_over_variants_costs_kilobytes(filled: Server, tmp_path: Path, client: str) -> None:
    filled.forget()
    wanted = ["variant_pkg==2.8.3", "torch==2.0.*"]
    if client == "pip":
        call([sys.executable, "-m", "pip", "install", "--dry-run", "--no-cache-dir", "--ignore-installed",
              "--target", tmp_path,
              "--report", tmp_path / "r", "--index-url", filled.url + "/simple/", *wanted])  # fmt: skip
        assert json.loads((tmp_path / "r").read_text())["install"]
    else:
        (tmp_path / "in").write_text("\n".join(wanted))
        process = call(
            [*UV, "pip", "compile", tmp_path / "in", "--cache-dir", tmp_path / "c", "--default-index", filled.url + "/simple/"]
        )
        assert "variant-pkg==2.8.3+torch2.0" in process.stdout
    lines = read_by(filled, "pip/" if client == "pip" else "uv/")
    assert "wheel" not in kinds(lines)
    assert sum(line.size for line in lines) <= 50_000


def test_clients_that_ask_for_dates_find_them(filled: Server, tmp_path: Path) -> None:
    venv.create(tmp_path / "v")
    base = [*UV, "pip", "install", "--dry-run", "--python", tmp_path / "v/bin/python", "--cache-dir", tmp_path / "c"]
    index = ["--default-index", filled.url + "/simple/"]
    call([*base, *index, "--exclude-newer", "2099-01-01", "libdep"])
    assert call([*base, *index, "--exclude-newer", "2020-01-01", "libdep"], check=False).returncode != 0
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-cache-dir",
        "--index-url",
        filled.url + "/simple/",
    ]
    call([*pip, "--uploaded-prior-to", "2099-01-01T00:00:00Z", "libdep"])
    assert call([*pip, "--uploaded-prior-to", "2020-01-01T00:00:00Z", "libdep"], check=False).returncode != 0


def test_uv_locks_one_sha256_for_each_file(filled: Server, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11,<3.13"\ndependencies = ["libdep"]\n'
        f'[[tool.uv.index]]\nname = "farm"\nurl = "{filled.url}/cu130/simple/"\nexplicit = true\n'
        '[tool.uv.sources]\nlibdep = { index = "farm" }\n'
    )
    python = ["--python", sys.executable]
    environment = {key: value for key, value in clean().items() if key != "UV_NO_CONFIG"}  # the project's own tables count
    process = subprocess.run(
        [*UV, "lock", *python, "--cache-dir", str(tmp_path / "c"), "--default-index", filled.url + "/simple/"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "uv.lock").read_text()
    assert f"sha256:{hashlib.sha256(wheel('libdep', '1.0+cu130')[1]).hexdigest()}" in text
    assert "/cu130/simple/" in text


# --- publishing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dist(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A wheel and an sdist of a new project."""
    name = "dist_" + hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    folder = tmp_path / "dist"
    folder.mkdir()
    for filename, content in (wheel(name, "1.0"), sdist(name, "1.0")):
        (folder / filename).write_bytes(content)
    return folder


def twine(server: Server, dist: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    files = sorted(dist.iterdir())
    return call(
        [sys.executable, "-m", "twine", "upload", "--non-interactive", "--disable-progress-bar", "--verbose",
         "--repository-url", server.url + "/legacy/", *files],
        check=check, TWINE_USERNAME="__token__", TWINE_PASSWORD=server.token,
    )  # fmt: skip


def test_twine_uploads_and_repeats(filled: Server, dist: Path) -> None:
    twine(filled, dist)
    twine(filled, dist)
    name = min(dist.iterdir()).name.partition("-")[0]
    assert len(filled.filenames(name.replace("_", "-"))) == 2
    path = next(dist.glob("*.whl"))
    path.write_bytes(wheel(name, "1.0", requires_python=None)[1])
    process = twine(filled, dist, check=False)
    assert process.returncode != 0
    assert "File already exists" in process.stdout + process.stderr


def test_twine_at_the_installers_address_is_told_where_to_go(filled: Server, dist: Path) -> None:
    """A file larger than the socket buffers: a server that does not read it disconnects twine before it reads the answer."""
    name, content = wheel("astray_pkg", files={"astray_pkg/blob": os.urandom(20 << 20)})
    (dist / name).write_bytes(content)
    for path in ("/simple/", "/cu130/simple/", "/simple"):
        process = call(
            [sys.executable, "-m", "twine", "upload", "--non-interactive", "--disable-progress-bar", "--verbose",
             "--repository-url", filled.url + path, dist / name],
            check=False, TWINE_USERNAME="__token__", TWINE_PASSWORD=filled.token,
        )  # fmt: skip
        assert process.returncode != 0
        assert "for installers; upload to /legacy/" in " ".join((process.stdout + process.stderr).split())


def test_uv_publish_and_its_check_url(filled: Server, dist: Path) -> None:
    publish = [*UV, "publish", "--publish-url", filled.url + "/legacy/", *sorted(dist.iterdir())]
    environment = {"UV_PUBLISH_TOKEN": filled.token}
    call(publish, **environment)
    call(publish, **environment)
    checked = [*publish, "--check-url", filled.url + "/simple/"]
    filled.forget()
    process = call(checked, **environment)
    assert "already exists" in process.stderr
    assert not [line for line in filled.requests() if line.method == "POST"]
    name = min(dist.iterdir()).name.partition("-")[0]
    next(dist.glob("*.whl")).write_bytes(wheel(name, "1.0", requires_python=None)[1])
    assert call(checked, check=False, **environment).returncode != 0


@pytest.mark.slow
def test_ten_twines_and_ten_uvs_of_one_address_upload_at_once(tmp_path: Path) -> None:
    """Only one place: without the queue, all concurrent uploads except the first would be refused."""
    with serving(tmp_path / "root", "--allow-new", "--open-uploads-per-client", "1") as server:

        def publish(number: int) -> str:
            name, content = wheel(f"parallel_{number}", files={f"parallel_{number}/blob": os.urandom(4 << 20)})
            path = tmp_path / name
            path.write_bytes(content)
            twine = [sys.executable, "-m", "twine", "upload", "--non-interactive", "--disable-progress-bar",
                     "--repository-url", server.url + "/legacy/", path]  # fmt: skip
            uv = [*UV, "publish", "--publish-url", server.url + "/legacy/", path]
            secrets = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": server.token, "UV_PUBLISH_TOKEN": server.token}
            process = call(twine if number % 2 else uv, check=False, **secrets)
            return "" if process.returncode == 0 else process.stdout + process.stderr

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(publish, range(20))) == [""] * 20
        assert len(server.client.get("/simple/", headers={"Accept": JSON}).json()["projects"]) == 20


def test_a_wrong_token_is_told(filled: Server, dist: Path) -> None:
    process = call(
        [*UV, "publish", "--publish-url", filled.url + "/legacy/", *sorted(dist.iterdir())],
        check=False,
        UV_PUBLISH_TOKEN="gf_no",
    )
    assert process.returncode != 0
    assert "401" in process.stderr


# --- readers ----------------------------------------------------------------------------------------------------------------


def test_pypi_simple_reads_everything_and_both_forms_agree(filled: Server) -> None:
    with PyPISimple(filled.url + "/simple/") as client:
        names = client.get_index_page().projects
        assert "app-pkg" in names
        for name in ("app-pkg", "variant-pkg", "torch"):
            page = client.get_project_page(name, accept=ACCEPT_JSON_ONLY)
            plain = client.get_project_page(name, accept=ACCEPT_HTML_ONLY)
            assert page.repository_version == plain.repository_version == "1.4"
            assert page.versions

            def key(package: object) -> tuple[object, ...]:
                return tuple(
                    getattr(package, part)
                    for part in (
                        "filename",
                        "digests",
                        "requires_python",
                        "is_yanked",
                        "has_metadata",
                        "metadata_digests",
                        "url",
                    )
                )

            assert [key(package) for package in page.packages] == [key(package) for package in plain.packages]
            for package in page.packages[:2]:
                raw = client.get_package_metadata_bytes(package, verify=True)
                assert raw.startswith(b"Metadata-Version:")
                assert package.size
                assert package.upload_time is not None


@pytest.mark.slow
def test_simple_repository_can_consume_us(filled: Server) -> None:
    python = tool("simple-repository", "httpx") / "python"
    script = (
        "import asyncio, httpx, sys\n"
        "from simple_repository.components.http import HttpRepository\n"
        "async def main():\n"
        "    async with httpx.AsyncClient() as client:\n"
        "        repository = HttpRepository(url=sys.argv[1], http_client=client)\n"
        "        page = await repository.get_project_page('app-pkg')\n"
        "        names = {project.normalized_name for project in (await repository.get_project_list()).projects}\n"
        "        assert 'app-pkg' in names\n"
        "        print(len(page.files), all(file.hashes.get('sha256') for file in page.files))\n"
        "asyncio.run(main())\n"
    )
    assert call([python, "-c", script, filled.url + "/simple/"]).stdout.split() == ["4", "True"]


@pytest.mark.slow
def test_poetry_locks_by_metadata(filled: Server, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11,<3.13"\n'
        'dependencies = ["app-pkg (==2.0)", "torch (==2.3.0)"]\n'
        f'[[tool.poetry.source]]\nname = "farm"\nurl = "{filled.url}/simple/"\npriority = "primary"\n'
    )
    filled.forget()
    call(
        [tool("poetry") / "poetry", "lock", "-n"],
        cwd=tmp_path,
        POETRY_CACHE_DIR=str(tmp_path / "c"),
        POETRY_VIRTUALENVS_CREATE="0",
    )
    text = (tmp_path / "poetry.lock").read_text()
    assert "2.8.3+torch2.3" in text
    assert "wheel" not in kinds(read_by(filled, "poetry/"))


def test_the_negotiation_table_is_also_another_librarys(filled: Server) -> None:
    """A client that prefers JSON gets JSON, as in the example of PEP 691."""
    accept = f"{JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"
    assert filled.page("app-pkg", accept=accept).headers["content-type"] == JSON
