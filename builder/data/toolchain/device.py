"""Run one pass of nvcc (cudafe++, cicc, ptxas, fatbinary), or read the result of the pass from the store of device code.

    python -I -S DIRECTORY PASS ARGUMENT...

In DIRECTORY, the name of this file is __main__.py. The script `pass` replaces each pass, and starts this program with the
native Python of the root. The program uses only the standard library. The same input gives the same device code in all cells.
So the key of a result in the store is the digest of everything that affects the result:

- cicc: the options, the preprocessed text, the name of the module, the compiler. cicc consists of a front end and an
  optimizer. If there is no result for the text, this program runs the front end, which writes NVVM code (LLVM bitcode). The
  optimizer reads the NVVM code. The key of the optimizer's result is the digest of the NVVM code. The NVVM code does not
  contain most of the declarations that the device code does not use, for example declarations of the host's C library. But
  units that include all of torch have different NVVM code for each Python and host, because names contain counters. The store
  also keeps the NVVM code with an unsigned char. Its key is the digest of the module id and of the optimizer's options.
  `same_for_hosts` describes its use.
- ptxas: the options, the PTX, the compiler.
- fatbinary: this pass always runs.
- cudafe++: this pass always runs. It writes the module id, which is a name for the unit. cicc includes the module id in names
  of device code. If the unit has no external symbol, the module id contains the process id of cudafe++. Then the input of cicc
  would differ in each build, and the store would never have a result. So the function `cudafe` replaces the process id.

The text contains the paths of headers, and these paths differ between cells. `canonical` replaces the paths, and cicc runs in
the folder /. The program does both even if there is no store. So the store does not change the output.

GRACEFARM_NVCC: the compiler. Its folder contains the passes, or links to the passes. GRACEFARM_CUDA: the release of the
compiler.
GRACEFARM_DEVICE_NOTES: a file. The program appends one line of JSON to this file for each pass.
device_store.py describes the variables of the store.
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from builder.data.toolchain.bitcode import differ_only_in_extension
from builder.data.toolchain.device_store import Result, digest, get, put

MARKER = re.compile(rb'^(# \d+ )"([^"\\\n]*)"', re.MULTILINE)
"A line of a preprocessed text that names the file of the next lines."
PYTHON = re.compile(r"^/env/lib/python3\.\d+t?/")
TRIPLET = re.compile(r"/(?:aarch64|x86_64)-linux-gnu(?=/)")
NAMED = {
    "--include_file_name": "include",
    "--stub_file_name": "stub",
    "--gen_c_file_name": "c",
    "--gen_device_file_name": "gpu",
    "--module_id_file_name": "module",
    "-o": "output",
}
"Options of cicc whose values are names of files."
MADE = ("stub", "c", "gpu")
"Files that the front end writes for the host compiler, in addition to the NVVM code."
SOURCE_NAMES = ("--orig_src_file_name", "--orig_src_path_name")
NEVER = ("-g", "-G", "-lto", "-dlto", "-keep", "--device-debug")
"The result of a pass with one of these options is not kept: debuggers show the folder and the names of scratch files."
SPLIT_RELEASES = ("13.0",)
"CUDA releases whose cicc writes the same PTX in two steps as in one step, according to our tests."
FRONT_END = re.compile(
    r"--(?:c\+\+(?:03|11|14|17|20)|static-host-stub|device-hidden-visibility|gnu_version=\d+|display_error_number|allow_managed|"
    r"relaxed_constexpr|extended-lambda|unsigned_chars|unsigned_wchar_t|arm_cross_compiler|no-version-ident|gen_div_approx_ftz|"
    r"promote_warnings|brief_diagnostics)|-tused|-w"
)
"Options that only the front end reads."
OPTIMIZER = {"-ftz": "-ftz", "-prec_div": "-prec-div", "-prec_sqrt": "-prec-sqrt", "-fmad": "-fma"}
"Options that only the optimizer reads: the name for cicc, and the name for the optimizer. All these options have a value."
BOTH = {
    "-m64": (["--m64"], []),
    "--device-c": (["--device-c"], ["--device-c"]),
    "-generate-line-info": (["--generate-line-info"], ["-generate-line-info"]),
    "-fast-math": ([], ["-fast-math"]),
}
"Other options: the option of cicc, the options for the front end, and the options for the optimizer."
UNSIGNED = ("--unsigned_chars", "--unsigned_wchar_t")
"Options of the front end for aarch64, where char is unsigned."
GENERATE = "--gen_module_id_file"
MODULE_ID = re.compile(rb"(_[0-9a-f]{8}_\d+_\w+)_[0-9a-f]{8}_\d+")
"A module id that contains a process id: digest of the path, length of the file name, file name, digest, process id."
LINKED = ("--device-c", "--partial-link")
"With these options, units can call functions of other units."


class NotKeptError(Exception):
    """The result of a pass cannot be kept. The message contains the reason."""


@dataclass
class Call:
    """A call of cicc."""

    options: list[str]
    "The options without the names of files."
    names: dict[str, str]
    source: str


def main() -> int:
    """Run the pass, and return its exit code."""
    tool, *arguments = sys.argv[1:]
    if tool == "cudafe++":
        return cudafe(arguments)
    started = time.monotonic()
    try:
        outcome, saved = {"cicc": cicc, "ptxas": ptxas}[tool](arguments)
    except (NotKeptError, KeyError, OSError) as reason:
        outcome, saved = "always runs" if tool == "fatbinary" else str(reason), {}
        code = subprocess.run([real(tool), *arguments], check=False).returncode
        note(tool, outcome, saved, started)
        return code if code >= 0 else 128 - code
    note(tool, outcome, saved, started)
    return 0


def note(tool: str, outcome: str, saved: Mapping[str, float], started: float) -> None:
    """Append a line about this pass to the notes of the unit, in one write."""
    if not (place := os.environ.get("GRACEFARM_DEVICE_NOTES")):
        return
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    line = {"pass": tool, "outcome": outcome, "cpu_s": round(cpu, 3), "wall_s": round(time.monotonic() - started, 3)}
    descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(line | {"saved": saved}).encode() + b"\n")
    os.close(descriptor)


def real(tool: str) -> str:
    """The path of the real pass, found from the folder of the real nvcc."""
    folder = os.path.dirname(os.path.realpath(os.environ["GRACEFARM_NVCC"]))
    return os.path.join(folder, "../nvvm/bin/cicc" if tool == "cicc" else tool)


def run(command: Sequence[str], folder: str) -> Result:
    """Run a compiler. The compiler gets only the scratch folder and the path of libraries from this environment.

    Raises:
        NotKeptError: the compiler failed. `main` then runs it again with nvcc's arguments, and the compiler prints the error.
    """
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = {name: os.environ[name] for name in ("TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    process = subprocess.run(command, cwd=folder, env=variables | {"LC_ALL": "C.UTF-8"}, capture_output=True, check=False)
    if process.returncode:
        raise NotKeptError("it failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3),
        "wall_s": round(time.monotonic() - started, 3),
        "peak_memory": 1024 * after.ru_maxrss,
    }
    return Result(out=process.stdout, err=process.stderr, cost=cost)


# cudafe++.


def cudafe(arguments: Sequence[str]) -> int:
    """Run cudafe++, and replace a process id in the module id. Return the exit code.

    If units can call functions of other units, the module id stays as cudafe++ wrote it, because it must be unique in a
    program.
    """
    code = subprocess.run([real("cudafe++"), *arguments], check=False).returncode
    if code or GENERATE not in arguments or any(option in arguments for option in LINKED):
        return code if code >= 0 else 128 - code
    values = dict(pairwise(arguments))
    module, host_code = values["--module_id_file_name"], values["--gen_c_file_name"]
    old = read(module)
    match = MODULE_ID.fullmatch(old)
    if match is not None:
        new = b"%s_%s_0" % (match[1], own_digest(arguments[-1]).encode())
        for name in (host_code, module):
            write(name, read(name).replace(old, new))
    return 0


def own_digest(preprocessed: str) -> str:
    """The first eight digits of the digest of a unit's macros and of the project's files that the unit reads.

    The digits are the same in all cells. They differ between units.
    """
    folder = os.getcwd()
    tree = os.path.join(os.path.dirname(os.environ.get("GRACEFARM_UNITS", "")), "source")
    names = {match[2].decode(errors="surrogateescape") for match in MARKER.finditer(read(preprocessed))}
    paths = {os.path.normpath(os.path.join(folder, name)) for name in names if not name.startswith("<")}
    whole = hashlib.sha256(os.environ.get("GRACEFARM_MACROS", "").encode(errors="surrogateescape"))
    for path in sorted(paths):
        if path.startswith(f"{tree}/") and os.path.isfile(path):
            content = read(path)
            whole.update(b"%d:" % len(content) + content)
    return whole.hexdigest()[:8]


# cicc.


def cicc(arguments: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Write the output of cicc; return the source of the results, and the cost that was saved.

    Raises:
        NotKeptError: the result cannot be kept; nothing was written.
    """
    call = parsed(arguments)
    with open(call.names["module"], "rb") as stream:
        module = stream.read()
    with open(call.source, "rb") as stream:
        text, originals = canonical(stream.read(), os.getcwd())
    key = digest("cicc", call.options, module, text)
    unit = get(key)
    ptx = get(unit.files["nvvm"].decode()) if unit is not None else None
    if unit is not None and ptx is not None:
        outcome, saved = "text", added(unit.cost, ptx.cost)
    else:
        unit, ptx, outcome, saved = compiled(call, text, key)
    for name in MADE:
        write(call.names[name], local(unit.files[name], call.names, originals))
    write(call.names["output"], ptx.files["ptx"])
    say(unit, ptx, originals)
    return outcome, saved


def parsed(arguments: Sequence[str]) -> Call:
    """Split the arguments of cicc into options, names of files and the source.

    Raises:
        NotKeptError: the call has an option that prevents keeping the result, or the call reads a file in addition to the
        text.
    """
    options: list[str] = []
    names: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if word in NAMED:
            names[NAMED[word]] = next(words, "")
        elif word in NEVER:
            raise NotKeptError(f"option {word}")
        else:
            options.append(word)
    if set(names) != set(NAMED.values()):
        raise NotKeptError("not a pass of a unit")
    named = {options[at + 1] for at in range(len(options) - 1) if options[at] in SOURCE_NAMES}
    source = the_file([word for word in options if word not in named], ".ii")
    options.remove(source)
    return Call(options=options, names=names, source=source)


def the_file(words: Sequence[str], suffix: str) -> str:
    """Find the file that a pass reads among the words of its command line.

    Raises:
        NotKeptError: the pass does not read exactly one file, or the file has a different suffix.
    """
    values = {word: word.partition("=")[2] if word.startswith("-") else word for word in words}
    files = [word for word, value in values.items() if value and os.path.exists(value)]
    if len(files) != 1 or not files[0].endswith(suffix):
        raise NotKeptError("it reads other files")
    return files[0]


def canonical(text: bytes, folder: str) -> tuple[bytes, dict[bytes, bytes]]:
    """Replace the paths in a text by paths that are equal in all cells.

    Returns:
        The new text, and the original path of each new path. Two headers can get the same new path, for example Debian's two
        pyconfig.h. This is not an error, because the compiler only prints the paths.
    """
    paths = {path: common(path, folder) for path in sorted({match[2] for match in MARKER.finditer(text)})}
    originals = {name: path for path, name in paths.items()}
    return MARKER.sub(lambda match: b'%s"%s"' % (match[1], paths[match[2]]), text), originals


def common(path: bytes, folder: str) -> bytes:
    """Replace the parts of a path that depend on the version of Python or on the host."""
    name = path.decode(errors="surrogateescape")
    if name.startswith("<"):
        return path
    name = os.path.normpath(os.path.join(folder, name)) if not name.startswith("/") else name
    name = PYTHON.sub("/env/lib/python3/", name)
    if name.startswith("/usr/"):
        name = TRIPLET.sub("", name).replace("/gcc-cross/", "/gcc/")
    return name.encode(errors="surrogateescape")


def compiled(call: Call, text: bytes, key: str) -> tuple[Result, Result, str, dict[str, float]]:
    """Run the front end and the optimizer, and keep their results if this is allowed.

    Returns:
        The result of the front end, which contains the key of the optimizer's result; the result of the optimizer; the source
        of the results; the cost that was saved.

    Raises:
        NotKeptError: the compiler failed.
    """
    outcome, saved = "miss", dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="device-") as scratch:
        write(f"{scratch}/unit.ii", text)
        steps = split(call.options)
        if steps is None:
            unit = front_end(call, [*call.options, f"{scratch}/unit.ii", "-o", f"{scratch}/unit.ptx"], scratch)
            nvvm = digest("cicc in one step", key)
            ptx = Result(files={"ptx": read(f"{scratch}/unit.ptx")})
        else:
            unit = front_end(call, ["-lgenfe", f"{scratch}/unit.ii", "-o", f"{scratch}/unit.bc", *steps[0]], scratch)
            shared = digest("nvvm of a unit", steps[1], read(call.names["module"]))
            nvvm = digest("nvvm", steps[1], same_for_hosts(call, steps[0], scratch, unit, shared))
            known = get(nvvm)
            if known is not None:
                outcome, saved, ptx = "nvvm", known.cost, known
            else:
                ptx = run([real("cicc"), "-libnvvm", f"{scratch}/unit.bc", "-o", f"{scratch}/unit.ptx", *steps[1]], "/")
                ptx.files["ptx"] = read(f"{scratch}/unit.ptx")
        contents = [unit.out, unit.err, *unit.files.values(), ptx.out, ptx.err, *ptx.files.values()]
    unit.files["nvvm"] = nvvm.encode()
    # If a result contains the name of a scratch file, it differs in each run. So it is not kept.
    if not any(name in content for content in contents for name in (b"tmpxft", scratch.encode())):
        put(nvvm, ptx)
        put(key, unit)
    return unit, ptx, outcome, saved


def split(options: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The options of the front end and of the optimizer.

    The function returns None if an option is unknown, or if the CUDA release is not in SPLIT_RELEASES. Then cicc runs in one
    step.
    """
    front, back, words = ["--emit-llvm-bc"], [], iter(options)
    architecture = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word == "-arch":
            architecture = next(words, "")
        elif word in SOURCE_NAMES:
            front += [word, next(words, "")]
        elif equals and name in OPTIMIZER:
            back.append(f"{OPTIMIZER[name]}={value}")
        elif word in BOTH:
            front += BOTH[word][0]
            back += BOTH[word][1]
        elif FRONT_END.fullmatch(word):
            front.append(word)
        else:
            return None
    number = re.fullmatch(r"compute_(\d+)[af]?", architecture)
    if number is None or os.environ.get("GRACEFARM_CUDA") not in SPLIT_RELEASES:
        return None
    old = int(number[1]) < 100
    version = "-nvvm-version=nvvm70" if old else "-nvvm-version=nvvm-latest"
    front += [*(["--no-device-float128"] if old else []), "--nv_arch", architecture, version]
    return front, [version, *back, f"-arch={architecture}"]


def front_end(call: Call, arguments: Sequence[str], scratch: str) -> Result:
    """Run cicc, and return the files that it writes for the host compiler. Marks replace the names that nvcc chose."""
    names = {name: f"{scratch}/{name}" for name in MADE}
    options = {option: names.get(name, os.path.abspath(call.names[name])) for option, name in NAMED.items()}
    options["--include_file_name"] = "include"
    del options["-o"]
    result = run([real("cicc"), *arguments, *(word for option in options.items() for word in option)], "/")
    for name in MADE:
        result.files[name] = neutral(read(names[name]), scratch)
    result.err = result.err.replace(f"{scratch}/".encode(), b"")
    return result


def same_for_hosts(call: Call, options: Sequence[str], scratch: str, unit: Result, shared: str) -> bytes:
    """Return NVVM code that is the same for all hosts, if there is such code. Otherwise return the code of this host.

    `shared` is a key that is equal for all hosts. Under this key, the store keeps the code with an unsigned char, as on
    aarch64. In a cell for x86_64, the function compares the code of this host with the kept code. If only the extension of
    bool arguments differs, it uses the kept code. Otherwise it compiles the unit again with an unsigned char, and compares
    again. So a wrong entry costs time, but does not change what the device code computes. If units can call functions of other
    units, the unit keeps the code of this host, because the extension of arguments must be equal in all units.
    """
    code = read(f"{scratch}/unit.bc")
    if any(option in call.options for option in LINKED):
        return code
    if UNSIGNED[0] in options:
        put(shared, Result(files={"bc": code}))
        return code
    kept = get(shared)
    if kept is not None and differ_only_in_extension(code, kept.files["bc"]):
        other = kept.files["bc"]
    else:
        os.mkdir(f"{scratch}/again")
        arguments = ["-lgenfe", f"{scratch}/unit.ii", "-o", f"{scratch}/again/unit.bc", *options, *UNSIGNED]
        again = front_end(call, arguments, f"{scratch}/again")
        unit.cost = added(unit.cost, again.cost)
        other = read(f"{scratch}/again/unit.bc")
        if not differ_only_in_extension(code, other):
            return code
        put(shared, Result(files={"bc": other}))
    write(f"{scratch}/unit.bc", other)
    return other


def neutral(content: bytes, scratch: str) -> bytes:
    """Replace the names of files by marks in a file for the host compiler."""
    content = content.replace(b'#include "include"', b'#include "@include@"')
    for name in MADE:
        content = content.replace(f'"{scratch}/{name}"'.encode(), f'"@{name}@"'.encode())
    return content


def local(content: bytes, names: Mapping[str, str], originals: Mapping[bytes, bytes]) -> bytes:
    """Replace the marks by the names of this call, and the new paths by the original paths."""
    content = MARKER.sub(lambda match: b'%s"%s"' % (match[1], originals.get(match[2], match[2])), content)
    for name in ("include", *MADE):
        content = content.replace(f'"@{name}@"'.encode(), f'"{names[name]}"'.encode())
    return content


# ptxas.


def ptxas(arguments: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Write the output of ptxas; return the source of the result, and the cost that was saved.

    Raises:
        NotKeptError: the result cannot be kept; nothing was written.
    """
    if refused := next((word for word in arguments if word in NEVER), None):
        raise NotKeptError(f"option {refused}")
    options = list(arguments)
    if "-o" not in options[:-1]:
        raise NotKeptError("not a pass of a unit")
    at = options.index("-o")
    output = options[at + 1]
    del options[at : at + 2]
    source = the_file(options, ".ptx")
    options.remove(source)
    key = digest("ptxas", options, read(source))
    outcome, result = "ptx", get(key)
    saved = result.cost if result is not None else {}
    if result is None:
        outcome, result = "miss", assembled(source, options)
        put(key, result)
    write(output, result.files["cubin"])
    say(result, Result(), {})
    return outcome, saved


def assembled(source: str, options: Sequence[str]) -> Result:
    """Run ptxas on a file, with a name for the file that is equal in all cells.

    Raises:
        NotKeptError: ptxas failed.
    """
    with tempfile.TemporaryDirectory(prefix="device-") as scratch:
        os.symlink(os.path.abspath(source), f"{scratch}/unit.ptx")
        result = run([real("ptxas"), *options, "unit.ptx", "-o", "unit.cubin"], scratch)
        result.files["cubin"] = read(f"{scratch}/unit.cubin")
    return result


# Helper functions.


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The cost of two steps that run one after the other."""
    total = {name: round(one.get(name, 0) + other.get(name, 0), 3) for name in ("cpu_s", "wall_s")}
    return total | {"peak_memory": max(one.get("peak_memory", 0), other.get("peak_memory", 0))}


def say(first: Result, second: Result, originals: Mapping[bytes, bytes]) -> None:
    """Print the messages of the compiler, with the paths of this cell."""
    for stream, content in ((sys.stdout, first.out + second.out), (sys.stderr, first.err + second.err)):
        for path in sorted(originals, key=len, reverse=True):
            if path != originals[path]:
                content = content.replace(path, originals[path])
        stream.buffer.write(content)
        stream.flush()


def read(place: str) -> bytes:
    """Read the bytes of a file."""
    with open(place, "rb") as stream:
        return stream.read()


def write(place: str, content: bytes) -> None:
    """Write a file."""
    with open(place, "wb") as stream:
        stream.write(content)


if __name__ == "__main__":
    sys.exit(main())
