"""One compilation, for the wrappers beside this file: through the compiler cache, where there is one, and measured.

    python -I -S front.py COMPILER ARGUMENT...

Run by the root's native Python, in a host build by ours; standard library only. GRACEFARM_UNITS names the file that gets a
line of JSON for each translation unit that was compiled. GRACEFARM_CCACHE names ccache; its own variables (CCACHE_*) say where
it keeps things.

ccache 4.14 takes `nvcc -E` for what nvcc compiles, which is one pass of several: a header that only the host code reads, or
only the second architecture, may change unseen, and the old object comes back. So every pass that `nvcc --dryrun` names is
preprocessed here, and ccache is given their digest to hash beside its own. That is exact, includes that move and
`__has_include` too; hence ccache may look a unit of nvcc's up by its inputs, without another preprocessor. For gcc's, whose
preprocessed text is all there is, it is told to go by that text.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time

SOURCE = re.compile(r"\.(?:cu|cpp|cc|cxx|c\+\+|C|c)$")
HIT = frozenset({"direct_cache_hit", "preprocessed_cache_hit"})
THREADS = re.compile(r"(?:--threads|-t)(?:=(\d+))?")
REFUSED = frozenset({"compile failed", "preprocessor error"})
"What ccache says when the compiler says no."
QUIET = re.compile(r"^(?:local_storage|remote_storage|direct_cache_miss|preprocessed_cache_miss|cleanups|files_in|cache_size)")
"Counters of ccache's that do not say what became of the call."


def main() -> int:
    """Compile; the compiler's exit code."""
    command = sys.argv[1:]
    sources = [one for one in command[1:] if SOURCE.search(one) and not one.startswith("-")]
    if len(sources) != 1 or "GRACEFARM_UNITS" not in os.environ:
        os.execv(command[0], command)  # noqa: S606
    os.environ["GRACEFARM_INSIDE"] = "1"  # nvcc starts gcc, whose wrapper then stays out of the way
    scratch = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"front-{os.getpid()}")  # noqa: PTH118, S108
    why = prepare(command, scratch) if os.environ.get("GRACEFARM_CCACHE") else "off"
    cached = not why
    started = time.monotonic()
    code, cpu, peak = run([os.environ["GRACEFARM_CCACHE"], *command] if cached else command)
    if cached:
        why = outcome(f"{scratch}.log")
        if code != 0 and why not in REFUSED:  # ccache's own trouble
            code, cpu, peak = run(command)
    for name in ("log", "passes"):
        if os.path.exists(f"{scratch}.{name}"):  # noqa: PTH110
            os.unlink(f"{scratch}.{name}")  # noqa: PTH108
    if code == 0:
        note(
            {
                "unit": unit(sources[0]),
                "outcome": why,
                "wall_s": round(time.monotonic() - started, 3),
                "cpu_s": round(cpu, 3),
                # The largest process; nvcc with --threads runs as many of them at once as it has architectures.
                "peak_memory": peak * beside(command),
            }
        )
    return code if code >= 0 else 128 - code


def unit(source: str) -> str:
    """The name of a unit: its source relative to the source tree, which lies beside the notes."""
    tree = os.path.join(os.path.dirname(os.environ["GRACEFARM_UNITS"]), "source")  # noqa: PTH118, PTH120
    return os.path.relpath(os.path.abspath(source), tree)  # noqa: PTH100


def run(command: list[str]) -> tuple[int, float, int]:
    """Run a command to its end: exit code, CPU seconds, and bytes of the largest process below it."""
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def prepare(command: list[str], scratch: str) -> str:
    """Set ccache's variables for this unit; why it is not cached, or nothing."""
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
    """Digest of nvcc's plan for this unit and of the preprocessed text of each of its passes; None where there is none."""
    dry = subprocess.run([command[0], "--dryrun", *unthreaded(command[1:])], capture_output=True, check=False)
    if dry.returncode:
        return None
    # Scratch files have the process id in their names.
    lines = re.sub(r"tmpxft_\w+-\w+", "tmpxft", dry.stderr.decode(errors="replace")).splitlines()
    plan = [line[3:] for line in lines if line.startswith("#$ ")]
    path = next((line[5:] for line in plan if line.startswith("PATH=")), os.environ["PATH"])
    digest = hashlib.sha256("\n".join(plan).encode())
    found = False
    for line in plan:
        words = shlex.split(line) if " -E " in line else []
        if "-E" not in words or "-o" not in words:
            continue
        place = words.index("-o")
        done = subprocess.run(
            [*words[:place], *words[place + 2 :]], env={**os.environ, "PATH": path}, capture_output=True, check=False
        )
        if done.returncode:
            return None  # the compiler will say why
        digest.update(done.stdout)
        found = True
    return digest.hexdigest() if found else None


def unthreaded(arguments: list[str]) -> list[str]:
    """The arguments without --threads, with which nvcc 12.4's --dryrun ends half-way. It changes no text."""
    kept, words = [], iter(arguments)
    for word in words:
        if THREADS.fullmatch(word):
            if "=" not in word:
                next(words, None)
        else:
            kept.append(word)
    return kept


def outcome(log: str) -> str:
    """`hit`, `miss`, or what ccache says of a call that it only passed on."""
    try:
        with open(log, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123
            counters = [line.strip() for line in stream if line.strip() and not line.startswith("#")]
    except OSError:
        return "ccache wrote no statistics"
    if HIT.intersection(counters):
        return "hit"
    if "cache_miss" in counters:
        return "miss"
    return next((one.replace("_", " ") for one in counters if not QUIET.match(one)), "not said by ccache")


def beside(command: list[str]) -> int:
    """How many compilers nvcc runs at once."""
    threads, architectures = 1, 0
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if match := THREADS.fullmatch(word):
            text = match[1] or following
            threads = int(text) if text.isdecimal() else 1
        architectures += word.startswith(("-gencode", "--generate-code"))
    return max(1, min(threads or architectures, architectures))


def note(line: dict[str, object]) -> None:
    """One write, which no other process's can split."""
    descriptor = os.open(os.environ["GRACEFARM_UNITS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
