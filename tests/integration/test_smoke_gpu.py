"""The sandbox's GPU test, before a folder that plays NVIDIA's driver: what a JIT compiler needs beside the device files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from builder import smoke
from builder.box import gpu
from builder.planning import stack
from builder.planning.stack import host_arch
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.errors import SmokeError
from tests.conftest import Farm
from tests.integration.host_kit import FAKE_TORCH
from tests.integration.test_environment import make_wheel

FAKE_DRIVER = """
#include <dlfcn.h>
int cuInit(unsigned flags) { return dlopen("libnvidia-ptxjitcompiler.so.1", RTLD_NOW) ? 7 : -1; }
"""
"As the original it opens its other half by name, when it is first called."

LAUNCHER = """
import ctypes, os, subprocess, sysconfig, tempfile
folders = [os.environ["TRITON_LIBCUDA_PATH"]] if "TRITON_LIBCUDA_PATH" in os.environ else [
    os.path.dirname(line.split()[-1])
    for line in subprocess.check_output(["/sbin/ldconfig", "-p"], text=True).splitlines() if "libcuda.so.1" in line
]
assert any(os.path.exists(f"{folder}/libcuda.so.1") for folder in folders), "libcuda.so cannot be found"
with tempfile.TemporaryDirectory() as made:
    with open(f"{made}/launch.c", "w") as source:
        source.write("#include <Python.h>\\nint cuInit(unsigned);\\nint launch(void) { return cuInit(0); }\\n")
    include = "-I" + sysconfig.get_path("include", vars={"base": "/usr", "installed_base": "/usr"})
    places = [f"-L{folder}" for folder in folders]
    line = ["gcc", "-shared", "-fPIC", f"{made}/launch.c", include, *places, "-lcuda", "-o", f"{made}/launch.so"]
    subprocess.run(line, check=True)
    print(ctypes.CDLL(f"{made}/launch.so").launch())
"""
"What triton's launcher does of its first kernel: find the driver, compile, link with -lcuda, load."


def fake_driver(folder: Path) -> str:
    """Libraries of a driver, without the libcuda.so of a developer's package, as a loader's cache lists them."""
    folder.mkdir()
    for name, text in (("libcuda.so.1", FAKE_DRIVER), ("libnvidia-ptxjitcompiler.so.1", "int there;")):
        (folder / "source.c").write_text(text)
        # By version, with a link of the name that is asked for: as installed.
        line = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", folder / "source.c", "-o", folder / f"{name[:-1]}550.90.07"]
        subprocess.run(line, check=True)
        (folder / name).symlink_to(f"{name[:-1]}550.90.07")
    (folder / "32").mkdir()
    (folder / "32/libcuda.so.1").write_text("for programs of 32 bits")
    kind = {"aarch64": "AArch64", "x86_64": "x86-64"}[host_arch().value]
    old, own = "libcuda.so.1 (libc6) => 32/libcuda.so.1", ("libcuda.so.1", "libz.so.1", "libnvidia-ptxjitcompiler.so.1")
    lines = [old, *(f"{name} (libc6,{kind}) => {name}" for name in own), old]
    return "567 libs found in cache\n" + "".join(f"\t{line.replace('=> ', f'=> {folder}/')}\n" for line in lines)


def trial(farm: Farm, folder: Path, script: str) -> smoke.Trial:
    """A wheel that is a fake torch with a GPU, in this machine's own root; no compiler runs emulated where a GPU is."""
    here = host_arch()
    loaded = stack.load(farm.settings.project / "stacks", "bare")
    toolchain = SandboxToolchain()
    ground = toolchain.lay(loaded, here, here, farm.settings, cuda=False)
    torch = FAKE_TORCH.format(seen=True, capability=(9, 0))
    (folder / "script.py").write_text(script)
    return smoke.Trial(
        wheel=make_wheel(folder, "torch", "2.11.0", {"torch/__init__.py": torch}),
        imports=("torch",),
        script=folder / "script.py",
        environment=toolchain.trial_environment(ground, emulated=False),
        folder=farm.settings.home / "smoke",
        memory=1 << 30,
        log=folder / "log.txt",
        repeat="builder smoke",
    )


def test_a_launcher_finds_links_and_loads_the_driver_in_the_sandbox(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = fake_driver(tmp_path / "driver")
    monkeypatch.setattr(gpu, "devices", lambda: [Path("/dev/null")])
    monkeypatch.setattr(gpu, "loaders_cache", lambda: listing)
    asked = trial(farm, tmp_path, LAUNCHER)
    try:
        found = smoke.run_gpu(asked, ("90",))
    except SmokeError as error:
        pytest.fail(f"{error.cause}\n{asked.log.read_text()}")
    assert (found.status, found.script) == ("passed", "7\n")


def test_without_a_driver_the_sandbox_has_none() -> None:
    assert list(gpu.driver_libraries("0 libs found in cache `/etc/ld.so.cache'\n")) == []
