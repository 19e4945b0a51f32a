"""Faults for tests: `PHASE=FAULT …` in the variable GRACEFARM_STANDIN or in a node's ~/.gracefarm-standin, read each time.

Phases of a worker: init, load (in the middle), loaded, step. Faults: die, oom, wedge, slow:SECONDS, error.
For the engine: engine=hang (requests are accepted but never processed, without a timeout).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from aphrodite.shape import GIB


class OutOfMemoryError(RuntimeError):
    """The error of torch."""


OutOfMemoryError.__module__ = "torch"


def ordered(phase: str) -> str:
    """The fault for a phase; empty if there is none."""
    path = Path.home() / ".gracefarm-standin"
    words = os.environ.get("GRACEFARM_STANDIN", "").split() + (path.read_text().split() if path.is_file() else [])
    return dict(word.split("=", 1) for word in words if "=" in word).get(phase, "")


def happen(phase: str) -> None:
    """Cause the fault for a phase, if there is one."""
    what, _, how = ordered(phase).partition(":")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "oom":
        out_of_memory(94 * GIB, 96 * GIB)
    elif what == "wedge":
        while ordered(phase) == "wedge":
            time.sleep(0.2)
    elif what == "slow":
        time.sleep(float(how))
    elif what == "error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def out_of_memory(used: int, total: int) -> None:
    """Raise an error with the message of torch 2.4."""
    raise OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate 1.62 GiB. GPU 0 has a total capacity of {total / GIB:.2f} GiB of which "
        f"{max(0, total - used) / GIB:.2f} GiB is free. Including non-PyTorch memory, this process has "
        f"{min(used, total) / GIB:.2f} GiB memory in use. Of the allocated memory 93.81 GiB is allocated by PyTorch, and "
        "40.12 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
        "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
    )
