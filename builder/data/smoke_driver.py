"""Runs in the clean environment: import each module by name, check that it is from there, then run smoke.py.

argv: modules, comma separated; path of smoke.py or '-'; modules that may come from elsewhere, or '-'. A script that loads
other modules lists them in LOADED; they are in sys.modules and are checked too. A script for a GPU sets COMPARISONS, a list of
{"name", "error", "tolerance"}, and NEGATIVE_CONTROL, a sentence about a wrong result that its comparison refused. Prints one
JSON line that starts with GRACEFARM.
"""

import contextlib
import importlib
import io
import json
import runpy
import sys
from typing import Any

wanted, script, elsewhere = sys.argv[1].split(","), sys.argv[2], sys.argv[3].split(",")
files: dict[str, str] = {}


def note(name: str) -> None:
    module = sys.modules[name]
    place = getattr(module, "__file__", None) or next(iter(module.__path__))
    if not place.startswith(sys.prefix + "/lib/") and name not in elsewhere:
        sys.exit(f"ImportError: {name} was imported from {place}, not from the installed wheel under {sys.prefix}/lib")
    files[name] = place


for name in wanted:
    importlib.import_module(name)
    note(name)
said = io.StringIO()
left: dict[str, Any] = {}
if script != "-":
    with contextlib.redirect_stdout(said):
        left = runpy.run_path(script, run_name="__main__")
    for name in left.get("LOADED", ()):
        note(name)
answer = {"modules": files, "script": said.getvalue() if script != "-" else None}
answer |= {name.lower(): left[name] for name in ("COMPARISONS", "NEGATIVE_CONTROL") if name in left}
print("GRACEFARM" + json.dumps(answer))
