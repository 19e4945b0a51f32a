"""Architectures of device code, by the real compilers and the real torch: what is known, and what a wheel then holds."""

from __future__ import annotations

import ast
import collections
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builder.ground import environment
from builder.planning import device_code, pins, stack
from builder.planning.stack import Arch, host_arch
from tests import projects
from tests.conftest import Farm
from tests.integration.pinned_kit import place
from tests.integration.test_build import record_of

NUMBERS = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121, 130)


@pytest.mark.parametrize("name", ["cu124-headers", "cu130"])
def test_the_known_architectures_are_those_of_the_compiler(farm: Farm, tmp_path: Path, name: str) -> None:
    loaded = stack.load(farm.settings.project / "stacks", name)
    folder = environment.ensure_toolchain(loaded, host_arch(), farm.settings)
    (nvcc,) = folder.glob("nvidia/cu*/bin/nvcc")

    def compiles(sm: str) -> bool:
        command = [str(nvcc), "--dryrun", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-c", str(tmp_path / "x.cu")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    (tmp_path / "x.cu").touch()
    every = [f"{number}{suffix}" for number in NUMBERS for suffix in ("", "a", "f")]
    assert sorted(filter(compiles, every)) == sorted(device_code.known(loaded.data.cuda))


@pytest.mark.parametrize("name", ["cu124-headers", "cu130"])
def test_torch_takes_the_list_of_every_architecture_that_its_cuda_knows(
    farm: Farm, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own function, read out of the target's wheel and run here."""
    place(farm, name, tmp_path / "build")
    loaded = stack.load(farm.settings.project / "stacks", name)
    (source,) = environment_of(farm, name).glob("lib/python*/site-packages/torch/utils/cpp_extension.py")
    tree = ast.parse(source.read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_get_cuda_arch_flags")
    function.returns, function.args.args[0].annotation = None, None
    names: dict[str, Any] = {"os": os, "collections": collections}
    exec(compile(ast.Module(body=[function], type_ignores=[]), str(source), "exec"), names)
    for value in set(device_code.known(loaded.data.cuda)) - {"88"}:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", device_code.torch_list((value,)))
        base = value.removesuffix("f")
        assert names["_get_cuda_arch_flags"]() == [f"-gencode=arch=compute_{base},code=sm_{base}"]


def environment_of(farm: Farm, name: str) -> Path:
    loaded = stack.load(farm.settings.project / "stacks", name)
    return farm.settings.home / "environments" / pins.environment_digest(loaded, Arch.AARCH64)


def tiny_cuda(farm: Farm, *sm: str, **wheel: object) -> None:
    """tiny_cuda, whose setup.py asks for these architectures."""
    files = projects.tree("tiny_cuda")
    text = str(files["setup.py"], "utf-8") if isinstance(files["setup.py"], bytes) else files["setup.py"]
    before = '("75", "80", "86", "90", "100")'
    assert before in text
    farm.recipe(
        "tiny_cuda",
        files | {"setup.py": text.replace(before, repr(sm))},
        name="tiny-cuda",
        stack="cu130",
        build={"cuda": True, "memory_per_job": "1GiB"},
        wheel=wheel,
        smoke={"imports": ["tiny_cuda", "tiny_cuda._core"]},
    )


def test_a_wheel_holds_the_architectures_and_the_ptx_that_the_command_line_chose(farm: Farm) -> None:
    tiny_cuda(farm, "75", "90a", sm_supported=["75", "90", "90a", "100f"])
    lowered = farm.run("build", "tiny_cuda")
    assert lowered.code == 21, lowered.said
    assert "core.cu asks for sm_90a, but this build compiles it for sm_90, so the object would lack the code" in lowered.said
    assert 'set sm_extra = { "core.cu" = ["90a"] } under [wheel] of the recipe, or build with --sm 90a' in lowered.said
    done = farm.run("build", "tiny_cuda", "--sm", "100f+90a", "--ptx", "90")
    assert done.code == 0, done.said
    found: Any = record_of(farm, "tiny_cuda")
    verdicts = {verdict["gate"]: verdict["summary"] for verdict in found["verdicts"]}
    assert verdicts["cubins"] == "cubins for exactly sm_100f, sm_90a, and PTX for sm_90 in each object"
    assert (found["asked_sm"], found["asked_ptx"]) == (["90a", "100f"], "90")
    wheel = done.out.strip()
    strange = farm.run("audit", wheel, "--stack", "cu130")
    assert strange.code == 30, strange.said
    for part in ("cubins for sm_100f, which was not requested", "has PTX for sm_90, which was not requested"):
        assert part in strange.said
    audited = farm.run("audit", wheel, "--stack", "cu130", "--sm", "90a+100f", "--ptx", "90")
    assert audited.code == 0, audited.said
    assert "nothing changed" in farm.run("why", "tiny_cuda").said
    refused = farm.run("plan", "tiny_cuda", "--sm", "120")
    assert (refused.code, "tiny_cuda does not support sm_120" in refused.said) == (3, True), refused.said
