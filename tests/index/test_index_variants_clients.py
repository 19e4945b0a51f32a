"""Wheel variants (PEP 825): at one address, the real uv installs the machine's wheel, and other clients the plain wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from index_kit import Server, run_index, tool
from variants_kit import TAGS, VARIANTS, farm, filled, plain_wheel, variant_wheel

__all__ = ["farm", "filled"]

UV = "uv==0.13.9"
"The version of uv that supports variants.SCHEMA; preview features change between versions."
SWITCH = ["--preview-features", "wheel-variants"]


def machine(driver: str, sm: str) -> dict[str, str]:
    """An environment that makes uv detect this driver and GPU."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "NV_VARIANT_"))}
    return {
        **kept,
        "UV_NO_CONFIG": "1",
        "NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION": driver,
        "NV_VARIANT_PROVIDER_FORCE_SM_ARCH": sm,
    }


def uv() -> Path:
    """The uv with support for variants, from a separate environment."""
    return tool(UV) / "uv"


def run(arguments: list[object], env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(item) for item in arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def installed(folder: Path, name: str) -> str:
    """The installed variant in an environment."""
    (path,) = folder.glob(f"**/{name}/__init__.py")
    return path.read_text().split("'")[1]


@pytest.mark.parametrize(
    ("driver", "sm", "wanted"),
    [
        ("13.0", "9.0", "cu130_sm90"),
        ("13.0", "10.0", "cu130_sm100"),
        ("12.8", "9.0", "cu124_sm90"),
        ("12.8", "7.5", "null"),
    ],
)
def test_uv_takes_the_wheel_of_the_machine(filled: Server, tmp_path: Path, driver: str, sm: str, wanted: str) -> None:
    """Four machines install four different wheels from one address."""
    venv.create(tmp_path / "v")
    process = run(
        [uv(), *SWITCH, "pip", "install", "--python", tmp_path / "v/bin/python", "--no-cache",
         "--default-index", filled.url + "/simple/", "choice-pkg"],
        machine(driver, sm),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert installed(tmp_path / "v", "choice_pkg") == wanted


@pytest.mark.parametrize("client", ["pip", "pip==23.0", "uv"])
def test_a_client_that_knows_no_variants_takes_the_plain_wheel(filled: Server, tmp_path: Path, client: str) -> None:
    target = ["--target", tmp_path / "here", "--index-url", filled.url + "/simple/", "choice-pkg"]
    command: list[object] = [uv(), "pip", "install", "--no-cache", "--python", sys.executable]
    if client != "uv":
        command = [tool(client) / "python", "-m", "pip", "--isolated", "install", "--no-cache-dir"]
    process = run([*command, *target], machine("13.0", "9.0"))
    assert process.returncode == 0, process.stderr
    assert installed(tmp_path / "here", "choice_pkg") == "plain"


def test_the_project_page_names_a_view_for_each_cuda_and_torch(farm: Server, tmp_path: Path) -> None:
    """uv takes the highest local version, so /simple/ would install a wheel for another torch."""
    for local in ("cu130.torch2.10", "cu130.torch2.11", "cu124.torch2.11", "cu130"):
        item = variant_wheel("torch_pkg", f"{local[:5]}_sm90", f"1.0+{local}")
        assert farm.upload(*item).status_code == 200
    assert farm.upload(*variant_wheel("torch_pkg", "cu130_sm90", "1.0+cu130.torch2.12")).status_code == 200
    run_index(farm.root, "yank", "torch-pkg", "1.0+cu130.torch2.12")
    commands = commands_for_uv(farm, "torch-pkg")
    views = ("cu124-torch2.11", "cu130", "cu130-torch2.10", "cu130-torch2.11")
    assert commands == [f"{farm.url}/{view}/simple/" for view in views]
    for address, local in ((commands[2], "cu130.torch2.10"), (commands[3], "cu130.torch2.11")):
        folder = tmp_path / local
        venv.create(folder)
        process = run(
            [uv(), *SWITCH, "pip", "install", "--python", folder / "bin/python", "--no-cache",
             "--default-index", address, "torch-pkg"],
            machine("13.0", "9.0"),
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert f" + torch-pkg==1.0+{local}\n" in process.stderr


def test_the_project_page_names_one_address_if_any_torch_is_right(filled: Server) -> None:
    assert commands_for_uv(filled, "choice-pkg") == [f"{filled.url}/simple/"]
    night = variant_wheel("choice_night_pkg", "cu130_sm90", "1.0.dev1")
    assert filled.upload(*night, path="/nightly/legacy/").status_code == 200
    assert commands_for_uv(filled, "choice-night-pkg") == [f"{filled.url}/nightly/simple/"]
    assert filled.upload(*plain_wheel("choice_plain_pkg")).status_code == 200
    assert commands_for_uv(filled, "choice-plain-pkg") == []


def commands_for_uv(server: Server, project: str) -> list[str]:
    """The addresses in the project page's commands for variants."""
    page = server.client.get(f"/project/{project}/").text
    return re.findall(rf"uv pip install --preview-features wheel-variants --index (\S+) {project}</code>", page)


def test_the_lock_of_a_set_lets_uv_choose_by_hash(farm: Server, tmp_path: Path) -> None:
    run_index(farm.root, "stage", "create", "hashed")
    for item in (plain_wheel("hash_pkg"), *(variant_wheel("hash_pkg", label) for label in VARIANTS)):
        assert farm.upload(*item, path="/stage/hashed/legacy/").status_code == 200
    run_index(farm.root, "stage", "publish", "hashed")
    venv.create(tmp_path / "v")
    process = run(
        [uv(), *SWITCH, "pip", "install", "--python", tmp_path / "v/bin/python", "--no-cache", "--require-hashes", "--no-deps",
         "--default-index", farm.url + "/hashed/simple/", "-r", farm.url + "/hashed/requirements.lock"],
        machine("12.8", "9.0"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert installed(tmp_path / "v", "hash_pkg") == "cu124_sm90"


def project_of(server: Server, folder: Path, dependency: str) -> list[object]:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["{dependency}"]\n'
    )
    return ["--python", sys.executable, "--no-cache", "--default-index", server.url + "/simple/"]


def test_uv_lock_and_sync_take_the_plain_wheel(filled: Server, tmp_path: Path) -> None:
    """uv 0.13 does not lock variants, so a release requires a plain wheel."""
    options = project_of(filled, tmp_path / "p", "choice-pkg")
    for command in ("lock", "sync"):
        process = run([uv(), *SWITCH, command, *options], machine("13.0", "9.0"), tmp_path / "p")
        assert process.returncode == 0, process.stderr
    assert f"choice_pkg-1.0-{TAGS}.whl" in (tmp_path / "p" / "uv.lock").read_text()
    assert installed(tmp_path / "p" / ".venv", "choice_pkg") == "plain"

    assert filled.upload(*variant_wheel("alone_pkg", "cu130_sm90")).status_code == 200
    process = run(
        [uv(), *SWITCH, "lock", *project_of(filled, tmp_path / "q", "alone-pkg")], machine("13.0", "9.0"), tmp_path / "q"
    )
    assert process.returncode != 0, "uv locks variants now: update docs/reference/index-variants.md"
    assert "only unsupported wheel variants" in process.stderr


def test_uv_cannot_write_a_pylock_with_a_variant(filled: Server, tmp_path: Path) -> None:
    (tmp_path / "requirements.in").write_text("choice-pkg\n")
    command = [uv(), *SWITCH, "pip", "compile", "--format", "pylock.toml", "--no-cache", "--python", sys.executable,
               "--default-index", filled.url + "/simple/", tmp_path / "requirements.in"]  # fmt: skip
    process = run(command, machine("13.0", "9.0"))
    assert process.returncode != 0, "uv writes variants now: update docs/reference/index-variants.md"
    assert "variant" in process.stderr


@pytest.mark.slow
def test_poetry_installs_the_plain_wheel(filled: Server, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11,<3.14"\ndependencies = ["choice-pkg"]\n'
        "[tool.poetry]\npackage-mode = false\n"
        f'[[tool.poetry.source]]\nname = "farm"\nurl = "{filled.url}/simple/"\npriority = "primary"\n'
    )
    settings = {"POETRY_CACHE_DIR": str(tmp_path / "c"), "POETRY_VIRTUALENVS_IN_PROJECT": "1"}
    settings["PYTHON_KEYRING_BACKEND"] = "keyring.backends.null.Keyring"
    process = run([tool("poetry==2.5.1") / "poetry", "install", "-n"], {**machine("13.0", "9.0"), **settings}, tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert installed(tmp_path / ".venv", "choice_pkg") == "plain"


def test_uv_that_asks_for_dates_finds_variants(farm: Server, tmp_path: Path) -> None:
    venv.create(tmp_path / "v")
    for item in (plain_wheel("dated_pkg"), variant_wheel("dated_pkg", "cu130_sm90")):
        assert farm.upload(*item).status_code == 200
    command = [uv(), *SWITCH, "pip", "install", "--python", tmp_path / "v/bin/python", "--no-cache", "--exclude-newer"]
    rest = ["--default-index", farm.url + "/simple/", "dated-pkg"]
    between = datetime.now(UTC) + timedelta(milliseconds=5)  # uv compares milliseconds
    time.sleep(0.05)
    assert farm.upload(*variant_wheel("dated_pkg", "cu130_sm100")).status_code == 200
    process = run([*command, between.isoformat(), *rest], machine("13.0", "9.0"))
    assert process.returncode == 0, process.stderr
    assert installed(tmp_path / "v", "dated_pkg") == "cu130_sm90"
