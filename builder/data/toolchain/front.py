"""Run one compilation for the wrappers beside this file: through the compiler cache, if there is one, and measured.

    python -I -S front.py COMPILER ARGUMENT...

The root's native Python runs it, in a host build the builder's own; it uses the standard library only. It appends one line of
JSON for each translation unit to the file that GRACEFARM_UNITS names, with the costs that the unit has if all its device
passes run. GRACEFARM_CCACHE names ccache, whose own variables (CCACHE_*) say where its cache is.

ccache 4.14 hashes what `nvcc -E` prints, which is the text of one pass of several. A header that only the host pass reads, or
only the pass of the second architecture, may change and ccache returns the old object. So this program preprocesses each pass
that `nvcc --dryrun` names and gives ccache the digest, which it hashes beside its own. The digest covers headers that move and
`__has_include` too, so ccache may look up a unit of nvcc by its inputs, without a second run of the preprocessor. A unit of
gcc has one pass, and ccache looks it up by the preprocessed text.
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
"What ccache says when the compiler fails."
QUIET = re.compile(r"^(?:local_storage|remote_storage|direct_cache_miss|preprocessed_cache_miss|cleanups|files_in|cache_size)")
"Counters of ccache that do not give the result of a call."


def main() -> int:
    """Compile; return the compiler's exit code."""
    command = sys.argv[1:]
    sources = [word for word in command[1:] if SOURCE.search(word) and not word.startswith("-")]
    if len(sources) != 1 or "GRACEFARM_UNITS" not in os.environ:
        os.execv(command[0], command)  # noqa: S606
    os.environ["GRACEFARM_INSIDE"] = "1"  # nvcc starts gcc, whose wrapper then passes the call on
    scratch = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"front-{os.getpid()}")  # noqa: PTH118, S108
    result = prepare(command, scratch) if os.environ.get("GRACEFARM_CCACHE") else "off"
    os.environ["GRACEFARM_DEVICE_NOTES"] = f"{scratch}.device"
    cached = not result
    started = time.monotonic()
    code, cpu, peak = run([os.environ["GRACEFARM_CCACHE"], *command] if cached else command)
    if cached:
        result = outcome(f"{scratch}.log")
        if code != 0 and result not in REFUSED:  # ccache itself failed
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
                # The peak of the largest process. With --threads, nvcc runs one for each architecture at the same time.
                "peak_memory": peak * beside(command),
                "device": device,
            }
        )
    return code if code >= 0 else 128 - code


def unit(source: str) -> str:
    """The name of a unit: the path of its source in the source tree, which lies beside the file of units."""
    tree = os.path.join(os.path.dirname(os.environ["GRACEFARM_UNITS"]), "source")  # noqa: PTH118, PTH120
    return os.path.relpath(os.path.abspath(source), tree)  # noqa: PTH100


def run(command: list[str]) -> tuple[int, float, int]:
    """Run a command; return its exit code, CPU seconds, and the bytes of the largest process below it."""
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def device_passes(place: str) -> list[dict[str, Any]]:
    """What device.py noted of each device pass of the unit."""
    try:
        with open(place, encoding="utf-8") as stream:  # noqa: PTH123
            return [json.loads(line) for line in stream]
    except OSError:
        return []


def prepare(command: list[str], scratch: str) -> str:
    """Set ccache's variables for this unit; return why it cannot be cached, or nothing."""
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
    """The digest of nvcc's plan for this unit and of the preprocessed text of each pass; None if there is no such text."""
    dry = subprocess.run([command[0], "--dryrun", *unthreaded(command[1:])], capture_output=True, check=False)
    if dry.returncode:
        return None
    # The names of scratch files contain the process id.
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
    """The arguments without --threads, which makes `nvcc --dryrun` of CUDA 12.4 stop early. It changes no text."""
    kept, words = [], iter(arguments)
    for word in words:
        if THREADS.fullmatch(word):
            if "=" not in word:
                next(words, None)
        else:
            kept.append(word)
    return kept


def outcome(log: str) -> str:
    """`hit`, `miss`, or ccache's reason for passing the call on."""
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
    """The number of compilers that nvcc runs at the same time."""
    threads, architectures = 1, 0
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if match := THREADS.fullmatch(word):
            text = match[1] or following
            threads = int(text) if text.isdecimal() else 1
        architectures += word.startswith(("-gencode", "--generate-code"))
    return max(1, min(threads or architectures, architectures))


def note(line: dict[str, object]) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    descriptor = os.open(os.environ["GRACEFARM_UNITS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
