"""Wheels for tests of the gates: real objects of the root's compilers, packed with the defect that a test requires."""

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
"A complete extension module. Its only function returns the C expression `value`."


def module(value: str = "42", *, before: str = "", name: str = "_core") -> str:
    """The source of an extension module."""
    return MODULE.format(value=value, before=before, name=name)


def in_root(root: Path, folder: Path, *more: str) -> list[str]:
    """A bwrap command line with the files of the root, and with the folder writable at /objects."""
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
    """The root's gcc for a target. It runs inside the root, and can write only to `folder`."""

    root: Path
    target: Arch
    folder: Path

    def link(self, name: str, source: str, *options: str) -> Path:
        """Compile and link C source to a shared object. `options` can contain names of files in `folder`."""
        (self.folder / f"{name}.c").write_text(source)
        command = [
            *in_root(self.root, self.folder), f"/usr/bin/{self.target.triplet}-gcc-12", "-shared", "-fPIC", "-O1",
            "-I/usr/include/python3.11", "-o", name, f"{name}.c", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self.folder / name


def record(files: Mapping[str, bytes], info: str) -> bytes:
    """The RECORD of these files."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, data in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(data)))
    writer.writerow((f"{info}/RECORD", "", ""))
    return out.getvalue().encode()


@dataclass(kw_only=True)
class Draft:
    """A wheel before it is packed. Each field can have a wrong value."""

    files: dict[str, bytes]
    name: str = "demo"
    version: str = "1.0"
    tag: str = "cp311-cp311-manylinux_2_17_aarch64"
    metadata: str = ""
    wheel: str = ""
    folder: str = ""
    label: str = ""
    "The label of a variant wheel."
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
    """An environment with these libraries, by their paths in the environment."""
    for name, source in libraries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    return folder


def failed(verdicts: Sequence[object]) -> list[str]:
    """The names of the gates that refused the wheel."""
    return [getattr(verdict, "gate", "") for verdict in verdicts if getattr(verdict, "status", "") == "failed"]


def nvcc(toolchain: Path, root: Path, target: Arch, source: str, out: Path, sms: Sequence[str], *options: str) -> Path:
    """Compile a shared object with device code for these sm values with the host's compilers. `90+ptx` adds PTX."""
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
"""A replacement for the target's libcudart, which only the environment of 4 GB has. It defines the symbols that nvcc's code
requires. No other part of libcudart is read."""


def member(wheel: Path, name: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)
