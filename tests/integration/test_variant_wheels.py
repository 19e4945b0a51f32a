"""`builder build --variant`: from a CUDA source to the wheel that the real uv chooses; pip takes the plain one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from builder.flow import run
from builder.proof import verify
from gracefarm import variants
from tests import projects
from tests.audit_kit import member
from tests.conftest import Farm

UV = "uv==0.13.9"
"The uv that reads variants.SCHEMA: preview features come and go with versions."
PLATFORM = "manylinux_2_17_aarch64"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def write(farm: Farm) -> None:
    farm.recipe(
        "tiny_cuda",
        projects.tree("tiny_cuda"),
        name="tiny-cuda",
        stack="cu130",
        build={"cuda": True, "memory_per_job": "1GiB"},
        smoke={"imports": ["tiny_cuda", "tiny_cuda._core"]},
    )


def built(farm: Farm, url: str, token: str, *options: str) -> Path:
    command = ("build", "tiny_cuda", "--publish", f"{url}/legacy/", *options)
    login = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
    done = projects.run_builder(command, {**farm.environment, **login}, timeout=3000)
    assert done.code == 0, done.said
    return Path(done.out.strip())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def installed(target: Path) -> str:
    """The build id of what was installed."""
    (place,) = target.glob("tiny_cuda-*.dist-info/gracefarm.json")
    return str(json.loads(place.read_text())["build_id"])


def uv_environment(driver: str, sm: str) -> dict[str, str]:
    """A machine that uv believes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "NV_VARIANT_"))}
    forced = {"NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION": driver, "NV_VARIANT_PROVIDER_FORCE_SM_ARCH": sm}
    return {**kept, "UV_NO_CONFIG": "1", **forced}


def install(command: Sequence[object], target: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return installed(target)


def test_uv_chooses_among_variants_that_the_builder_made_and_pip_takes_the_plain_wheel(farm: Farm, tmp_path: Path) -> None:
    write(farm)
    with run.local_index(farm.settings, "--variants") as (url, token):
        plain = built(farm, url, token, "--sm", "90+100")
        hopper = built(farm, url, token, "--variant")
        blackwell = built(farm, url, token, "--sm", "100", "--variant")
        stem = plain.name.removesuffix(".whl")
        assert stem == f"tiny_cuda-1.0+cu130-cp311-cp311-manylinux2014_aarch64.{PLATFORM}"
        assert [hopper.name, blackwell.name] == [f"{stem}-cu130_sm90.whl", f"{stem}-cu130_sm100.whl"]
        said = variants.parse(member(hopper, "tiny_cuda-1.0+cu130.dist-info/variant.json"), "cu130_sm90")
        assert said.properties == {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": ["90_real"]}}
        for wheel in (hopper, blackwell):
            checks = {check.name: check.ok for check in verify.verify(wheel, None, None)}
            assert checks == {"record": True, "build-id": True, "sbom": True, "provenance": False}, "this machine has no key"

        ids = {wheel: json.loads(member(wheel, "tiny_cuda-1.0+cu130.dist-info/gracefarm.json"))["build_id"]
               for wheel in (plain, hopper, blackwell)}  # fmt: skip
        pip = tmp_path / "tool"
        subprocess.run([sys.executable, "-m", "venv", str(pip)], check=True)
        subprocess.run([pip / "bin/pip", "install", "--quiet", UV], check=True)
        uv = [
            *(pip / "bin/uv", "--preview-features", "wheel-variants", "pip", "install", "--no-cache", "--no-deps"),
            *("--python", sys.executable, "--python-platform", "aarch64-manylinux_2_34", "--python-version", "3.11"),
            *("--default-index", f"{url}/simple/", "tiny-cuda"),
        ]
        for driver, sm, wanted in (
            ("13.0", "9.0", hopper),
            ("13.0", "10.0", blackwell),
            ("13.0", "10.3", blackwell),
            ("12.8", "9.0", plain),
            ("13.0", "8.0", plain),
        ):
            target = tmp_path / f"{driver}-{sm}"
            assert install([*uv, "--target", target], target, uv_environment(driver, sm)) == ids[wanted], (driver, sm)
        target = tmp_path / "pip"
        command = [pip / "bin/python", "-m", "pip", "--isolated", "install", "--no-cache-dir", "--no-deps", "--target", target,
                   "--platform", PLATFORM, "--python-version", "3.11", "--only-binary", ":all:",
                   "--index-url", f"{url}/simple/", "tiny-cuda"]  # fmt: skip
        assert install(command, target, dict(os.environ)) == ids[plain]

        # A wheel for other GPUs under the plain wheel's name is not a newer build of it.
        done = farm.run("build", "tiny_cuda", "--publish", f"{url}/legacy/", TWINE_USERNAME="__token__", TWINE_PASSWORD=token)
        assert done.code == 40, done.said
        assert "for sm 90, 100, but this" in done.said, done.said
