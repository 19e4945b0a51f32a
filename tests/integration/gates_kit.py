"""Real wheels for the tests of the audit. The compilers of the project's root make their objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.audit import Policy, Verdict
from builder.ground import environment, root
from builder.planning import driver, stack
from builder.planning.settings import load
from builder.planning.stack import Arch, LoadedStack
from tests import audit_kit
from tests.audit_kit import Compiler, Draft, module
from tests.conftest import REPOSITORY

CORE = "demo/_core.cpython-311-aarch64-linux-gnu.so"
TEXT = "demo-1.0.dist-info/licenses/csrc/cutlass/LICENSE.txt"
TARGET = Arch.AARCH64

FOO = "int foo(void) { return 1; }\n"
FOO_VERSIONS = "FOO_1 { global: foo; local: *; };\n"
NEWER = "int foo(void) { return 1; } int foo2(void) { return 2; }\n"
NEWER_VERSIONS = "FOO_1 { global: foo; local: *; }; FOO_2 { global: foo2; } FOO_1;\n"
DRIVER = "int cuInit(unsigned f) { return f; } int cuReadMind(unsigned f) { return f; }\n"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A stack with a root, a compiler, and an environment with one library."""

    compiler: Compiler
    policy: Policy
    toolchain: Path

    def core(self, name: str, source: str, *options: str) -> bytes:
        """The bytes of an extension module, which is compiled once. A name always has the same source and options."""
        path = self.compiler.folder / name
        return (path if path.is_file() else self.compiler.link(name, source, *options)).read_bytes()

    def kernels(self, *sms: str) -> bytes:
        """The bytes of a library with device code for these sm values, which is compiled once."""
        path = self.compiler.folder / f"gpu_{'_'.join(sms)}.so"
        if not path.is_file():
            options = ("-Xlinker", "libcudart.so.13")
            audit_kit.nvcc(self.toolchain, self.compiler.root, TARGET, audit_kit.KERNEL, path, sms, *options)
        return path.read_bytes()


@pytest.fixture(scope="module")
def cu130() -> LoadedStack:
    return stack.load(REPOSITORY / "stacks", "cu130")


@pytest.fixture(scope="module")
def bench(cu130: LoadedStack, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    settings = load()
    base = root.ensure(cu130, stack.host_arch(), TARGET, settings)
    tools = environment.ensure_toolchain(cu130, stack.host_arch(), settings)
    compiler = Compiler(root=base, target=TARGET, folder=tmp_path_factory.mktemp("objects"))
    (compiler.folder / "foo.map").write_text(FOO_VERSIONS)
    (compiler.folder / "newer.map").write_text(NEWER_VERSIONS)
    foo = compiler.link("libfoo.so.1", FOO, "-Wl,-soname,libfoo.so.1", "-Wl,--version-script,foo.map")
    compiler.link("newer.so", NEWER, "-Wl,-soname,libfoo.so.1", "-Wl,--version-script,newer.map")
    compiler.link("driver.so", DRIVER, "-Wl,-soname,libcuda.so.1")
    torch = compiler.link("libtorch_cpu.so", "int is_torch(void) { return 1; }\n", "-Wl,-soname,libtorch_cpu.so")
    cudart = compiler.link("libcudart.so.13", audit_kit.STAND_IN_CUDART, "-Wl,-soname,libcudart.so.13")
    libraries = {"acme/lib/libfoo.so.1": foo, "nvidia/cu13/lib/libcudart.so.13": cudart, "torch/lib/libtorch_cpu.so": torch}
    site = audit_kit.site_packages(tmp_path_factory.mktemp("site"), libraries)
    policy = Policy(
        driver_headers=driver.headers(tools),
        target=TARGET, glibc="2_34", cuda="13.0", torch="2.11.0", sm=("90",), name="demo", version="1.0",
        build_paths=("/build",),
        site_packages=site, root=base, cuobjdump=next(iter(sorted(tools.glob("nvidia/*/bin/cuobjdump")))),
        parts={"submodule csrc/cutlass": "BSD-3-Clause"}, licenses=("csrc/cutlass/LICENSE.txt",),
    )  # fmt: skip
    return Bench(compiler=compiler, policy=policy, toolchain=tools)


def draft(core: bytes) -> Draft:
    return Draft(files={"demo/__init__.py": b"", CORE: core, TEXT: b"Redistribution and use"})


def by_gate(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {verdict.gate: verdict for verdict in verdicts}


def versioned(one: Draft, version: str) -> Draft:
    info = f"demo-{one.version}.dist-info/"
    one.files = {name.replace(info, f"demo-{version}.dist-info/"): data for name, data in one.files.items()}
    one.version = version
    return one


def copied_library(bench: Bench) -> Draft:
    """A wheel with a copy of the stack's libfoo, under the name that auditwheel gives such copies."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/libfoo-0123abcd.so.1"] = (bench.compiler.folder / "libfoo.so.1").read_bytes()
    return one


def build_path(bench: Bench) -> Draft:
    return draft(bench.core("path.so", module(), "-Wl,-rpath,$ORIGIN:/build/src/lib"))


def cuda_draft(bench: Bench, *sms: str) -> Draft:
    """A wheel with a module, and with a library with device code."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/kernels.so"] = bench.kernels(*sms)
    return versioned(one, "1.0+cu130")
