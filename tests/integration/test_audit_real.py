"""The audit against the stack's real environment, torch and CUDA included, and on a wheel that others published."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from builder import audit, elf
from builder.audit import Policy
from builder.fetch import Download, download, simple
from builder.fetch.urls import same_host, split_credentials, with_credentials
from builder.ground import environment, root
from builder.planning import driver, stack
from builder.planning.settings import load
from builder.planning.stack import Arch
from gracefarm.errors import ExitCode
from tests import projects
from tests.audit_kit import Compiler, Draft, failed, module
from tests.conftest import REPOSITORY, Farm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the environment, cold, is 4 GB

CORE = "demo/_core.cpython-311-aarch64-linux-gnu.so"

CHECK_FAIL = "_ZN3c106detail14torchCheckFailEPKcS2_jRK"
NEW_ABI = f"{CHECK_FAIL}NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
OLD_ABI = f"{CHECK_FAIL}Ss"
"The same function as a compiler with _GLIBCXX_USE_CXX11_ABI=0 would ask for it, the most reported of all mismatches."

APHRODITE = ("aphrodite-engine", "aphrodite_engine-0.6.4.post1-cp38-abi3-manylinux1_x86_64.whl")
APHRODITE_SHA256 = "22adede0c2237cf0a635c64c2bed21dfb216df2823b0cf38e0b6130402a078aa"


@pytest.fixture(scope="module")
def policy() -> Policy:
    """cu130 for aarch64, whole: some 4 GB."""
    settings = load()
    cu130 = stack.load(REPOSITORY / "stacks", "cu130")
    base = root.ensure(cu130, stack.host_arch(), Arch.AARCH64, settings)
    site = environment.ensure(cu130, Arch.AARCH64, base, settings) / "lib/python3.11/site-packages"
    include = driver.headers(site)
    return Policy(target=Arch.AARCH64, glibc="2_34", driver_headers=include, sm=("90",), site_packages=site, root=base)


@pytest.fixture
def compiler(policy: Policy, tmp_path: Path) -> Compiler:
    (tmp_path / "objects").mkdir()
    assert policy.root is not None
    return Compiler(root=policy.root, target=Arch.AARCH64, folder=tmp_path / "objects")


def extension(compiler: Compiler, wanted: Mapping[str, tuple[str, ...]]) -> Draft:
    """A module that calls those functions of those libraries; it is linked against stubs, as a wrong build would be."""
    stubs = []
    for number, (soname, names) in enumerate(wanted.items()):
        version = soname if soname.startswith("libcudart") else "PLAIN"
        (compiler.folder / "stub.map").write_text(f"{version} {{ global: *; }};\n")
        mapped = ["-Wl,--version-script,stub.map"] if version != "PLAIN" else []
        source = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
        stubs.append(compiler.link(f"stub{number}.so", source, f"-Wl,-soname,{soname}", *mapped).name)
    called = [name for group in wanted.values() for name in group]
    source = module("+".join(f"{name}()" for name in called), before="".join(f"int {name}(void);\n" for name in called))
    core = compiler.link("core.so", source, "-fno-builtin", *stubs)
    return Draft(files={CORE: core.read_bytes()})


def test_a_torch_extension_closes_over_the_real_torch(policy: Policy, compiler: Compiler, tmp_path: Path) -> None:
    assert policy.site_packages is not None
    python = elf.read(policy.site_packages / "torch/lib/libtorch_python.so").exports.symbols
    wanted = {
        "libc10.so": (NEW_ABI,),
        "libtorch_python.so": tuple(sorted(name for name in python if name.startswith("_Z16THPVariable_Wrap"))[:2]),
        "libcudart.so.13": ("cudaMalloc", "cudaLaunchKernelExC"),
        "libcuda.so.1": ("cuTensorMapEncodeTiled",),
    }
    wheel = extension(compiler, wanted).pack(tmp_path)

    verdicts = audit.audit(wheel, policy)

    assert failed(verdicts) == []
    found = verdicts[-1].details[0]
    places = ("libc10.so (environment)", "libtorch_python.so (environment)", "2 in libcudart.so.13", "libcuda.so.1 (driver)")
    for place in places:
        assert place in found


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"libc10.so": (OLD_ABI,)}, f"undefined symbol {OLD_ABI}"),
        ({"libcudart.so.12": ("cudaMalloc",)}, "needs libcudart.so.12, which is neither in the wheel nor in the stack"),
        ({"libcudart.so.13": ("cudaMallocTwice",)}, "undefined symbol cudaMallocTwice@libcudart.so.13"),
    ],
    ids=["the other C++ ABI", "another CUDA", "a function that this CUDA lacks"],
)
def test_what_was_built_for_another_torch_or_cuda_is_refused(
    wanted: Mapping[str, tuple[str, ...]], words: str, policy: Policy, compiler: Compiler, tmp_path: Path
) -> None:
    wheel = extension(compiler, wanted).pack(tmp_path)
    verdicts = audit.audit(wheel, policy)
    assert failed(verdicts) == ["symbols"]
    assert words in " ".join(verdicts[-1].details)


@pytest.mark.parametrize("name", ["libtorch_python.so", "libtorch_cuda_linalg.so"])
def test_torch_itself_is_closed(name: str, policy: Policy, tmp_path: Path) -> None:
    """What the stack's own torch lacked would be blamed on every extension."""
    assert policy.site_packages is not None
    wheel = Draft(files={f"torch/lib/{name}": (policy.site_packages / "torch/lib" / name).read_bytes()}).pack(tmp_path)
    symbols = audit.audit(wheel, policy)[-1]
    assert symbols.status == "passed", symbols.summary


def test_the_drivers_functions_are_those_that_a_compiler_sees(policy: Policy) -> None:
    """cuda.h renames functions by macros; each view of the preprocessor shows the exported names of another set."""
    assert policy.driver_headers is not None
    names: set[str] = set()
    for view in ((), ("-DCUDA_API_PER_THREAD_DEFAULT_STREAM",), ("-D__CUDA_API_VERSION_INTERNAL",)):
        command = ["cc", "-E", "-P", "-x", "c", *view, str(policy.driver_headers / "cuda.h")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names.update(re.findall(r"\bCUresult\s+(?:CUDAAPI\s+)?(cu[A-Z]\w*)\s*\(", text))
    # The rest is of the headers beside it, which include those of other projects.
    rest = driver.symbols(policy.driver_headers) - names
    assert len(names) > 600
    assert names <= driver.symbols(policy.driver_headers)
    assert [name for name in rest if not re.search(r"GL|Egl|VDPAU|Profiler", name)] == []


def published(project: str, name: str, sha256: str) -> Download:
    """A file on the configured index."""
    index, credentials = split_credentials(load().index_url or simple.DEFAULT_INDEX)
    page = simple.project_page(project, index, credentials)
    url = next(package.url for package in page.packages if package.filename == name)
    return Download(url=with_credentials(url, credentials) if same_host(index, url) else url, sha256=sha256, what=name)


@pytest.mark.timeout(1800)  # the x86_64 environment, cold, is 4 GB
@pytest.mark.skipif(platform.machine() != "x86_64", reason="stack cu130 builds its x86_64 root only on x86_64 hosts")
def test_aphrodites_published_wheel_fails_as_found(farm: Farm, tmp_path: Path) -> None:
    """0.6.4.post1 as its makers uploaded it: built on Ubuntu 22.04 for CUDA 12.4 and torch 2.4, renamed to manylinux1."""
    project, name = APHRODITE
    stored = download([published(project, name, APHRODITE_SHA256)], farm.settings)[APHRODITE_SHA256]
    (tmp_path / name).symlink_to(stored)

    arguments = ["audit", str(tmp_path / name), "--stack", "cu130", "--json"]
    done = projects.run_builder(arguments, farm.environment, timeout=1800)

    assert done.code == ExitCode.AUDIT, done.said
    verdicts = next(answer for line in done.out.splitlines() if isinstance(answer := json.loads(line), list))
    status = {verdict["gate"]: verdict["status"] for verdict in verdicts}
    said = {verdict["gate"]: "\n".join((verdict["summary"], *verdict["details"])) for verdict in verdicts}
    assert status == {
        "wheel": "failed", "elf-machine": "passed", "python-abi": "passed", "platform-tag": "failed", "grafted": "passed",
        "licence": "not applicable", "rpath": "failed", "alignment": "not applicable", "cubins": "failed",
        "variant": "not applicable", "symbols": "failed",
    }  # fmt: skip
    assert "WHEEL has the tags cp38-abi3-linux_x86_64, but the file name has cp38-abi3-manylinux1_x86_64" in said["wheel"]
    assert "manylinux1_x86_64 is false: the wheel requires manylinux_2_34" in said["platform-tag"]
    assert {"GLIBC_2.32", "GLIBCXX_3.4.29"} <= set(re.findall(r"@(\S+) of", said["platform-tag"]))
    assert "RUNPATH /usr/local/cuda-12.4/lib64" in said["rpath"]
    assert "site-packages/torch/lib" in said["rpath"]
    for sm in ("60", "70", "75", "80", "86", "89", "90a"):
        assert f"aphrodite/_C.abi3.so has cubins for sm_{sm}, which was not requested" in said["cubins"]
    for soname in ("libcudart.so.12", "libcublas.so.12"):
        assert f"aphrodite/_C.abi3.so needs {soname}, which is neither in the wheel nor in the stack" in said["symbols"]
    assert re.search(r"undefined symbol cuda\w+@libcudart.so.12", said["symbols"])
    # Its driver calls are fine: libcuda's promises outlive releases.
    assert not re.search(r"undefined symbol cu[A-Z]", said["symbols"])
    assert re.search(r"undefined symbol _ZNK?(3c10|2at|5torch)", said["symbols"])
