"""Wheels for the gates: real objects of the root's own compilers, packed with whatever lie a test needs."""

from __future__ import annotations

import csv
import hashlib
import io
import struct
import subprocess
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elftools.elf.elffile import ELFFile

from builder.planning.stack import Arch

PAGE = 64 << 10

MODULE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
{before}
static PyObject *answer(PyObject *self, PyObject *args) {{ (void)self, (void)args; return PyLong_FromLong({value}); }}
static PyMethodDef methods[] = {{{{"answer", answer, METH_NOARGS, ""}}, {{0}}}};
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", 0, -1, methods}};
PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&module); }}
"""
"A whole extension module; `value` is the C expression that its one function returns."


def module(value: str = "42", *, before: str = "", name: str = "_core") -> str:
    """Source of an extension module."""
    return MODULE.format(value=value, before=before, name=name)


def in_root(root: Path, folder: Path, *more: str) -> list[str]:
    """A bwrap command line that sees the root's files and, writable at /objects, the folder."""
    parts = []
    for path in sorted(root.iterdir()):
        if path.name in ("dev", "proc", "tmp"):
            continue
        parts += ["--symlink", str(path.readlink()), f"/{path.name}"] if path.is_symlink() else []
        parts += ["--ro-bind", str(path), f"/{path.name}"] if path.is_dir() and not path.is_symlink() else []
    return [
        "bwrap", "--unshare-all", "--die-with-parent", *parts, "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
        "--bind", str(folder), "/objects", "--chdir", "/objects", *more,
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """The root's gcc for a target, run inside the root; `folder` is all it can write."""

    root: Path
    target: Arch
    folder: Path

    def link(self, name: str, source: str, *options: str) -> Path:
        """A shared object from C source; `options` may name files of `folder` by their bare names."""
        (self.folder / f"{name}.c").write_text(source)
        command = [
            *in_root(self.root, self.folder), f"/usr/bin/{self.target.triplet}-gcc-12", "-shared", "-fPIC", "-O1",
            "-I/usr/include/python3.11", "-o", name, f"{name}.c", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self.folder / name


def record(files: Mapping[str, bytes], info: str) -> bytes:
    """RECORD of those files."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, data in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(data)))
    writer.writerow((f"{info}/RECORD", "", ""))
    return out.getvalue().encode()


@dataclass(kw_only=True)
class Draft:
    """A wheel before it is packed; each field can be made to lie."""

    files: dict[str, bytes]
    name: str = "demo"
    version: str = "1.0"
    tag: str = "cp311-cp311-manylinux_2_17_aarch64"
    metadata: str = ""
    wheel: str = ""
    folder: str = ""
    label: str = ""
    "Of a variant wheel."
    record: bytes | None = None
    unrecorded: dict[str, bytes] = field(default_factory=dict)

    def pack(self, folder: Path) -> Path:
        """Write the wheel."""
        info = self.folder or f"{self.name}-{self.version}.dist-info"
        interpreter, abi, platforms = self.tag.split("-")
        tags = "".join(f"Tag: {interpreter}-{abi}-{platform}\n" for platform in platforms.split("."))
        files = {
            **self.files,
            f"{info}/METADATA": (
                self.metadata or f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n"
            ).encode(),
            f"{info}/WHEEL": (self.wheel or f"Wheel-Version: 1.0\nGenerator: kit\nRoot-Is-Purelib: false\n{tags}").encode(),
        }
        whole = {**files, **self.unrecorded, f"{info}/RECORD": self.record or record(files, info)}
        path = folder / f"{'-'.join(filter(None, (self.name, self.version, self.tag, self.label)))}.whl"
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in whole.items():
                archive.writestr(name, data)
        return path


def with_machine(data: bytes, machine: int) -> bytes:
    """The object with another e_machine: 62 is x86_64, 183 aarch64."""
    return data[:18] + struct.pack("<H", machine) + data[20:]


def with_alignment(data: bytes, align: int) -> bytes:
    """The object with another p_align in every PT_LOAD."""
    changed = bytearray(data)
    found = ELFFile(io.BytesIO(data))
    for number in range(found.num_segments()):
        if found.get_segment(number)["p_type"] == "PT_LOAD":
            at = found["e_phoff"] + number * found["e_phentsize"] + 48
            changed[at : at + 8] = struct.pack("<Q", align)
    return bytes(changed)


def site_packages(folder: Path, libraries: Mapping[str, Path]) -> Path:
    """An environment that holds those libraries, by their path below it."""
    for name, source in libraries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    return folder


def failed(verdicts: Sequence[object]) -> list[str]:
    """Gates that refused."""
    return [getattr(verdict, "gate", "") for verdict in verdicts if getattr(verdict, "status", "") == "failed"]


def nvcc(toolchain: Path, root: Path, target: Arch, source: str, out: Path, sms: Sequence[str], *options: str) -> Path:
    """A shared object with device code for those sm values; `90+ptx` adds PTX. The compilers are the host's."""
    cuda = next(iter(sorted(toolchain.glob("nvidia/cu*/bin/nvcc")))).parent.parent
    out.with_suffix(".cu").write_text(source)
    gencode: list[str] = []
    for sm in sms:
        plain = sm.removesuffix("+ptx")
        kind = f"compute_{plain}" if sm.endswith("+ptx") else f"sm_{plain}"
        gencode += ["-gencode", f"arch=compute_{plain},code={kind}"]
    inside = in_root(root, out.parent, "--ro-bind", str(cuda), "/cuda", "--setenv", "PATH", "/cuda/bin:/usr/bin:/bin")
    command = [
        "/cuda/bin/nvcc", "-ccbin", f"/usr/bin/{target.triplet}-g++-12", "-shared", "-Xcompiler", "-fPIC",
        "-I/cuda/include", "-I/cuda/include/cccl", "-cudart", "none", *gencode, "-o", out.name, f"{out.stem}.cu",
        *options,
    ]  # fmt: skip
    done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


KERNEL = "__global__ void set(float *values) { values[0] = 1; }\n"

STAND_IN_CUDART = "\n".join(
    f"void __cuda{name}(void) {{}}"
    for name in (
        "GetKernel", "InitModule", "LaunchKernel", "PopCallConfiguration", "RegisterFatBinary", "RegisterFatBinaryEnd",
        "RegisterFunction", "UnregisterFatBinary",
    )
)  # fmt: skip
"""A stand-in for the target's libcudart, which only the 4 GB environment has: the symbols that nvcc's code wants, which is
all that is read of it."""


def member(wheel: Path, name: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)
