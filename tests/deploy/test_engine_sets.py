"""What deploy starts an engine with is in the set that brings it: lock, import matrix and the engine's table agree."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from builder.planning import pins, settings
from builder.sets import definition
from deploy.nodes import setlock
from deploy.nodes.config import Config
from deploy.nodes.deployment import Deployment
from deploy.planning import engines
from deploy.remote.environment import matrix
from deploy.steps import environment
from deploy.steps.setlock import require_engine
from gracefarm.errors import ConfigError
from tests.conftest import REPOSITORY

SETS = (
    ("aphrodite", "gh200-cu124"),
    ("vllm", "gh200-cu130"),
    ("vllm", "gh200-cu130-torch2.14"),
    ("vllm", "x86_64-cu130"),
    ("vllm", "x86_64-cu130-torch2.14"),
)
"Engine and set."
DISTRIBUTION = {"aphrodite": "aphrodite-engine", "vllm": "vllm"}
DASHBOARD = {
    "aiohttp",
    "aiohttp-cors",
    "colorful",
    "grpcio",
    "opencensus",
    "prometheus-client",
    "pydantic",
    "py-spy",
    "virtualenv",
}
"What `ray[default]` adds, of which `ray start --include-dashboard true` asks."
NEEDS = {
    "torch": {"torch"},
    "torch.cuda": {"torch"},
    "triton": {"triton"},
    "aphrodite_flash_attn_2_cuda": {"aphrodite-flash-attn"},
    "aphrodite._C": {"aphrodite-engine"},
    "vllm._C_stable_libtorch": {"vllm"},
    "vllm._moe_C_stable_libtorch": {"vllm"},
    "ray": {"ray"},
    "ray.dashboard.optional_deps": {"ray"} | DASHBOARD,
    "aphrodite run": {"aphrodite-engine"},
    "vllm serve": {"vllm"},
    "ray --version": {"ray"},
}
"A row of a matrix to the distributions that it needs. A row that is not here fails below."


def versions(name: str) -> dict[str, str]:
    """Distribution to version: from the set's lock and our wheels."""
    found = definition.load(name, settings.load().model_copy(update={"project": REPOSITORY}))
    locked = {wheel.name: wheel.version for wheel in pins.wheels(found.runtime, found.data.target)}
    return locked | {canonicalize_name(own_recipe.data.name): own_recipe.data.version for own_recipe in found.recipes}


@pytest.mark.parametrize(("name", "set_"), SETS)
def test_the_sets_lock_has_everything_that_its_import_matrix_asks_for(name: str, set_: str) -> None:
    wanted = environment.matrix(name)
    rows = [*(row.module for row in wanted.modules), *(" ".join(command[:2]) for command in wanted.commands)]
    assert {"ray", "ray.dashboard.optional_deps"} <= set(rows)  # the plan says --include-dashboard true
    have = versions(set_)
    assert {row: NEEDS[row] - set(have) for row in rows if NEEDS[row] - set(have)} == {}


@pytest.mark.parametrize(("name", "set_"), SETS)
def test_the_engine_is_planned_for_at_the_version_that_its_set_has(name: str, set_: str) -> None:
    version = versions(set_)[DISTRIBUTION[name]]
    assert version in engines.versions(name)
    if set_ != "gh200-cu124":  # which has no lock yet
        data = Config.model_validate({"engine": name, "set": set_})
        engine, _ = engines.planned_for(Deployment(path=Path("/nowhere/deploy.toml"), data=data, nodes=()))
        assert engine.version == version


def test_the_version_is_that_of_the_lock_that_will_be_used_as_far_as_it_is_known(tmp_path: Path) -> None:
    def version(**data: object) -> str | None:
        config = Config.model_validate({"set": "gh200-cu130-torch2.14", **data})
        return setlock.version_of(Deployment(path=tmp_path / "deploy.toml", data=config, nodes=()), "vllm")

    fetched = tmp_path / "gh200-cu130-torch2.14.lock"
    index = "http://127.0.0.1:9/gh200-cu130-torch2.14/simple/"
    assert version() == version(index=index) == "0.33.0"  # the lock in gracefarm, until that of the index is there
    fetched.write_text(f"vllm==0.34.1 --hash=sha256:{'0' * 64}\n")
    assert version() == version(index=index) == "0.34.1"
    assert version(lock="none.lock") is None
    assert version(set="own") is None
    fetched.write_text("not a lock\n")
    assert version(lock=fetched.name) is None
    assert engines.engine("vllm", "0.34.1").version == "0.33.0"
    assert engines.engine("vllm", "0.9.1").version == "0.26.0"


def test_the_remedy_for_a_set_without_aphrodite_names_a_set_that_builds_it() -> None:
    data = Config.model_validate({"engine": "aphrodite", "set": "gh200-cu130"})
    deployment = Deployment(path=Path("/nowhere/deploy.toml"), data=data, nodes=())
    with pytest.raises(ConfigError, match="gh200-cu130 has no aphrodite-engine") as error:
        require_engine(deployment, (REPOSITORY / "sets/gh200-cu130/requirements.lock").read_text())
    (named,) = re.findall(r'`set` to "([^"]+)"', error.value.remedy)
    found = definition.load(named, settings.load().model_copy(update={"project": REPOSITORY}))
    assert "aphrodite" in [loaded.key for loaded in found.recipes]
    assert (found.folder / "requirements.lock").is_file()


def test_a_minimal_ray_fails_its_row_of_the_matrix(tmp_path: Path) -> None:
    """`import ray` and `ray --version` pass with it; `ray start --include-dashboard true` would end after the weights came."""
    site = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    dashboard = site / "ray" / "dashboard"
    dashboard.mkdir(parents=True)
    for folder in (site / "ray", dashboard):
        (folder / "__init__.py").touch()
    (dashboard / "optional_deps.py").write_text("import aiohttp_cors\n")
    assert importlib.util.find_spec("aiohttp_cors") is None
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    wanted = [row for row in environment.matrix("aphrodite").modules if row.module.startswith("ray")]
    done = matrix(
        {"environment": str(tmp_path), "modules": [row.model_dump() for row in wanted], "commands": [], "seconds": 60}
    )
    assert [(row["name"], "error" in row) for row in done["rows"]] == [("ray", False), ("ray.dashboard.optional_deps", True)]
    assert "aiohttp_cors" in done["rows"][1]["error"]


@pytest.mark.skipif(
    not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="no C compiler or no Python.h",
)
@pytest.mark.parametrize("name", DISTRIBUTION)
def test_extensions_are_imported_as_they_are_linked_by_name_with_libraries_that_torch_has_loaded(
    name: str, tmp_path: Path
) -> None:
    """A wheel of flash-attn or of an engine's kernels needs libc10.so and has no RUNPATH: without torch it never imports.

    The libraries are a stand-in's, the linking is real.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    (site / "torch").mkdir()
    library = site / "torch" / "libc10.so"
    compiled(library, "int of_torch(void) { return 0; }", "-Wl,-soname,libc10.so")
    (site / "torch" / "__init__.py").write_text(f"import ctypes\nctypes.CDLL({str(library)!r})\n")
    extensions = [row for row in environment.matrix(name).modules if row.module.endswith(("_cuda", "_C", "_libtorch"))]
    assert extensions
    for extension in extensions:
        *parents, last = extension.module.split(".")
        for parent in parents:
            (site / parent).mkdir(exist_ok=True)
            (site / parent / "__init__.py").touch()
        # Multi-phase initialisation without a slot: the least that is a module.
        code = (
            "#include <Python.h>\nint of_torch(void);\n"
            f'static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{last}"}};\n'
            f"PyMODINIT_FUNC PyInit_{last}(void) {{ of_torch(); return PyModuleDef_Init(&module); }}\n"
        )
        place = site.joinpath(*parents, f"{last}.so")
        compiled(place, code, f"-I{sysconfig.get_path('include')}", f"-L{library.parent}", "-l:libc10.so")
    done = matrix(
        {
            "environment": str(tmp_path / "env"),
            "modules": [extension.model_dump() for extension in extensions],
            "commands": [],
            "seconds": 60,
        }
    )
    assert [row.get("error") for row in done["rows"]] == [None] * len(extensions)


def compiled(place: Path, code: str, *arguments: str) -> None:
    argv = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", str(place), *arguments]
    subprocess.run(argv, input=code, text=True, check=True)
