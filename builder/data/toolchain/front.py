"""Run one compilation for the wrappers in this folder, through ccache if GRACEFARM_CCACHE is set, and measure its costs.

    python -I -S front.py COMPILER ARGUMENT...

The native Python of the root runs this program. In a host build, the builder's Python runs it. The program uses only the
standard library. For each translation unit, it appends one line of JSON to the file that GRACEFARM_UNITS names. The line
contains the costs of the unit. If a device pass was read from the store, its saved cost is included. GRACEFARM_CCACHE names
ccache. The variables of ccache (CCACHE_*) name the folder of its cache.

nvcc preprocesses a source once for the host and once for each architecture. ccache 4.14 hashes the output of `nvcc -E`, which
is the text of only one of these passes. So if a header changes that only the host pass or only the pass of the second
architecture reads, ccache returns the old object. To prevent this, the program preprocesses each pass that `nvcc --dryrun`
lists. It gives ccache the digest of these texts, and ccache includes the digest in its hash. The digest also changes if a
header moves or if the result of `__has_include` changes. So for nvcc, ccache can use its direct mode, which does not run the
preprocessor again. gcc has one pass, and for gcc ccache uses the preprocessed text.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from typing import Any

SOURCE = re.compile(r"\.(?:cu|cpp|cc|cxx|c\+\+|C|c)$")
HIT = frozenset({"direct_cache_hit", "preprocessed_cache_hit"})
THREADS = re.compile(r"(?:--threads|-t)(?:=(\d+))?")
REFUSED = frozenset({"compile failed", "preprocessor error"})
"The counters of ccache for a compiler that fails."
QUIET = re.compile(r"^(?:local_storage|remote_storage|direct_cache_miss|preprocessed_cache_miss|cleanups|files_in|cache_size)")
"Counters of ccache that do not describe the result of a call."


def main() -> int:
    """Run the compilation, and return the compiler's exit code."""
    command = sys.argv[1:]
    sources = [word for word in command[1:] if SOURCE.search(word) and not word.startswith("-")]
    if len(sources) != 1 or "GRACEFARM_UNITS" not in os.environ:
        os.execv(command[0], command)  # noqa: S606
    os.environ["GRACEFARM_INSIDE"] = "1"  # nvcc starts the wrapper of gcc, which then starts gcc directly
    scratch = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"front-{os.getpid()}")  # noqa: PTH118, S108
    result = prepare(command, scratch) if os.environ.get("GRACEFARM_CCACHE") else "off"
    os.environ["GRACEFARM_DEVICE_NOTES"] = f"{scratch}.device"
    cached = not result
    started = time.monotonic()
    code, cpu, peak = run([os.environ["GRACEFARM_CCACHE"], *command] if cached else command)
    if cached:
        result = outcome(f"{scratch}.log")
        if code != 0 and result not in REFUSED:  # ccache failed, so run the compiler without it
            code, cpu, peak = run(command)
    device = device_passes(f"{scratch}.device")
    for name in ("log", "passes", "device"):
        if os.path.exists(f"{scratch}.{name}"):  # noqa: PTH110
            os.unlink(f"{scratch}.{name}")  # noqa: PTH108
    if code == 0:
        saved = [each["saved"] for each in device if each["saved"]]
        peak = max([peak, *(int(cost["peak_memory"]) for cost in saved)])
        note(
            {
                "unit": unit(sources[0]),
                "outcome": result,
                "wall_s": round(time.monotonic() - started + sum(cost["wall_s"] for cost in saved), 3),
                "cpu_s": round(cpu + sum(cost["cpu_s"] for cost in saved), 3),
                # `peak` is the peak of the largest process. With --threads, nvcc runs several such processes at the same time.
                "peak_memory": peak * beside(command),
                "device": device,
            }
        )
    return code if code >= 0 else 128 - code


def unit(source: str) -> str:
    """The name of a unit: the path of its source, relative to the source tree.

    The source tree and the file that GRACEFARM_UNITS names are in the same folder.
    """
    tree = os.path.join(os.path.dirname(os.environ["GRACEFARM_UNITS"]), "source")  # noqa: PTH118, PTH120
    return os.path.relpath(os.path.abspath(source), tree)  # noqa: PTH100


def run(command: list[str]) -> tuple[int, float, int]:
    """Run a command; return its exit code, its CPU seconds, and the peak memory of its largest process in bytes."""
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def device_passes(place: str) -> list[dict[str, Any]]:
    """The notes that device.py wrote about each device pass of the unit."""
    try:
        with open(place, encoding="utf-8") as stream:  # noqa: PTH123
            return [json.loads(line) for line in stream]
    except OSError:
        return []


def prepare(command: list[str], scratch: str) -> str:
    """Set ccache's variables for this unit; return the reason why the unit cannot be cached, or an empty text."""
    os.environ["CCACHE_STATSLOG"] = f"{scratch}.log"
    if os.path.basename(command[0]) != "nvcc":  # noqa: PTH119
        os.environ["CCACHE_NODIRECT"] = "1"
        return ""
    digest = passes(command)
    if digest is None:
        return "no passes to preprocess"
    with open(f"{scratch}.passes", "w", encoding="ascii") as stream:  # noqa: PTH123
        stream.write(digest)
    os.environ["CCACHE_EXTRAFILES"] = f"{scratch}.passes"
    return ""


def passes(command: list[str]) -> str | None:
    """The digest of nvcc's plan for this unit and of the preprocessed text of each pass.

    The function returns None if there is no preprocessed text.
    """
    dry = subprocess.run([command[0], "--dryrun", *unthreaded(command[1:])], capture_output=True, check=False)
    if dry.returncode:
        return None
    # The names of scratch files contain the process id, so replace them.
    lines = re.sub(r"tmpxft_\w+-\w+", "tmpxft", dry.stderr.decode(errors="replace")).splitlines()
    plan = [line[3:] for line in lines if line.startswith("#$ ")]
    path = next((line[5:] for line in plan if line.startswith("PATH=")), os.environ["PATH"])
    digest = hashlib.sha256("\n".join(plan).encode())
    preprocessed = False
    for line in plan:
        words = shlex.split(line) if " -E " in line else []
        if "-E" not in words or "-o" not in words:
            continue
        place = words.index("-o")
        text = subprocess.run(
            [*words[:place], *words[place + 2 :]], env={**os.environ, "PATH": path}, capture_output=True, check=False
        )
        if text.returncode:
            return None  # the compiler will report the error
        digest.update(text.stdout)
        preprocessed = True
    return digest.hexdigest() if preprocessed else None


def unthreaded(arguments: list[str]) -> list[str]:
    """The arguments without --threads.

    --threads makes `nvcc --dryrun` of CUDA 12.4 stop early. It does not affect the preprocessed text.
    """
    kept, words = [], iter(arguments)
    for word in words:
        if THREADS.fullmatch(word):
            if "=" not in word:
                next(words, None)
        else:
            kept.append(word)
    return kept


def outcome(log: str) -> str:
    """`hit`, `miss`, or the reason why ccache did not cache the call."""
    try:
        with open(log, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123
            counters = [line.strip() for line in stream if line.strip() and not line.startswith("#")]
    except OSError:
        return "ccache wrote no statistics"
    if HIT.intersection(counters):
        return "hit"
    if "cache_miss" in counters:
        return "miss"
    return next((counter.replace("_", " ") for counter in counters if not QUIET.match(counter)), "ccache gave no reason")


def beside(command: list[str]) -> int:
    """The number of compiler processes that nvcc runs at the same time."""
    threads, architectures = 1, 0
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if match := THREADS.fullmatch(word):
            text = match[1] or following
            threads = int(text) if text.isdecimal() else 1
        architectures += word.startswith(("-gencode", "--generate-code"))
    return max(1, min(threads or architectures, architectures))


def note(line: dict[str, object]) -> None:
    """Append a line to the file of units. One write appends the whole line, so that lines of several processes do not mix."""
    descriptor = os.open(os.environ["GRACEFARM_UNITS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
