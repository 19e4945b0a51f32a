"""A node of another architecture: an aarch64 wheel of the builder, from the index by hash, onto an arm64 userland over SSH."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import httpx
import pytest

from deploy.fleet.shells import remote_nodes
from deploy.fleet.ssh import Fleet
from deploy.rehearsal import source
from deploy.rehearsal.rig import GATEWAY, MOUNT, open_rig
from deploy.steps import environment, uv
from deploy.steps.environment import Matrix, Module
from gracefarm import settings
from gracefarm.console import Console
from gracefarm.errors import InstallError
from tests import projects
from tests.conftest import Farm
from tests.deploy import rigkit
from tests.deploy.userland import arm64

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="on aarch64 every node has this architecture"),
]
CODE = "import tiny_c, os; assert os.uname().machine == 'aarch64'; assert tiny_c.add(2, 3) == 5"


def test_the_farms_own_aarch64_wheel_arrives_by_hash_and_is_imported(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = settings.load()
    pinned = json.loads(Path(environment.__file__).parent.with_name("data").joinpath("uv.json").read_text())
    wheel = pinned["wheels"]["aarch64"]
    uv.fetch_uv(pinned["version"], wheel["tag"], wheel["sha256"], here)

    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    root = tmp_path / "index"
    source.index_command(root, "host", "tiny-c")
    token = source.index_command(root, "token", "create", "--name", "farm")["token"]
    serve = [sys.executable, "-m", "index", "--root", str(root), "--json", "serve"]
    with source.listening([*serve, "--port", "0"]) as url:
        credentials = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
        done = farm.run("build", "tiny_c", "--target", "aarch64", "--publish", f"{url}/legacy/", **credentials)
        assert done.code == 0, done.said
        page = httpx.get(f"{url}/simple/tiny-c/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}).json()
        digest = page["files"][0]["hashes"]["sha256"]

    matrix = Matrix(modules=(Module(module="tiny_c", code=CODE), Module(module="tiny_c._core")))
    monkeypatch.setattr(environment, "matrix", lambda _engine: matrix)
    with open_rig(tmp_path / "rig", count=1, specs={"k0": arm64(here.home)}) as room:
        with source.listening(room.command([*serve, "--host", GATEWAY, "--port", "8090"])) as url:

            async def up(lock: str) -> environment.Built:
                async with Fleet(rigkit.inventory(room), known_hosts=room.known_hosts, config=[]) as made:
                    spec = environment.EnvironmentSpec(
                        root=f"{MOUNT}/gracefarm", lock=lock, index=f"{url}/simple/", engine="tiny"
                    )
                    return await environment.build_and_activate(remote_nodes(made), spec, here, Console())

            with room.inside():
                outcome = asyncio.run(up(f"tiny-c==1.0 --hash=sha256:{digest}\n"))
                with pytest.raises(InstallError):  # a wheel that is not there, for this architecture or any other
                    asyncio.run(up(f"tiny-c==2.0 --hash=sha256:{digest}\n"))
        assert outcome.built
        assert [row["name"] for row in outcome.rows["k0"]] == ["tiny_c", "tiny_c._core"]
        assert all("error" not in row for row in outcome.rows["k0"])
        library = next((room.share / "gracefarm").rglob("tiny_c/_core*.so"))
        assert library.read_bytes()[18:20] == b"\xb7\x00"  # e_machine: aarch64
        said = rigkit.said(rigkit.run(room, f"{MOUNT}/gracefarm/env/bin/python -c 'import tiny_c; print(tiny_c.add(20, 3))'"))
        assert said == {"k0": "23"}
