"""Views: one address for each CUDA and torch version, and one for nightly builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from index_kit import AARCH64, JSON, Server, run_index, wheel


def test_a_view_for_each_cuda(shared: Server) -> None:
    for version in ("1.0+cu124", "1.0+cu130", "1.0+cu.12.8.torch.2.11", "1.0"):
        assert shared.upload(*wheel("cuda_pkg", version, AARCH64, requires=("torch==2.11.*",))).status_code == 200
    for cuda, local in (("cu124", "cu124"), ("cu130", "cu130"), ("cu128", "cu.12.8.torch.2.11")):
        names = shared.filenames("cuda-pkg", prefix=f"/{cuda}-torch2.11")
        assert names == [f"cuda_pkg-1.0+{local}-{AARCH64}.whl"], "its requirements pin this torch"
        assert shared.filenames("cuda-pkg", prefix=f"/{cuda}") == []
    assert len(shared.filenames("cuda-pkg")) == 4
    listed = next(item for item in shared.page("cuda-pkg").json()["files"] if "+cu130" in item["filename"])
    assert (listed["_cuda"], listed["_torch"], listed["_glibc"]) == ("13.0", "2.11", "2.34")
    item = shared.page("cuda-pkg", prefix="/cu130-torch2.11").json()["files"][0]
    assert shared.client.get("/cu130-torch2.11/simple/cuda-pkg/" + item["url"]).status_code == 200
    projects = shared.client.get("/cu130-torch2.11/simple/", headers={"Accept": JSON}).json()["projects"]
    assert projects == [{"name": "cuda-pkg"}]


def test_a_view_for_each_cuda_and_torch(server: Server, tmp_path: Path) -> None:
    """pip installs the highest local version, so a view must not contain wheels for two torch versions."""
    locals_ = ("", "+cu130", "+cu130.torch2.10", "+cu130.torch2.11", "+torch2.11", "+cu124torch2.11")
    for local in locals_:
        assert server.upload(*wheel("stack_pkg", f"1.0{local}", requires=("torch",))).status_code == 200
    for view, shown in (
        ("/cu130", ["+cu130"]),
        ("/cu130-torch2.10", ["+cu130", "+cu130.torch2.10"]),
        ("/cu130-torch2.11", ["+cu130", "+cu130.torch2.11", "+torch2.11"]),
        ("/cu124-torch2.11", ["+torch2.11", "+cu124torch2.11"]),
        ("", list(locals_)),
    ):
        assert server.filenames("stack-pkg", prefix=view) == [f"stack_pkg-1.0{local}-py3-none-any.whl" for local in shown]

    for name in ("cu131", "cu130-torch2.12", "cu130-torch", "absent"):
        answer = server.client.get(f"/{name}/simple/stack-pkg/", headers={"Accept": JSON})
        assert answer.status_code == 404
        assert "/simple/, /cu124/simple/, /cu124-torch2.11/simple/, /cu130/simple/, /cu130-torch2.10/simple/" in answer.text
    assert server.upload(*wheel("bound_pkg", "1.0+cu130.torch2.11")).status_code == 200
    for view in ("cu130", "cu130-torch2.10"):
        answer = server.client.get(f"/{view}/simple/bound-pkg/", headers={"Accept": JSON})
        assert answer.status_code == 404
        assert "use one of these addresses: /cu130-torch2.11/simple/" in answer.text

    assert server.upload(*wheel("torch", "2.10.0")).status_code == 200
    for view, local in (("cu130", "+cu130"), ("cu130-torch2.10", "+cu130.torch2.10")):
        subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "install", "--no-cache-dir", "--no-deps",
             "--disable-pip-version-check", "--target", str(tmp_path / view),
             "--index-url", f"{server.url}/{view}/simple/", "stack_pkg"],
            check=True, capture_output=True,
        )  # fmt: skip
        assert (tmp_path / view / f"stack_pkg-1.0{local}.dist-info").is_dir()

    run_index(server.root, "export", str(tmp_path / "tree"))
    page = tmp_path / "tree" / "cu130-torch2.11" / "simple" / "stack-pkg" / "index.json"
    assert page.read_bytes() == server.page("stack-pkg", prefix="/cu130-torch2.11").content


def test_nightlies_are_in_their_own_view_alone(shared: Server) -> None:
    assert shared.upload(*wheel("night_pkg", "1.0.dev1"), path="/nightly/legacy/").status_code == 200
    assert shared.filenames("night-pkg") == []
    assert shared.filenames("night-pkg", prefix="/nightly") == ["night_pkg-1.0.dev1-py3-none-any.whl"]


def test_a_nightly_becomes_a_release(shared: Server) -> None:
    name, content = wheel("promoted_pkg")
    assert shared.upload(name, content, path="/nightly/legacy/").status_code == 200
    assert shared.filenames("promoted-pkg") == []
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("promoted-pkg") == [name]
    assert shared.filenames("promoted-pkg", prefix="/nightly") == []
    assert shared.upload(name, content, path="/nightly/legacy/").status_code == 200
    assert shared.filenames("promoted-pkg") == [name], "a release does not become a nightly again"
