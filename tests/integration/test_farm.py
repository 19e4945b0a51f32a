"""`builder build --farm` on a cluster that is started for it, and with addresses that are none."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from builder.farm import code
from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import REPOSITORY, Farm

NATIVE = host_arch().value
OTHER = "aarch64" if NATIVE == "x86_64" else "x86_64"
QUICK = "return wheel(wheel_directory)"


def test_cells_build_on_a_cluster_that_is_started_for_them(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(QUICK))
    farm.recipe("broken", projects.backend("raise OSError('no luck')"))
    command = ("build", "tiny", "broken", "--matrix", f"target={NATIVE}", "--farm", "local")
    quick = {"RAY_worker_niceness": "0"}  # Ray's own workers give way to everything else on this machine
    ended = farm.run(*command, **quick)
    assert ended.code == 50, ended.said
    name = f"tiny:bare:{NATIVE}"
    lines = [line for line in ended.err.splitlines() if line.startswith(name)]
    assert any("compile  tiny-1.0-py3-none-any.whl in" in line for line in lines), ended.err
    assert "no luck" in ended.said
    assert "1 of 2 cells failed" in ended.said
    table = [line.split()[1:3] for line in ended.err.splitlines() if line.startswith("   matrix")]
    assert table == [["built", "tiny"], ["failed", "broken"], ["1", "built,"]]
    found = json.loads(farm.run("show", "tiny", "--json").out)
    assert ended.out.strip() == f"{farm.settings.home}/builds/{found['build_id']}/dist/tiny-1.0-py3-none-any.whl"
    # The next time, nothing is sent for what is here.
    again = farm.run(*command, **quick)
    assert "cells: 1; workers: 1, at local" in again.said
    assert "tiny 1.0 for" in again.said
    assert "built already" in again.said


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "exit_code", "words"),
    [
        ("ray://127.0.0.1:1", 51, "no Ray cluster answers at ray://127.0.0.1:1: Connection refused remedy: start the cluster"),
        ("127.0.0.1:1", 51, "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        ("ray://no.such.host.invalid:10001", 51, "no Ray cluster answers at ray://no.such.host.invalid:10001: "),
        (
            "http://head:8265",
            2,
            "this is the address of Ray's Jobs API, which cannot return wheels remedy: use --farm ray://head:10001",
        ),
        ("head", 2, "not an address of a Ray cluster"),
        ("ray://head:99999999", 51, "no Ray cluster answers at ray://head:99999999: "),
    ],
)
def test_an_address_where_no_cluster_is(farm: Farm, address: str, exit_code: int, words: str) -> None:
    farm.recipe("tiny", projects.backend(QUICK))
    ended = farm.run("build", "tiny", "--target", NATIVE, "--farm", address)
    assert (ended.code, "Traceback" in ended.said) == (exit_code, False), ended.said
    assert words in ended.said


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("listener", "reason"),
    [
        ("deaf", "the port does not answer within 10 s"),
        ("web", "this port belongs to a different program, or to a different service of Ray"),
    ],
)
def test_an_address_where_something_else_listens(
    farm: Farm, request: pytest.FixtureRequest, listener: str, scheme: str, reason: str
) -> None:
    address = f"{scheme}127.0.0.1:{request.getfixturevalue(listener)}"
    farm.recipe("tiny", projects.backend(QUICK))
    ended = farm.run("build", "tiny", "--target", NATIVE, "--farm", address)
    assert ended.code == 51, ended.said
    step, error, remedy = ended.err.splitlines()
    assert f"connecting to {address}" in step
    assert error == f"error: no Ray cluster answers at {address}: {reason}"
    assert remedy.startswith("remedy: start the cluster"), "and Ray prints nothing"


def test_a_farm_builds_in_the_sandbox_alone(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(QUICK))
    ended = farm.run("build", "tiny", "--toolchain", "host", "--farm", "local")
    assert ended.code == 2
    assert "--farm supports only the sandbox toolchain remedy: omit --toolchain host" in ended.said


def test_without_ray_the_extra_is_named(farm: Farm, tmp_path: object) -> None:
    farm.recipe("tiny", projects.backend(QUICK))
    program = "import sys; sys.modules['ray'] = None; sys.argv[0] = 'builder'; from builder.cli import main; main()"
    import subprocess

    ended = subprocess.run(
        [sys.executable, "-c", program, "build", "tiny", "--target", NATIVE, "--farm", "local"],
        env=projects.environment(farm.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 4, ended.stderr
    assert "remedy: run `pip install 'gracefarm[farm]'`" in ended.stderr


def test_the_archive_of_a_project_is_the_same_for_the_same_files(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend(QUICK))
    packed = code.pack(farm.settings.project)
    assert packed == code.pack(farm.settings.project)
    folder = code.unpack(packed, farm.settings.home)
    assert (folder / "recipes" / "tiny" / "recipe.toml").read_bytes() == (
        farm.settings.project / "recipes" / "tiny" / "recipe.toml"
    ).read_bytes()
    assert code.pack(folder) == packed
    assert (REPOSITORY / "matrix.toml").read_text() not in packed.decode(errors="replace")
