"""Byte-compile the files named on stdin, below the folder named as argument; run by the root's native Python.

Unchecked hashes: neither the clock nor a copy makes the result stale, and the interpreter reads no source to find out.
A file that is no Python of this version (a template) stays as it is.
"""

import concurrent.futures
import os
import py_compile
import sys


def compile_one(name: str) -> None:
    """Write NAME's .pyc where the interpreter looks for it."""
    py_compile.compile(name, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    names = [os.path.join(sys.argv[1], name) for name in sys.stdin.read().split("\0") if name]  # noqa: PTH118
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for _ in pool.map(compile_one, names, chunksize=16):
            pass
