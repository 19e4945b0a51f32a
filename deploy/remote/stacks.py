"""Reads the current stacks of a deployment's Python processes with py-spy, which Ray installs in the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from deploy.remote import marked
from deploy.remote.wire import Json

RANKS = ("ray::", "vllm", "aphrodite", "python", "pt_main")
"Prefixes of the names of processes of an engine or its ranks."
OTHERS = ("ray::IDLE", "ray::Dashboard", "ray::RuntimeEnv")
"Processes of Ray, which are always waiting."
MOST = 16
"Maximum number of processes per node. py-spy takes about a second for each."


def dump(prefix: str, environment: str) -> str:
    """`py-spy dump` of the engine and of Ray's workers whose marks start with `prefix`, or why there is none."""
    own = Path(environment) / "bin" / "py-spy"
    program = str(own) if own.exists() else shutil.which("py-spy")
    ranks = [process for process in marked.processes(prefix) if _rank(process)]
    if not ranks:
        return "(no processes of an engine)\n"
    if program is None:
        return "(no py-spy: only environments with ray[default] have it)\n"
    sudo = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []  # with Yama, ptrace may require root
    return "\n".join(_dump([*sudo, program], process) for process in ranks[:MOST])


def _rank(process: Json) -> bool:
    name, job = str(process["name"]), str(process["mark"]).rpartition("/")[2]
    return name.lower().startswith(RANKS) and not name.startswith(OTHERS) and (job == "engine" or name.startswith("ray::"))


def _dump(command: list[str], process: Json) -> str:
    try:
        result = subprocess.run(
            [*command, "dump", "--nonblocking", "--pid", str(process["pid"])],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Process {process['pid']}: {process['name']}\n({error})\n"
    return result.stdout or f"Process {process['pid']}: {process['name']}\n({result.stderr.strip()})\n"
